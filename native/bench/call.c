/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What does an empty ECALL cost above the bare transition?
 *
 *   teemate-floor call BARE.sgxs BARE.sig SDK.sgxs SDK.sig [sim|sgx]
 *
 * BARE is an enclave that only executes EEXIT ("bare"), SDK an image of the SDK whose ECALL "empty" does
 * nothing ("empty").  Both run in this process through the same teemate_enter().  "getppid" is the
 * mean of a hundred system calls, which are too short for a clock each.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "floor.h"
#include "teemate.h"

#define SYSTEM_CALLS 100

struct calls {
    struct teemate_enclave *bare;
    uint64_t bare_tcs;
    struct teemate_slot *slot;
};

static _Noreturn void fail(const char *what, int error, const struct teemate_diag *diag)
{
    fprintf(stderr, "teemate-floor: %s: %s: %s\n", what, strerror(-error), diag != NULL ? diag->text : "");
    exit(1);
}

static struct teemate_enclave *enclave_load(int backend, const char *image, const char *sigstruct)
{
    uint8_t signature[1808];
    struct teemate_diag diag = {0};
    struct teemate_enclave *enclave;
    int fd = open(sigstruct, O_RDONLY | O_CLOEXEC);
    int result;

    if (fd < 0 || read(fd, signature, sizeof(signature)) != (ssize_t)sizeof(signature))
        fail(sigstruct, -EIO, NULL);
    close(fd);
    fd = open(image, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        fail(image, -errno, NULL);
    result = teemate_create(backend, 0, 0, fd, signature, &enclave, &diag);
    close(fd);
    if (result == 0)
        result = teemate_map(enclave, &diag);
    if (result < 0)
        fail(image, result, &diag);
    return enclave;
}

static double getppid_once(void *state)
{
    double start = floor_now_ns();

    (void)state;
    for (int i = 0; i < SYSTEM_CALLS; i++)
        syscall(SYS_getppid);
    return (floor_now_ns() - start) / SYSTEM_CALLS;
}

static double bare_once(void *state)
{
    const struct calls *calls = state;
    struct sgx_enclave_run run;
    struct teemate_regs regs = {0};
    double start;
    int result;

    memset(&run, 0, sizeof(run));
    start = floor_now_ns();
    result = teemate_enter(calls->bare, calls->bare_tcs, &regs, SGX_EENTER, 0, &run);
    while (result == TEEMATE_PAUSED)
        result = teemate_enter(calls->bare, calls->bare_tcs, &regs, run.function, 0, &run);
    if (result != TEEMATE_LEFT || run.function != SGX_EEXIT)
        fail("the bare enclave did not leave by EEXIT", result < 0 ? result : -EIO, NULL);
    return floor_now_ns() - start;
}

static double empty_once(void *state)
{
    const struct calls *calls = state;
    struct teemate_call call;
    double start = floor_now_ns();
    int result = teemate_slot_call(calls->slot, "empty", 5, NULL, 0, NULL, 0, 0, &call);

    while (result == 0 && call.outcome == TEEMATE_CALL_PAUSED)
        result = teemate_slot_resume(calls->slot, 0, &call);
    if (result < 0 || call.outcome != TEEMATE_CALL_DONE || call.status != 0)
        fail("the empty call failed", result < 0 ? result : -EIO, NULL);
    return floor_now_ns() - start;
}

int floor_call(int argc, char **argv)
{
    struct teemate_slot_args args;
    struct teemate_diag diag = {0};
    struct calls calls = {0};
    const struct floor floors[] = {
        {getppid_once, "getppid", NULL},
        {bare_once, "bare", &calls},
        {empty_once, "empty", &calls},
    };
    struct teemate_enclave *sdk;
    int backend, result;

    if (argc < 5 || argc > 6) {
        fprintf(stderr, "usage: teemate-floor call BARE.sgxs BARE.sig SDK.sgxs SDK.sig [sim|sgx]\n");
        return 2;
    }
    backend = argc > 5 && strcmp(argv[5], "sgx") == 0 ? TEEMATE_SGX : TEEMATE_SIM;
    calls.bare = enclave_load(backend, argv[1], argv[2]);
    sdk = enclave_load(backend, argv[3], argv[4]);
    if (teemate_enclave_tcs(calls.bare, &calls.bare_tcs, 1) < 1)
        fail(argv[1], -ENOENT, NULL);
    result = teemate_map_tcs(calls.bare, calls.bare_tcs, &diag);
    if (result == 0)
        result = teemate_private_start(sdk, &diag);
    if (result == 0)
        result = teemate_private_slot(sdk, 0, &args);
    if (result == 0)
        result = teemate_slot_open(sdk, &args, &calls.slot, &diag);
    if (result < 0)
        fail("start", result, &diag);
    result = floor_serve(floors, 3);
    teemate_slot_close(calls.slot);
    teemate_unmap_tcs(calls.bare, calls.bare_tcs);
    teemate_close(sdk);
    teemate_close(calls.bare);
    return result;
}
