/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HARNESS_H
#define HARNESS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../../native/lib/enclave.h"
#include "../../../native/lib/sim.h"
#include "../../../native/lib/sim_thread.h"
#include "enclave.h"

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            abort_test();                                                             \
        }                                                                             \
    } while (0)
#define EQUAL(a, b)                                                                                            \
    do {                                                                                                       \
        uint64_t a_ = (uint64_t)(a), b_ = (uint64_t)(b);                                                       \
        if (a_ != b_) {                                                                                        \
            fprintf(stderr, "%s:%d: %s is %#llx, %s is %#llx\n", __FILE__, __LINE__, #a, (unsigned long long)a_, \
                    #b, (unsigned long long)b_);                                                               \
            abort_test();                                                                                      \
        }                                                                                                      \
    } while (0)

_Noreturn void abort_test(void);

struct options {
    uint64_t xfrm;
    uint32_t miscselect;
    uint64_t attributes;
    uint64_t base; /* 0: BASE */
};

/* Built through the backend's calls; EINIT's signature check is another test's. */
struct teemate_enclave *test_enclave(const struct options *options);
/* The same, mapped with all its TCSs. */
struct teemate_enclave *test_enclave_mapped(const struct options *options);
/* What another process makes of the fd. */
struct teemate_enclave *test_enclave_from_fd(int fd, bool map);

static inline uint64_t tcs_of(unsigned n)
{
    return TCS + n * 4096ull;
}

/* The blackboard as the process sees the file: not through the enclave's mapping. */
uint64_t *board(struct teemate_enclave *enclave);
struct sgx_gprs *frame(struct teemate_enclave *enclave, unsigned tcs, unsigned cssa);
uint64_t tcs_word(struct teemate_enclave *enclave, unsigned tcs);

struct result {
    int outcome;
    struct teemate_regs regs;
    struct sgx_enclave_run run;
};
struct result enter(struct teemate_enclave *enclave, unsigned tcs, uint64_t rdi, uint64_t rsi, uint64_t rdx);
/* EENTER, and ERESUME as often as it was paused. */
struct result call(struct teemate_enclave *enclave, unsigned tcs, uint64_t rdi, uint64_t rsi, uint64_t rdx);
struct result resume(struct teemate_enclave *enclave, unsigned tcs);

#endif
