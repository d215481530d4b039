/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What does an empty ECALL cost above the bare transition?
 *
 *   call_floor BARE.sgxs BARE.sig SDK.sgxs SDK.sig [ECALL] [ROUNDS] [sim|sgx]
 *
 * BARE is an enclave that only executes EEXIT, SDK an image of the SDK with an
 * ECALL that does nothing ("empty" unless named).  Both run in this process through the
 * same teemate_enter().  Prints one JSON object, nanoseconds per operation:
 * the best round of each, rounds taken in turns so that all meet the same noise.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "teemate.h"

#define BATCH 2000

static double now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

static _Noreturn void fail(const char *what, int error, const struct teemate_diag *diag)
{
    fprintf(stderr, "call_floor: %s: %s: %s\n", what, strerror(-error), diag != NULL ? diag->text : "");
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

struct floor {
    struct teemate_enclave *bare;
    uint64_t bare_tcs;
    struct teemate_slot *slot;
    const char *ecall;
};

static double round_getppid(const struct floor *floor)
{
    double start = now_ns();

    (void)floor;
    for (int i = 0; i < BATCH; i++)
        syscall(SYS_getppid);
    return (now_ns() - start) / BATCH;
}

static double round_bare(const struct floor *floor)
{
    struct sgx_enclave_run run;
    double start;

    memset(&run, 0, sizeof(run));
    start = now_ns();
    for (int i = 0; i < BATCH; i++) {
        struct teemate_regs regs = {0};
        int result = teemate_enter(floor->bare, floor->bare_tcs, &regs, SGX_EENTER, 0, &run);

        while (result == TEEMATE_PAUSED)
            result = teemate_enter(floor->bare, floor->bare_tcs, &regs, run.function, 0, &run);
        if (result != TEEMATE_LEFT || run.function != SGX_EEXIT)
            fail("the bare enclave did not leave by EEXIT", result < 0 ? result : -EIO, NULL);
    }
    return (now_ns() - start) / BATCH;
}

static double round_call(const struct floor *floor)
{
    size_t length = strlen(floor->ecall);
    struct teemate_call call;
    double start = now_ns();

    for (int i = 0; i < BATCH; i++) {
        int result = teemate_slot_call(floor->slot, floor->ecall, length, NULL, 0, NULL, 0, 0, &call);

        while (result == 0 && call.outcome == TEEMATE_CALL_PAUSED)
            result = teemate_slot_resume(floor->slot, 0, &call);
        if (result < 0 || call.outcome != TEEMATE_CALL_DONE || call.status != 0) {
            fprintf(stderr, "outcome %d, status %d\n", call.outcome, call.status);
            fail("the empty call failed", result < 0 ? result : -EIO, NULL);
        }
    }
    return (now_ns() - start) / BATCH;
}

static void keep_best(double *best, double value)
{
    if (*best == 0 || value < *best)
        *best = value;
}

int main(int argc, char **argv)
{
    struct teemate_slot_args args;
    struct teemate_diag diag = {0};
    struct floor floor = {0};
    struct teemate_enclave *sdk;
    double getppid_ns = 0;
    double bare_ns = 0;
    double call_ns = 0;
    int backend;
    int rounds;
    int result;

    if (argc < 5) {
        fprintf(stderr, "usage: call_floor BARE.sgxs BARE.sig SDK.sgxs SDK.sig [ECALL] [ROUNDS] [sim|sgx]\n");
        return 2;
    }
    floor.ecall = argc > 5 ? argv[5] : "empty";
    rounds = argc > 6 ? atoi(argv[6]) : 100;
    backend = argc > 7 && strcmp(argv[7], "sgx") == 0 ? TEEMATE_SGX : TEEMATE_SIM;
    floor.bare = enclave_load(backend, argv[1], argv[2]);
    sdk = enclave_load(backend, argv[3], argv[4]);
    if (teemate_enclave_tcs(floor.bare, &floor.bare_tcs, 1) < 1)
        fail(argv[1], -ENOENT, NULL);
    result = teemate_map_tcs(floor.bare, floor.bare_tcs, &diag);
    if (result == 0)
        result = teemate_private_start(sdk, &diag);
    if (result == 0)
        result = teemate_private_slot(sdk, 0, &args);
    if (result == 0)
        result = teemate_slot_open(sdk, &args, &floor.slot, &diag);
    if (result < 0)
        fail("start", result, &diag);

    for (int i = 0; i < rounds; i++) {
        keep_best(&getppid_ns, round_getppid(&floor));
        keep_best(&bare_ns, round_bare(&floor));
        keep_best(&call_ns, round_call(&floor));
    }
    printf("{\"getppid_ns\": %.1f, \"bare_ns\": %.1f, \"call_ns\": %.1f, \"ratio\": %.2f, \"getppids_more\": %.2f}\n",
           getppid_ns, bare_ns, call_ns, call_ns / bare_ns, (call_ns - bare_ns) / getppid_ns);
    teemate_slot_close(floor.slot);
    teemate_unmap_tcs(floor.bare, floor.bare_tcs);
    teemate_close(sdk);
    teemate_close(floor.bare);
    return 0;
}
