/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include "enclave.h"
#include "sgx_enter.h"
#include "sim_thread.h"
#include "thread.h"

int enclave_enter(struct teemate_enclave *enclave, uint64_t tcs_offset, struct teemate_regs *regs, uint32_t function,
                  uint64_t pause_after_ns, enum entry_stack stack, struct sgx_enclave_run *run)
{
    struct thread *thread = thread_get();
    bool outer = thread && atomic_load_explicit(&thread->tick_state, memory_order_relaxed) != TICK_OUTSIDE;
    int result;

    if (!enclave_is_ours(enclave)) {
        result = -ENOTCONN;
    } else if (!enclave->mapped) {
        result = -EINVAL;
    } else {
        run->tcs = enclave->base + tcs_offset;
        run->function = function;
        result = enclave->backend->enter(enclave, tcs_offset, regs, function, pause_after_ns, stack, run);
        /* Back in a signal handler that interrupted an sgx entry: that one is ticked again. */
        if (outer)
            thread_inside(thread);
    }
    /* The key does not outlive the entry, also one that was refused. */
    *(volatile uint64_t *)&regs->r12 = 0;
    *(volatile uint64_t *)&regs->r13 = 0;
    return result;
}

int teemate_enter(struct teemate_enclave *enclave, uint64_t tcs_offset, struct teemate_regs *regs, uint32_t function,
                  uint64_t pause_after_ns, struct sgx_enclave_run *run)
{
    return enclave_enter(enclave, tcs_offset, regs, function, pause_after_ns, ENTRY_STACK_TCS, run);
}

void teemate_prepare(void)
{
    bool sgx = sgx_vdso_function() != NULL;

    /* Where enclaves may be the driver's, the sim's signals are taken by its first entry. */
    if ((sgx ? (void *)thread_get() : (void *)sim_thread_get()) &&
        signals_install(sgx ? SIGNALS_SGX : SIGNALS_SIM) == 0)
        ticker_start();
}
