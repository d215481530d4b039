/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Entries on the sgx backend: the vDSO's function does them, and this makes calls of them
 * that can be paused.
 *
 * The vDSO's AEP is an ENCLU that resumes by itself, so a call never comes back because
 * of a signal.  Handlers run there, on the host's stack, with nothing blocked.  The ticker
 * ticks a thread that stays; the handler finds RIP at that ENCLU, with RAX the leaf that it
 * is about to execute, and lets the thread go on at sgx_recovered: the call is paused.
 * Whether a handler of the host's ran meanwhile cannot be known (it may have run in
 * another thread), so every tick does that and the caller looks for itself.
 */
#include "sgx_enter.h"

#include <errno.h>

/* Ticks until a thread that cannot even begin (the kernel gets no EPC page for it) is let go. */
#define WAITING_TICKS 20u

typedef int (*user_handler)(long rdi, long rsi, long rdx, long rsp, long r8, long r9, struct sgx_enclave_run *run);

static uint64_t our_handler(void)
{
    return (uint64_t)(uintptr_t)sgx_user_handler;
}

static void go_inside(struct entry *entry)
{
    entry->kept = 0;
    entry->waiting = 0;
    entry->inside = 1;
    thread_inside(entry->thread);
}

static void go_outside(struct entry *entry)
{
    entry->inside = 0;
    thread_outside(entry->thread);
}

/* ---- in signal handlers ------------------------------------------------------------ */

/* Did the signal interrupt the enclave, or the ENCLU before it, of this thread's last entry? */
static struct entry *interrupted(const ucontext_t *uc)
{
    const greg_t *regs = uc->uc_mcontext.gregs;
    struct entry *entry = entry_current;

    /* RIP first: elsewhere the entry may have been left by longjmp(), and its stack be gone. */
    if ((uint64_t)regs[REG_RIP] != sgx_vdso_enclu() || !entry || !entry->inside ||
        (uint64_t)regs[REG_RBP] != entry->frame)
        return NULL;
    return entry;
}

static void recover(ucontext_t *uc, int result)
{
    uc->uc_mcontext.gregs[REG_RAX] = result;
    uc->uc_mcontext.gregs[REG_RIP] = (greg_t)(uintptr_t)sgx_recovered;
}

void sgx_on_tick(ucontext_t *uc)
{
    struct entry *entry = interrupted(uc);
    uint32_t leaf = (uint32_t)uc->uc_mcontext.gregs[REG_RAX];

    if (!entry) {
        /* In another handler, or half-way: the ticker comes again. */
        struct thread *thread = thread_get();

        if (thread)
            atomic_fetch_add_explicit(&thread->astray, 1, memory_order_relaxed);
        return;
    }
    atomic_store_explicit(&entry->thread->astray, 0, memory_order_relaxed);
    if (leaf == SGX_EENTER && ++entry->waiting < WAITING_TICKS)
        return;
    entry->run->function = leaf;
    recover(uc, TEEMATE_PAUSED);
}

bool sgx_on_memory_error(const siginfo_t *info, ucontext_t *uc)
{
    struct entry *entry = interrupted(uc);
    struct sgx_enclave_run *run;

    if (!entry)
        return false;
    run = entry->run;
    run->function = (uint32_t)uc->uc_mcontext.gregs[REG_RAX];
    run->exception_vector = SGX_VECTOR_MC;
    run->exception_error_code = 0;
    run->exception_addr = (uint64_t)(uintptr_t)info->si_addr;
    recover(uc, TEEMATE_LEFT);
    return true;
}

/*
 * Programs block all signals in their worker threads.  A tick that is blocked would pause
 * nobody, and be queued each time (the queue is limited for all processes of a user).
 * Returns whether it was blocked.
 */
static bool tick_unblock(void)
{
    const uint64_t tick = SIGNAL_MASK(signals_tick());
    uint64_t before = 0;

    bare_syscall(SYS_rt_sigprocmask, SIG_UNBLOCK, (long)&tick, (long)&before, sizeof(before));
    return before & tick;
}

static void tick_block(void)
{
    const uint64_t tick = SIGNAL_MASK(signals_tick());

    bare_syscall(SYS_rt_sigprocmask, SIG_BLOCK, (long)&tick, 0, sizeof(tick));
}

/* ---- entries ----------------------------------------------------------------------- */

int sgx_run_handler(struct entry *entry, uint64_t rsp)
{
    struct sgx_enclave_run *run = entry->run;
    const struct teemate_regs *regs = entry->regs;
    int result;

    go_outside(entry);
    entry->kept = 1;
    run->user_handler = entry->handler;
    result = ((user_handler)(uintptr_t)entry->handler)((long)regs->rdi, (long)regs->rsi, (long)regs->rdx, (long)rsp,
                                                       (long)regs->r8, (long)regs->r9, run);
    entry_current = entry; /* again: an entry inside of it may have been left by longjmp */
    entry->handler = run->user_handler;
    if (result > 0) {
        if (entry->handler)
            run->user_handler = our_handler();
        go_inside(entry);
    }
    return result;
}

int sgx_enter(struct teemate_enclave *enclave, uint64_t tcs_offset, struct teemate_regs *regs, uint32_t function,
              uint64_t pause_after_ns, enum entry_stack on, struct sgx_enclave_run *run)
{
    struct thread *thread = thread_get();
    struct sgx_stack *stack = NULL;
    struct entry entry = {.regs = regs,
                          .run = run,
                          .target = (uint64_t)(uintptr_t)sgx_vdso_function(),
                          .function = function,
                          .landing = sgx_landed,
                          .enclave = enclave,
                          .thread = thread,
                          .outer = entry_current,
                          .handler = run->user_handler};
    bool blocked;
    int result;

    (void)pause_after_ns; /* every tick pauses */
    if (!entry.target)
        return -ENODEV;
    if (!thread)
        return -ENOMEM;
    result = signals_install(SIGNALS_SGX);
    if (!result)
        result = ticker_start();
    if (result)
        return result;
    if (on == ENTRY_STACK_TCS) {
        stack = sgx_stack_take(enclave, tcs_offset, function);
        if (!stack)
            return -ENOMEM;
        entry.stack = stack->top;
    }
    if (entry.handler)
        run->user_handler = our_handler();
    blocked = tick_unblock();
    entry_current = &entry;
    go_inside(&entry);
    result = sgx_trampoline(&entry);
    go_outside(&entry);
    entry_current = entry.outer;
    if (blocked)
        tick_block();
    if (run->user_handler == our_handler())
        run->user_handler = entry.handler;
    if (stack)
        sgx_stack_give(stack, result == TEEMATE_PAUSED || (result == TEEMATE_LEFT && run->function == SGX_ERESUME));
    return result;
}
