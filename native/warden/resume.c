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
#include <time.h>
#include <unistd.h>

#include "sandbox.h"
#include "sim.h"
#include "warden.h"

/* How long to wait for the end of a thread that is about to be killed. */
#define HOLDER_PATIENCE_MS 2000

enum { CHILD_LANDED = 0, CHILD_ELSEWHERE = 1, CHILD_UNABLE = 2 };

/* The sim's word of a TCS, NULL when its table has none of that offset. */
static struct sim_tcs *sim_tcs_of(const struct teemate_enclave *enclave, uint64_t offset)
{
    uint32_t count = atomic_load(&enclave->sim->header->tcs_count);

    for (uint32_t i = 0; i < count && i < SIM_TCS_MAX; i++) {
        if (enclave->sim->tcs[i].offset == offset)
            return &enclave->sim->tcs[i];
    }
    return NULL;
}

/*
 * The thread id stands in memory that clients can write, so the wait for its end is bounded.
 * False when it did not end.
 */
static bool await_holder(const struct teemate_enclave *enclave, uint64_t offset)
{
    const struct timespec pause = {.tv_nsec = 1000000};
    struct sim_tcs *tcs = sim_tcs_of(enclave, offset);

    for (int waited = 0; tcs != NULL && waited < HOLDER_PATIENCE_MS; waited++) {
        uint64_t word = atomic_load(&tcs->word);
        pid_t holder = (pid_t)(SIM_TCS_HOLDER(word) & ~SIM_WARDEN);

        if ((word & SIM_TCS_BUSY) == 0 || holder <= 0 || (kill(holder, 0) != 0 && errno == ESRCH))
            return true;
        clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
    }
    return false;
}

void warden_mark(struct teemate_enclave *enclave)
{
    if (enclave->backend->id == TEEMATE_SIM)
        enclave->sim->holder_mark = SIM_WARDEN;
}

int warden_bury(struct teemate_enclave *enclave, uint64_t tcs_offset)
{
    int result;

    if (enclave->backend->id != TEEMATE_SIM)
        return 0;
    await_holder(enclave, tcs_offset);
    result = sim_tcs_bury(enclave, tcs_offset);
    return result < 0 ? result : 0;
}

int warden_bury_own(struct teemate_enclave *enclave, uint64_t tcs_offset)
{
    struct sim_tcs *tcs = sim_tcs_of(enclave, tcs_offset);
    uint64_t word = tcs != NULL ? atomic_load(&tcs->word) : 0;
    int result;

    if ((word & SIM_TCS_BUSY) == 0 || (SIM_TCS_HOLDER(word) & SIM_WARDEN) == 0 || !await_holder(enclave, tcs_offset))
        return 0;
    if (atomic_load(&tcs->word) != word)
        return 0; /* it left by itself, and whoever is there now is not ours */
    result = sim_tcs_bury(enclave, tcs_offset);
    return result < 0 ? result : 0;
}

static int child_map(const struct teemate_enclave *parent, uint64_t tcs_offset, struct teemate_enclave **enclave)
{
    int result = teemate_open((int)parent->backend->id, parent->fd, parent->base, parent->size,
                              parent->segments, parent->segment_count, enclave, NULL);

    if (result == 0)
        warden_mark(*enclave);
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
        outcome = enclave_enter(enclave, tcs_offset, &regs, SGX_ERESUME, 0, ENTRY_STACK_CALLER, &run);
    } while (outcome == TEEMATE_PAUSED);
    _exit(outcome == TEEMATE_LANDED ? CHILD_LANDED : outcome < 0 ? CHILD_UNABLE : CHILD_ELSEWHERE);
}

int warden_resume(struct teemate_enclave *enclave, uint64_t tcs_offset)
{
    pid_t warden = getpid();
    pid_t child = fork();
    int status;

    if (child < 0)
        return -errno;
    if (child == 0)
        child_main(enclave, tcs_offset, warden);
    /* The broker's deadline ends this warden, and with it the child, when it does not end. */
    while (waitpid(child, &status, 0) < 0) {
        if (errno != EINTR)
            return -errno;
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == CHILD_UNABLE)
        return -ECHILD;
    return WIFEXITED(status) && WEXITSTATUS(status) == CHILD_LANDED ? 0 : 1;
}

int warden_resume_own(struct repair *repair, uint64_t tcs_offset)
{
    int result = warden_resume(repair->enclave, tcs_offset);

    /* It was killed, perhaps inside; or it met a child of the last warden that was still there. */
    if (result == 1 && warden_bury(repair->enclave, tcs_offset) < 0)
        return -EIO;
    return result;
}
