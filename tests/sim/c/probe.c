/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loaded into other runtimes: enters an enclave, faults in it, is ticked in it, and prints
 * "probe: entered" when all of that was as it should be.  PROBE_ROUNDS says how often.
 */
#include <unistd.h>

#include "tests.h"

static struct teemate_enclave *enclave;

int probe_enter(int rounds)
{
    static uint8_t stack[65536]; /* for signals that come at the landing page */

    if (!enclave)
        enclave = test_enclave_mapped(NULL);
    for (int i = 0; i < rounds; i++) {
        struct result r = call(enclave, 0, OP_COUNT, 1, 10);

        LEFT(r);
        FAULTED(call(enclave, 0, OP_READ, 8, 0), SGX_ERESUME, SGX_VECTOR_PF);
        frame_set(enclave, 0, 0, &(struct sgx_gprs){
            .rip = BASE + ENTRY, .rdi = OP_LANDING, .rsp = (uint64_t)(uintptr_t)(stack + sizeof(stack)),
            .fsbase = BASE + FSPAGE, .gsbase = BASE + GSPAGE});
        EQUAL(resume(enclave, 0).outcome, TEEMATE_LANDED);
        FAULTED(call(enclave, 1, OP_DIVIDE, 0, 0), SGX_ERESUME, SGX_VECTOR_DE);
        frame_skip(enclave, 1, 0, 3);
        do
            r = resume(enclave, 1);
        while (r.outcome == TEEMATE_PAUSED);
        LEFT(r);
    }
    if (rounds > 1)
        LEFT(call(enclave, 0, OP_COUNT, 1, 5000000)); /* long enough for a tick */
    return 0;
}

/* Until a signal's handler calls probe_stop(); how often was the call paused? */
int probe_spin(void)
{
    struct result r;
    int pauses = 0;

    if (!enclave)
        enclave = test_enclave_mapped(NULL);
    board_set(enclave, STOP, 0);
    r = enter(enclave, 0, OP_SPIN, 0, 0);
    while (r.outcome == TEEMATE_PAUSED) {
        pauses++;
        r = resume(enclave, 0);
    }
    LEFT(r);
    return pauses;
}

/* Until the first pause, which is what a binding does for its language's handlers. */
int probe_pause(void)
{
    if (!enclave)
        enclave = test_enclave_mapped(NULL);
    board_set(enclave, STOP, 0);
    return enter(enclave, 2, OP_SPIN, 0, 0).outcome;
}

int probe_resume(void)
{
    return resume(enclave, 2).outcome;
}

void probe_stop(void)
{
    board_set(enclave, STOP, 1);
}

/* Has a thread come to where OP_SPIN loops since probe_forget()? */
int probe_spins(void)
{
    return board_get(enclave, ROUNDS) != 0;
}

void probe_forget(void)
{
    board_set(enclave, ROUNDS, 0);
}

__attribute__((constructor)) static void probe(void)
{
    const char *rounds = getenv("PROBE_ROUNDS");
    static const char text[] = "probe: entered\n";

    if (!rounds)
        return;
    probe_enter(atoi(rounds));
    if (write(1, text, sizeof(text) - 1) != (ssize_t)sizeof(text) - 1)
        abort_test();
}
