/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A signal while the thread is inside: ENCLU, an exception, or the tick.
 *
 * Runs in the signal handler on the thread's own alternate stack.  It arrives with the
 * enclave's FS and GS; they are the host's again before anything else is done.  The
 * changed context is what sigreturn makes of the thread: enclave, AEP or a way out.
 */
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>

#include "enclave.h"
#include "sim_check.h"
#include "sim_enclu.h"
#include "sim_thread.h"

#define ARCH_SET_GS 0x1001
#define ARCH_SET_FS 0x1002
#define ARCH_GET_FS 0x1003
#define ARCH_GET_GS 0x1004

#define RFLAGS_TF 0x100ull
#define RFLAGS_RF 0x10000ull

/* The kernel's signal frame (uapi asm/sigcontext.h). */
#define FP_MAGIC_OFFSET 464u
#define XSTATE_BV_OFFSET 512u
#define MXCSR_OFFSET 24u
#define MXCSR_INIT 0x1f80u

#define ENCLU_LENGTH 3u

static void read_bases(const struct sim_thread *thread, uint64_t *fs, uint64_t *gs)
{
    if (thread->no_fsgsbase) {
        bare_syscall(SYS_arch_prctl, ARCH_GET_FS, (long)fs, 0, 0);
        bare_syscall(SYS_arch_prctl, ARCH_GET_GS, (long)gs, 0, 0);
    } else {
        __asm__ volatile("rdfsbase %0" : "=r"(*fs));
        __asm__ volatile("rdgsbase %0" : "=r"(*gs));
    }
}

static void write_bases(const struct sim_thread *thread, uint64_t fs, uint64_t gs)
{
    if (thread->no_fsgsbase) {
        bare_syscall(SYS_arch_prctl, ARCH_SET_FS, (long)fs, 0, 0);
        bare_syscall(SYS_arch_prctl, ARCH_SET_GS, (long)gs, 0, 0);
    } else {
        __asm__ volatile("wrfsbase %0" : : "r"(fs));
        __asm__ volatile("wrgsbase %0" : : "r"(gs));
    }
}

/* Leave enclave mode for `rip` of the host. */
static void leave(struct sim_thread *thread, ucontext_t *uc, uint64_t rip)
{
    atomic_store_explicit(&thread->inside, 0, memory_order_relaxed);
    thread_outside(thread->owner);
    uc->uc_mcontext.gregs[REG_RIP] = (greg_t)rip;
    uc->uc_mcontext.gregs[REG_EFL] &= ~(greg_t)RFLAGS_TF;
    uc->uc_mcontext.gregs[REG_EFL] |= thread->host_tf;
    memcpy(&uc->uc_sigmask, &thread->host.mask, sizeof(thread->host.mask));
    uc->uc_stack = thread->host.stack;
    thread->handling = 0;
}

/* Something that no processor does: another process changed the word of a busy TCS. */
static void leave_lost(struct sim_thread *thread, ucontext_t *uc)
{
    greg_t *regs = uc->uc_mcontext.gregs;

    regs[REG_RAX] = SGX_ERESUME;
    regs[REG_RDI] = SGX_VECTOR_GP;
    regs[REG_RSI] = 0;
    regs[REG_RDX] = 0;
    regs[REG_RSP] = (greg_t)thread->entry->rsp;
    regs[REG_RBP] = (greg_t)thread->entry->rbp;
    leave(thread, uc, (uint64_t)(uintptr_t)sim_exception);
}

static bool opted_in(const struct sim_thread *thread)
{
    return thread->enclave->info.attributes & SGX_ATTR_DEBUG && thread->tcs->flags & SGX_TCS_DBGOPTIN;
}

static uint32_t exitinfo(const struct sim_thread *thread, uint32_t vector)
{
    switch (vector) {
    case SGX_VECTOR_GP:
    case SGX_VECTOR_PF:
        if (SIM_CHECK("AEX.EXITINFO.EXINFO", !(thread->enclave->info.miscselect & SGX_MISC_EXINFO)))
            return 0;
        return vector | SGX_EXITINFO_HARDWARE | SGX_EXITINFO_VALID;
    case SGX_VECTOR_BP:
        return vector | SGX_EXITINFO_SOFTWARE | SGX_EXITINFO_VALID;
    case SGX_VECTOR_DB:
        return vector | SGX_EXITINFO_HARDWARE | SGX_EXITINFO_VALID;
    case SGX_VECTOR_DE:
    case SGX_VECTOR_BR:
    case SGX_VECTOR_UD:
    case SGX_VECTOR_MF:
    case SGX_VECTOR_AC:
    case SGX_VECTOR_XM:
        return SIM_STEP("AEX.EXITINFO") ? vector | SGX_EXITINFO_HARDWARE | SGX_EXITINFO_VALID : 0;
    default:
        return 0;
    }
}

/* Save the XSAVE components of XFRM and give the host initial ones. */
static void swap_xsave(struct sim_thread *thread, ucontext_t *uc)
{
    uint8_t *area = (uint8_t *)uc->uc_mcontext.fpregs;
    bool extended = area && *(uint32_t *)(area + FP_MAGIC_OFFSET) == FP_XSTATE_MAGIC1;

    if (!area)
        return;
    sim_xsave_copy(thread->ssa, area, extended ? thread->xfrm : SGX_XFRM_LEGACY);
    if (!extended)
        *(uint64_t *)(thread->ssa + XSTATE_BV_OFFSET) = SGX_XFRM_LEGACY;
    if (SIM_STEP("AEX.XSAVE.INIT")) {
        *(uint32_t *)(area + MXCSR_OFFSET) = MXCSR_INIT;
        if (extended)
            *(uint64_t *)(area + XSTATE_BV_OFFSET) &= ~thread->xfrm;
    }
}

struct event {
    bool exception; /* else an interrupt */
    uint32_t vector;
    uint32_t error;
    uint64_t addr;
};

/* Of the instruction that ends at `rip`: INT3, or INT 3 in two bytes. */
static uint64_t breakpoint_length(const struct sim_thread *thread, uint64_t rip)
{
    const uint8_t *code;

    if (!sim_in_elrange(thread->enclave, rip - 2, 2))
        return 1;
    code = sim_at(thread->enclave, rip - 2);
    return code[0] == 0xcd && code[1] == 3 ? 2 : 1;
}

/* SDM volume 3D, "Asynchronous Enclave Exits": SSA[CSSA], then the TCS, then the synthetic state. */
static bool aex(struct sim_thread *thread, ucontext_t *uc, const struct event *event, uint64_t fs, uint64_t gs)
{
    greg_t *regs = uc->uc_mcontext.gregs;
    struct sgx_gprs *saved = (struct sgx_gprs *)(thread->ssa + thread->ssa_size - sizeof(*saved));
    struct sgx_exinfo *exinfo = (struct sgx_exinfo *)saved - 1;
    uint64_t ursp = saved->ursp, urbp = saved->urbp;
    uint64_t flags = (uint64_t)regs[REG_EFL], rip = (uint64_t)regs[REG_RIP];

    if (event->exception && event->vector != SGX_VECTOR_BP && event->vector != SGX_VECTOR_DB)
        flags |= RFLAGS_RF;
    /* INT3 is a fault, with RIP at it, unless a debugger opted in (SDM, "INT3 Treatment"). */
    if (event->exception && event->vector == SGX_VECTOR_BP && !opted_in(thread) && SIM_STEP("AEX.BP"))
        rip -= breakpoint_length(thread, rip);
    *saved = (struct sgx_gprs){
        .rax = (uint64_t)regs[REG_RAX], .rcx = (uint64_t)regs[REG_RCX], .rdx = (uint64_t)regs[REG_RDX],
        .rbx = (uint64_t)regs[REG_RBX], .rsp = (uint64_t)regs[REG_RSP], .rbp = (uint64_t)regs[REG_RBP],
        .rsi = (uint64_t)regs[REG_RSI], .rdi = (uint64_t)regs[REG_RDI], .r8 = (uint64_t)regs[REG_R8],
        .r9 = (uint64_t)regs[REG_R9], .r10 = (uint64_t)regs[REG_R10], .r11 = (uint64_t)regs[REG_R11],
        .r12 = (uint64_t)regs[REG_R12], .r13 = (uint64_t)regs[REG_R13], .r14 = (uint64_t)regs[REG_R14],
        .r15 = (uint64_t)regs[REG_R15], .rflags = flags, .rip = rip, .ursp = ursp, .urbp = urbp,
        .exitinfo = event->exception ? exitinfo(thread, event->vector)
                    : SIM_STEP("AEX.EXITINFO.EVENT") ? 0
                                                     : SGX_EXITINFO_VALID, .fsbase = fs, .gsbase = gs,
    };
    if (saved->exitinfo && (event->vector == SGX_VECTOR_PF || event->vector == SGX_VECTOR_GP) && SIM_STEP("AEX.EXINFO"))
        *exinfo = (struct sgx_exinfo){.maddr = event->vector == SGX_VECTOR_PF ? event->addr : 0,
                                      .errcd = event->error};
    swap_xsave(thread, uc);

    if (!atomic_compare_exchange_strong(&thread->tcs->word, &thread->word, SIM_TCS_WORD(0, thread->cssa + 1, 0))) {
        leave_lost(thread, uc);
        return false;
    }
    if (SIM_STEP("AEX.SYNTHETIC"))
        for (int i = REG_R8; i <= REG_RCX; i++)
            if (i != REG_RSP)
                regs[i] = 0;
    regs[REG_EFL] &= ~(greg_t)(RFLAGS_RF | 0xcd5); /* arithmetic flags and DF */
    regs[REG_RAX] = SGX_ERESUME;
    regs[REG_RBX] = (greg_t)thread->tcs_addr;
    regs[REG_RCX] = (greg_t)(uintptr_t)sim_aep;
    regs[REG_RSP] = (greg_t)ursp;
    regs[REG_RBP] = (greg_t)urbp;
    return true;
}

/* An exception that the kernel hands to the vDSO function. */
static void raise_fault(struct sim_thread *thread, ucontext_t *uc, struct event event, uint64_t fs, uint64_t gs)
{
    greg_t *regs = uc->uc_mcontext.gregs;

    event.exception = true;
    if (!aex(thread, uc, &event, fs, gs))
        return;
    if (event.vector == SGX_VECTOR_PF && SIM_STEP("AEX.CR2"))
        event.addr &= ~(uint64_t)(SGX_PAGE - 1);
    regs[REG_RDI] = event.vector;
    regs[REG_RSI] = event.error;
    regs[REG_RDX] = event.vector == SGX_VECTOR_PF ? (greg_t)event.addr : 0;
    leave(thread, uc, (uint64_t)(uintptr_t)sim_exception);
}

/* Have the host receive this signal at the AEP, on its own stack. */
static void send_again(const struct sim_thread *thread, int sig, siginfo_t *info)
{
    uint64_t mask = SIGNAL_MASK(sig);

    /* Not right here; sigreturn opens it again. */
    bare_syscall(SYS_rt_sigprocmask, SIG_BLOCK, (long)&mask, 0, 8);
    bare_syscall(SYS_rt_tgsigqueueinfo, bare_syscall(SYS_getpid, 0, 0, 0, 0), thread->tid, sig, (long)info);
}

static void eexit(struct sim_thread *thread, ucontext_t *uc, uint64_t fs, uint64_t gs)
{
    greg_t *regs = uc->uc_mcontext.gregs;
    uint64_t target = (uint64_t)regs[REG_RBX];

    if (SIM_CHECK("EEXIT.CANONICAL", !sim_canonical(target))) {
        raise_fault(thread, uc, (struct event){.vector = SGX_VECTOR_GP}, fs, gs);
        return;
    }
    if (!atomic_compare_exchange_strong(&thread->tcs->word, &thread->word, SIM_TCS_WORD(0, thread->cssa, 0))) {
        leave_lost(thread, uc);
        return;
    }
    if (SIM_STEP("EEXIT.RCX"))
        regs[REG_RCX] = (greg_t)(uintptr_t)sim_aep;
    /*
     * A call that was paused or interrupted and resumed from elsewhere comes back with the
     * stack of its EENTER, which is long gone, if its enclave keeps RBP and RSP in registers.
     * To our own code it returns on the stack that is there: a signal could arrive before the
     * first instruction.  The SDK's come with those of their last ERESUME (native/sdk/entry.S), also
     * to the landing page: on hardware nobody else sees to it.
     */
    if (target == (uint64_t)(uintptr_t)sim_exit && (uint64_t)regs[REG_RBP] != thread->entry->rbp) {
        regs[REG_RBP] = (greg_t)thread->entry->rbp;
        regs[REG_RSP] = (greg_t)thread->entry->rsp;
    }
    leave(thread, uc, target);
}

static void enclu(struct sim_thread *thread, ucontext_t *uc, uint64_t fs, uint64_t gs)
{
    greg_t *regs = uc->uc_mcontext.gregs;
    struct sim_leaf_regs leaf;
    struct sim_fault fault = {0};

    switch ((uint32_t)regs[REG_RAX]) {
    case SGX_EEXIT:
        eexit(thread, uc, fs, gs);
        return;
    case SGX_EENTER:
    case SGX_ERESUME:
        raise_fault(thread, uc, (struct event){.vector = SGX_VECTOR_GP}, fs, gs);
        return;
    default:
        break;
    }
    leaf = (struct sim_leaf_regs){.rax = (uint64_t)regs[REG_RAX], .rbx = (uint64_t)regs[REG_RBX],
                                  .rcx = (uint64_t)regs[REG_RCX], .rdx = (uint64_t)regs[REG_RDX],
                                  .rflags = (uint64_t)regs[REG_EFL]};
    if (sim_enclu(thread->enclave, &leaf, &fault)) {
        raise_fault(thread, uc, (struct event){.vector = fault.vector, .error = fault.error, .addr = fault.addr}, fs,
                    gs);
        return;
    }
    regs[REG_RAX] = (greg_t)leaf.rax;
    regs[REG_RBX] = (greg_t)leaf.rbx;
    regs[REG_RCX] = (greg_t)leaf.rcx;
    regs[REG_RDX] = (greg_t)leaf.rdx;
    regs[REG_EFL] = (greg_t)leaf.rflags;
    regs[REG_RIP] += ENCLU_LENGTH;
    thread->handling = 0;
    write_bases(thread, fs, gs);
}

/*
 * 0F 01 D7?  A processor without SGX says #UD there, one with it #GP, or #PF for an EENTER
 * whose operand is no EPC page.  Read through the view, wherever that is code.
 */
static bool at_enclu(const struct sim_thread *thread, uint64_t rip)
{
    const uint8_t *code;

    if (!sim_in_elrange(thread->enclave, rip, ENCLU_LENGTH))
        return false;
    code = sim_at(thread->enclave, rip);
    return code[0] == 0x0f && code[1] == 0x01 && code[2] == 0xd7;
}

static void page_fault(struct sim_thread *thread, ucontext_t *uc, uint64_t fs, uint64_t gs)
{
    greg_t *regs = uc->uc_mcontext.gregs;
    uint64_t addr = (uint64_t)regs[REG_CR2];
    uint32_t error = (uint32_t)regs[REG_ERR];
    struct sim_fault fault = {0};

    /* Enclave mode fetches no instruction from outside of ELRANGE (SDM, "Access-control Requirements"). */
    if (error & SGX_PF_I && !sim_in_elrange(thread->enclave, addr, 1) && SIM_STEP("AEX.FETCH")) {
        raise_fault(thread, uc, (struct event){.vector = SGX_VECTOR_GP}, fs, gs);
        return;
    }
    if (!sim_page_fault(thread->enclave, addr, error, &fault)) {
        thread->handling = 0;
        write_bases(thread, fs, gs);
        return;
    }
    raise_fault(thread, uc, (struct event){.vector = fault.vector, .error = fault.error, .addr = fault.addr}, fs, gs);
}

static bool is_pending(const struct sim_thread *thread)
{
    uint64_t pending = 0;

    bare_syscall(SYS_rt_sigpending, (long)&pending, 8, 0, 0);
    return pending & ~thread->host.mask & ~SIGNAL_MASK(signals_tick());
}

static bool is_over(const struct entry *entry)
{
    struct timespec now;

    if (!entry->pause_after_ns)
        return false;
    clock_gettime(CLOCK_MONOTONIC, &now); /* the vDSO's, without a lock or TLS */
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec - entry->started_ns >= entry->pause_after_ns;
}

static void tick(struct sim_thread *thread, ucontext_t *uc, uint64_t fs, uint64_t gs)
{
    bool pause = is_pending(thread) || is_over(thread->entry);

    if (aex(thread, uc, &(struct event){.exception = false}, fs, gs))
        leave(thread, uc, (uint64_t)(uintptr_t)(pause ? sim_paused : sim_aep));
}

void sim_inside(struct sim_thread *thread, int sig, siginfo_t *info, void *context)
{
    ucontext_t *uc = context;
    greg_t *regs = uc->uc_mcontext.gregs;
    uint32_t vector = (uint32_t)regs[REG_TRAPNO];
    uint64_t fs, gs;

    thread->handling = 1;
    read_bases(thread, &fs, &gs);
    write_bases(thread, thread->host_fs, thread->host_gs);

    if (sig == signals_tick()) {
        tick(thread, uc, fs, gs);
        return;
    }
    if (info->si_code <= 0) {
        /* kill() or the like: no exception, but the host's business at the AEP. */
        send_again(thread, sig, info);
        if (aex(thread, uc, &(struct event){.exception = false}, fs, gs))
            leave(thread, uc, (uint64_t)(uintptr_t)sim_paused);
        return;
    }
    if (sig == SIGTRAP || (sig == SIGBUS && (info->si_code == BUS_MCEERR_AR || info->si_code == BUS_MCEERR_AO))) {
        /* The vDSO function never sees #DB, #BP and machine checks: signals at the AEP. */
        struct event event = {.exception = sig == SIGTRAP, .vector = vector};

        send_again(thread, sig, info);
        /* An enclave that traps in a loop is never inside for long enough to be ticked. */
        if (aex(thread, uc, &event, fs, gs))
            leave(thread, uc, (uint64_t)(uintptr_t)(is_over(thread->entry) ? sim_paused : sim_aep));
        return;
    }
    /*
     * An AEX leaves x87 and SSE in their initial state, in which the kernel finds no reason for
     * #MF or #XM: it takes them for spurious and tells nobody (Linux, traps.c, math_error).
     * The instruction runs again, and so on, until the call is paused.
     */
    if ((vector == SGX_VECTOR_MF || vector == SGX_VECTOR_XM) && SIM_STEP("AEX.MATH")) {
        bool pause = is_pending(thread) || is_over(thread->entry);

        if (aex(thread, uc, &(struct event){.exception = true, .vector = vector}, fs, gs))
            leave(thread, uc, (uint64_t)(uintptr_t)(pause ? sim_paused : sim_aep));
        return;
    }
    if ((sig == SIGILL || (sig == SIGSEGV && !(vector == SGX_VECTOR_PF && regs[REG_ERR] & SGX_PF_I))) &&
        at_enclu(thread, (uint64_t)regs[REG_RIP])) {
        enclu(thread, uc, fs, gs);
        return;
    }
    if (sig == SIGSEGV && vector == SGX_VECTOR_PF) {
        page_fault(thread, uc, fs, gs);
        return;
    }
    raise_fault(thread, uc,
                (struct event){.vector = vector, .error = (uint32_t)regs[REG_ERR], .addr = (uint64_t)regs[REG_CR2]},
                fs, gs);
}
