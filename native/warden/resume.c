/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The disposable child that resumes a rewritten SSA frame.
 *
 * What ERESUME runs lies in the enclave, and on the sim in memory that clients
 * can write.  So it does not run in the process that holds the control key: the
 * child's copy of the key is wiped by fork itself (MADV_WIPEONFORK), it has no
 * descriptor and hardly a system call left when it resumes, and it ends with the
 * warden.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sandbox.h"
#include "sim.h"
#include "warden.h"

enum { CHILD_LANDED = 0, CHILD_ELSEWHERE = 1, CHILD_UNABLE = 2 };

static int child_map(const struct teemate_enclave *parent, uint64_t tcs_offset, struct teemate_enclave **enclave)
{
    int result = teemate_open((int)parent->backend->id, parent->fd, parent->base, parent->size,
                              parent->segments, parent->segment_count, enclave, NULL);

    if (result == 0)
        result = teemate_map(*enclave, NULL);
    if (result == 0)
        result = teemate_map_tcs(*enclave, tcs_offset, NULL);
    return result;
}

static _Noreturn void child_main(const struct teemate_enclave *parent, uint64_t tcs_offset, pid_t warden)
{
    struct teemate_regs regs;
    struct sgx_enclave_run run;
    struct teemate_enclave *enclave;
    int outcome;

    /* The thread that forked is the warden's main thread, so this means its end. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0 || getppid() != warden)
        _exit(CHILD_UNABLE);
    if (child_map(parent, tcs_offset, &enclave) != 0)
        _exit(CHILD_UNABLE);
    if (close_range(0, ~0u, 0) != 0 || sandbox_filter_child() != 0)
        _exit(CHILD_UNABLE);
    memset(&run, 0, sizeof(run));
    do {
        memset(&regs, 0, sizeof(regs));
        outcome = teemate_enter(enclave, tcs_offset, &regs, SGX_ERESUME, 0, &run);
    } while (outcome == TEEMATE_PAUSED);
    _exit(outcome == TEEMATE_LANDED ? CHILD_LANDED : outcome < 0 ? CHILD_UNABLE : CHILD_ELSEWHERE);
}

int warden_resume(struct repair *repair, uint64_t tcs_offset)
{
    pid_t warden = getpid();
    pid_t child = fork();
    int status;

    if (child < 0)
        return -errno;
    if (child == 0)
        child_main(repair->enclave, tcs_offset, warden);
    /* The broker's deadline ends this warden, and with it the child, when it does not end. */
    while (waitpid(child, &status, 0) < 0) {
        if (errno != EINTR)
            return -errno;
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == CHILD_UNABLE)
        return -ECHILD;
    if (WIFEXITED(status) && WEXITSTATUS(status) == CHILD_LANDED)
        return 0;
    /* It was killed, perhaps inside: then the TCS is still busy, on the sim. */
    if (repair->enclave->backend->id == TEEMATE_SIM && sim_tcs_bury(repair->enclave, tcs_offset) < 0)
        return -EIO;
    return 1;
}
