/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TESTS_H
#define TESTS_H

#include "harness.h"

/* Each runs in a process of its own: sim-tests NAME. */
struct test {
    const char *name;
    void (*run)(void);
};
#define TEST(function) {#function, function}
extern const struct test entry_tests[], exception_tests[], signal_tests[], process_tests[], thread_tests[];

/* Words of the blackboard that OP_SPIN and OP_COUNT use. */
#define STOP 16
#define ROUNDS 17
#define COUNTER 18

/* Expect run->function and the vector. */
#define FAULTED(entry, leaf, number)                     \
    do {                                                 \
        struct result f_ = (entry);                      \
        EQUAL(f_.outcome, TEEMATE_LEFT);                 \
        EQUAL(f_.run.function, (leaf));                  \
        EQUAL(f_.run.exception_vector, (number));        \
    } while (0)
#define LEFT(entry)                                      \
    do {                                                 \
        struct result l_ = (entry);                      \
        EQUAL(l_.outcome, TEEMATE_LEFT);                 \
        EQUAL(l_.run.function, SGX_EEXIT);               \
    } while (0)

#define IDLE(cssa) SIM_TCS_WORD(0, cssa, 0)

/* Run in a child of fork, which exits with 0 when `run` comes back. */
int start_child(void (*run)(void *), void *argument);
void child_ends(int pid);

#endif
