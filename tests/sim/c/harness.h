/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HARNESS_H
#define HARNESS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../../native/lib/enclave.h"
#include "../../../native/lib/sgx_enter.h"
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

/* Which backend?  TEEMATE_TEST_BACKEND=sgx, with a SIGSTRUCT for the layout in TEEMATE_TEST_SIGSTRUCT. */
bool on_sgx(void);

/* Of a test about the sim's inner life; `reason` says what hardware has instead. */
#define SIM_ONLY(reason)                              \
    do {                                              \
        if (on_sgx()) {                               \
            printf("skipped: about the sim: %s\n", reason); \
            return;                                   \
        }                                             \
    } while (0)

/*
 * The enclave's memory, past its own mapping: the sim's file, or EDBGRD and EDBGWR (the
 * enclaves of these tests are debug enclaves on sgx).
 */
void memory_read(struct teemate_enclave *enclave, uint64_t offset, void *data, size_t size);
void memory_write(struct teemate_enclave *enclave, uint64_t offset, const void *data, size_t size);

/* A word of the blackboard. */
uint64_t board_get(struct teemate_enclave *enclave, unsigned word);
void board_set(struct teemate_enclave *enclave, unsigned word, uint64_t value);
/* The registers in an SSA frame, and what lies below them. */
struct sgx_gprs frame_get(struct teemate_enclave *enclave, unsigned tcs, unsigned cssa);
void frame_set(struct teemate_enclave *enclave, unsigned tcs, unsigned cssa, const struct sgx_gprs *gprs);
void frame_skip(struct teemate_enclave *enclave, unsigned tcs, unsigned cssa, uint64_t bytes);
struct sgx_exinfo exinfo_get(struct teemate_enclave *enclave, unsigned tcs, unsigned cssa);
#define FRAME_SET(enclave, tcs, cssa, field, value)                 \
    do {                                                            \
        struct sgx_gprs gprs_ = frame_get((enclave), (tcs), (cssa)); \
        gprs_.field = (value);                                      \
        frame_set((enclave), (tcs), (cssa), &gprs_);                \
    } while (0)
/* Busy, CSSA and holder; on sgx CSSA, since nothing else can be read. */
uint64_t tcs_word(struct teemate_enclave *enclave, unsigned tcs);
void tcs_set_flags(struct teemate_enclave *enclave, unsigned tcs, uint64_t flags);
/* No pages on demand (sgx: there are none where no segment is mapped). */
void without_sgx2(struct teemate_enclave *enclave);
/* RCX at entry, and RIP at an asynchronous exit. */
uint64_t behind_enclu(void);
uint64_t aep(void);
/* How often a call pauses at least when a signal's handler ran: on sgx it need not. */
int handler_pauses(void);

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
