/* SPDX-License-Identifier: Apache-2.0 */
/*
 * EENTER and ERESUME: the checks in the order of the SDM's pseudo-code (volume 3D), then
 * one compare-and-swap on the TCS word.  sim_entry.S does what follows it.
 */
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>

#include "enclave.h"
#include "sim_check.h"
#include "sim_enclu.h"
#include "sim_thread.h"

#define CHECK_OFFSET(struct_, field, number) _Static_assert(offsetof(struct struct_, field) == (number), #field)
CHECK_OFFSET(sim_thread, inside, THREAD_INSIDE);
CHECK_OFFSET(sim_thread, no_fsgsbase, THREAD_NO_FSGSBASE);
CHECK_OFFSET(sim_thread, enclave_fs, THREAD_FS);
CHECK_OFFSET(sim_thread, enclave_gs, THREAD_GS);
CHECK_OFFSET(sim_thread, tcs_addr, THREAD_TCS);
CHECK_OFFSET(sim_thread, cssa, THREAD_CSSA);
CHECK_OFFSET(sim_thread, xfrm, THREAD_XFRM);
CHECK_OFFSET(sim_thread, xsave, THREAD_XSAVE);
CHECK_OFFSET(sim_thread, frame, THREAD_FRAME);
CHECK_OFFSET(sim_thread, gprs, THREAD_GPRS);

#ifndef SS_AUTODISARM
#define SS_AUTODISARM (1u << 31) /* uapi linux/signal.h, which libc's headers do not go with */
#endif
#define RFLAGS_FIXED 0x202u /* bit 1 and IF */
#define RFLAGS_TF 0x100u
/* CF PF AF ZF SF DF OF RF AC ID and TF: what ERESUME loads (SDM, ERESUME). */
#define RFLAGS_RESUMED (0x250cd5u | RFLAGS_TF)
#define MXCSR_RESERVED 0xffff0000u

/* While inside: everything waits but the synchronous signals and the tick. */
static uint64_t inside_mask(void)
{
    return ~(SIGNAL_MASK(SIGILL) | SIGNAL_MASK(SIGSEGV) | SIGNAL_MASK(SIGFPE) | SIGNAL_MASK(SIGBUS) | SIGNAL_MASK(SIGTRAP) |
             SIGNAL_MASK(signals_tick()));
}

bool sim_canonical(uint64_t address)
{
    return (uint64_t)((int64_t)(address << 16) >> 16) == address;
}

static uint64_t xcr0(void)
{
    uint32_t a, d;

    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t)d << 32 | a;
}

static bool fault_gp(struct sim_fault *fault)
{
    sim_gp(fault);
    return false;
}

static bool fault_pf(struct sim_fault *fault, uint32_t error, uint64_t addr)
{
    *fault = (struct sim_fault){.vector = SGX_VECTOR_PF, .error = error, .addr = addr};
    return false;
}

/*
 * The TCS that RBX names, or NULL with the fault.  Branches without an id cannot be reached
 * from user mode; tests/conformance/table tells why.
 */
static struct sim_tcs *find_tcs(struct teemate_enclave *enclave, uint64_t addr, struct sim_fault *fault)
{
    struct sim_mapping *sim = enclave->sim;
    uint64_t offset = addr - enclave->base, entry;
    bool is_tcs, was_tcs;
    uint32_t index;

    if (SIM_CHECK("EENTER.TCS.ALIGN", addr & (SGX_PAGE - 1))) {
        fault_gp(fault);
        return NULL;
    }
    if (offset >= enclave->size) {
        fault_pf(fault, SGX_PF_W | SGX_PF_U, addr);
        return NULL;
    }
    entry = atomic_load(&sim->epcm[offset / SGX_PAGE]);
    index = SIM_EPCM_TCS(entry);
    is_tcs = entry & SIM_EPCM_VALID && SIM_EPCM_TYPE(entry) == SGX_PT_TCS;
    was_tcs = entry & SIM_EPCM_VALID && SIM_EPCM_TYPE(entry) == SGX_PT_TRIM;
    /* The page table's say comes first: this process did not map the page. */
    if ((is_tcs || was_tcs) && SIM_CHECK("EENTER.TCS.MAPPED", !sim_tcs_is_mapped(enclave, offset, index))) {
        fault_pf(fault, SGX_PF_W | SGX_PF_U, addr);
        return NULL;
    }
    /* Of other pages as well, and one that is not there is added. */
    if (SIM_CHECK("EENTER.TCS.TYPE", !is_tcs)) {
        if (sim_access(enclave, addr, SGX_PAGE, SGX_PF_W, fault))
            fault_pf(fault, SGX_PF_SGX | SGX_PF_P | SGX_PF_U, addr);
        return NULL;
    }
    if (index >= SIM_TCS_MAX || entry & SIM_EPCM_PENDING ||
        SIM_CHECK("EENTER.TCS.MODIFIED", entry & SIM_EPCM_MODIFIED)) {
        fault_pf(fault, SGX_PF_SGX | SGX_PF_P | SGX_PF_U, addr);
        return NULL;
    }
    return &sim->tcs[index];
}

/* Where frame `index` lies; every page of it must be readable and writable. */
static uint8_t *find_frame(struct teemate_enclave *enclave, const struct sim_tcs *tcs, uint32_t index,
                           struct sim_fault *fault)
{
    uint64_t size = (uint64_t)enclave->info.ssa_frame_pages * SGX_PAGE;
    uint64_t addr = enclave->base + tcs->ossa + index * size;

    /* By count, not by end: OSSA is anything when somebody scribbled over the table. */
    for (uint64_t at = 0; at < size; at += SGX_PAGE)
        if (!sim_access(enclave, addr + at, SGX_PAGE, SGX_PF_W, fault) && SIM_STEP("EENTER.SSA"))
            return NULL;
    return sim_at(enclave, addr);
}

static struct sgx_gprs *frame_gprs(const struct sim_thread *thread)
{
    return (struct sgx_gprs *)(thread->ssa + thread->ssa_size - sizeof(struct sgx_gprs));
}

/* What EENTER and ERESUME check alike. */
static bool enter_checks(struct teemate_enclave *enclave, struct sim_thread *thread, struct entry *entry,
                         struct sim_fault *fault)
{
    const struct sim_header *header = enclave->sim->header;

    thread->tcs = find_tcs(enclave, entry->run->tcs, fault);
    if (!thread->tcs)
        return false;
    if (SIM_CHECK("EENTER.OSSA", thread->tcs->ossa & (SGX_PAGE - 1)))
        return fault_gp(fault);
    if (SIM_CHECK("EENTER.OFSBASE", thread->tcs->ofsbase & (SGX_PAGE - 1)))
        return fault_gp(fault);
    if (SIM_CHECK("EENTER.OGSBASE", thread->tcs->ogsbase & (SGX_PAGE - 1)))
        return fault_gp(fault);
    if (!(header->attributes.flags & SGX_ATTR_INIT) || enclave->info.xfrm & ~xcr0())
        return fault_gp(fault);
    thread->word = atomic_load(&thread->tcs->word);
    if (SIM_CHECK("EENTER.TCS.BUSY", thread->word & SIM_TCS_BUSY))
        return fault_gp(fault);
    return true;
}

/* idle -> busy at frame `cssa`; false when somebody else was faster. */
static bool commit(struct sim_thread *thread, uint32_t cssa, struct sim_fault *fault)
{
    uint64_t busy = SIM_TCS_WORD(thread->tid | thread->enclave->sim->holder_mark, cssa, SIM_TCS_BUSY);

    if (!atomic_compare_exchange_strong(&thread->tcs->word, &thread->word, busy))
        return fault_gp(fault); /* now busy, or of another CSSA: as if it had been so before */
    thread->word = busy;
    thread->cssa = cssa;
    return true;
}

/* The host's stack pointers, for AEX and for code that wants the untrusted stack. */
static void keep_stack_pointers(struct sim_thread *thread, const struct entry *entry)
{
    struct sgx_gprs *gprs = frame_gprs(thread);

    if (SIM_STEP("EENTER.URSP")) {
        gprs->ursp = entry->rsp;
        gprs->urbp = entry->rbp;
    }
}

static bool eenter(struct teemate_enclave *enclave, struct sim_thread *thread, struct entry *entry,
                   struct sim_fault *fault)
{
    const struct sim_tcs *tcs;
    uint32_t cssa;

    if (!enter_checks(enclave, thread, entry, fault))
        return false;
    tcs = thread->tcs;
    cssa = SIM_TCS_CSSA(thread->word);
    if (SIM_CHECK("EENTER.CSSA", cssa >= tcs->nssa))
        return fault_gp(fault);
    entry->target = enclave->base + tcs->oentry;
    thread->enclave_fs = enclave->base + tcs->ofsbase;
    thread->enclave_gs = enclave->base + tcs->ogsbase;
    if (SIM_CHECK("EENTER.CANONICAL", !sim_canonical(entry->target) || !sim_canonical(thread->enclave_fs) ||
                                          !sim_canonical(thread->enclave_gs)))
        return fault_gp(fault);
    thread->ssa = find_frame(enclave, tcs, cssa, fault);
    if (!thread->ssa || !commit(thread, cssa, fault))
        return false;
    keep_stack_pointers(thread, entry);
    return true;
}

/* XRSTOR's checks of what it will load, on our copy. */
static bool xsave_legal(const uint8_t *area, const uint8_t *frame, uint64_t xfrm)
{
    const volatile uint64_t *header = (const volatile uint64_t *)(frame + 512);
    uint32_t mxcsr = *(const uint32_t *)(area + 24);

    if (SIM_CHECK("ERESUME.XSTATE_BV", header[0] & ~xfrm))
        return false;
    if (SIM_CHECK("ERESUME.XCOMP_BV", header[1] | header[2]))
        return false;
    return !SIM_CHECK("ERESUME.MXCSR", mxcsr & MXCSR_RESERVED);
}

static bool eresume(struct teemate_enclave *enclave, struct sim_thread *thread, struct entry *entry,
                    struct sim_fault *fault)
{
    struct sgx_gprs *gprs = &thread->gprs;
    uint64_t flags, before;
    uint16_t cs, ss;
    uint32_t cssa;

    if (!enter_checks(enclave, thread, entry, fault))
        return false;
    cssa = SIM_TCS_CSSA(thread->word);
    if (SIM_CHECK("ERESUME.CSSA", cssa == 0))
        return fault_gp(fault);
    thread->ssa = find_frame(enclave, thread->tcs, cssa - 1, fault);
    before = thread->word;
    if (!thread->ssa || !commit(thread, cssa - 1, fault))
        return false;
    /* Ours now.  Others may still write the frame, so look at a copy. */
    *gprs = *frame_gprs(thread);
    sim_xsave_copy((uint8_t *)(uintptr_t)thread->xsave, thread->ssa, enclave->info.xfrm);
    if (!xsave_legal((uint8_t *)(uintptr_t)thread->xsave, thread->ssa, enclave->info.xfrm) ||
        SIM_CHECK("ERESUME.CANONICAL",
                  !sim_canonical(gprs->rip) || !sim_canonical(gprs->fsbase) || !sim_canonical(gprs->gsbase))) {
        atomic_store(&thread->tcs->word, before);
        return fault_gp(fault);
    }
    keep_stack_pointers(thread, entry);
    thread->enclave_fs = gprs->fsbase;
    thread->enclave_gs = gprs->gsbase;
    flags = (gprs->rflags & RFLAGS_RESUMED) | RFLAGS_FIXED;
    if (SIM_STEP("ERESUME.TF"))
        flags &= ~(uint64_t)RFLAGS_TF;
    __asm__("mov %%cs, %0" : "=r"(cs));
    __asm__("mov %%ss, %0" : "=r"(ss));
    thread->frame[0] = gprs->rip;
    thread->frame[1] = cs;
    thread->frame[2] = flags;
    thread->frame[3] = gprs->rsp;
    thread->frame[4] = ss;
    return true;
}

static bool reserved_clear(const struct sgx_enclave_run *run)
{
    const uint64_t *word = (const uint64_t *)(const void *)run->reserved;
    uint64_t all = 0;

    for (size_t i = 0; i < sizeof(run->reserved) / sizeof(*word); i++)
        all |= word[i];
    return all == 0;
}

static void back_to_host(const struct sim_thread *thread)
{
    bare_syscall(SYS_sigaltstack, (long)&thread->host.stack, 0, 0, 0);
    bare_syscall(SYS_rt_sigprocmask, SIG_SETMASK, (long)&thread->host.mask, 0, 8);
}

/* Called by sim_trampoline for each ENCLU: the first, the AEP's, a user handler's. */
int sim_go(struct sim_thread *thread, struct entry *entry)
{
    struct teemate_enclave *enclave = entry->enclave;
    /*
     * Disarmed while a handler runs: else sigreturn, from Linux 6.12 on, refuses to put the
     * host's stack back because it looks at the handler's own stack pointer (x86 signal_64.c).
     */
    stack_t stack = {.ss_sp = (uint8_t *)thread + SIM_HEADER_PAGES * SGX_PAGE,
                     .ss_size = SIM_STACK_SIZE,
                     .ss_flags = (int)SS_AUTODISARM};
    uint64_t mask = inside_mask(), flags;
    struct sim_fault fault = {0};
    bool entered;
    int error;

    entry_current = entry; /* again: an entry inside of ours may have been left by longjmp */
    if (entry->function != SGX_EENTER && entry->function != SGX_ERESUME)
        return -EINVAL;
    if (!reserved_clear(entry->run))
        return -EINVAL;
    if (atomic_load_explicit(&thread->inside, memory_order_relaxed))
        return -EDEADLK;
    error = signals_recheck();
    if (error)
        return error;
    sim_flush(enclave);

    bare_syscall(SYS_rt_sigprocmask, SIG_SETMASK, (long)&mask, (long)&thread->host.mask, 8);
    if (bare_syscall(SYS_sigaltstack, (long)&stack, (long)&thread->host.stack, 0, 0)) {
        bare_syscall(SYS_rt_sigprocmask, SIG_SETMASK, (long)&thread->host.mask, 0, 8);
        return -EDEADLK; /* on an alternate stack: in a signal handler */
    }
    if (!thread->no_fsgsbase) {
        __asm__ volatile("rdfsbase %0" : "=r"(thread->host_fs));
        __asm__ volatile("rdgsbase %0" : "=r"(thread->host_gs));
    }
    __asm__ volatile("pushfq; pop %0" : "=r"(flags));
    thread->host_tf = flags & RFLAGS_TF;
    thread->enclave = enclave;
    thread->entry = entry;
    thread->xfrm = enclave->info.xfrm;
    thread->ssa_size = enclave->info.ssa_frame_pages * SGX_PAGE;
    entered = entry->function == SGX_EENTER ? eenter(enclave, thread, entry, &fault)
                                            : eresume(enclave, thread, entry, &fault);
    if (!entered) {
        back_to_host(thread);
        entry->vector = fault.vector;
        entry->error = fault.error;
        entry->addr = fault.addr;
        return SIM_GO_FAULT;
    }
    thread->tcs_addr = entry->run->tcs;
    thread_inside(thread->owner);
    return entry->function == SGX_EENTER ? SIM_GO_EENTER : SIM_GO_ERESUME;
}

int sim_enter(struct teemate_enclave *enclave, uint64_t tcs_offset, struct teemate_regs *regs, uint32_t function,
              uint64_t pause_after_ns, enum entry_stack stack, struct sgx_enclave_run *run)
{
    struct sim_thread *thread = sim_thread_get();
    struct entry entry = {.regs = regs,
                              .run = run,
                              .function = function,
                              .enclave = enclave,
                              .landing = sim_landed,
                              .pause_after_ns = pause_after_ns,
                              .outer = entry_current};
    struct timespec now;
    int result;

    (void)tcs_offset; /* in run->tcs: a user handler may change it */
    (void)stack;      /* to our own code the enclave returns on the stack that is there */
    if (!thread)
        return -ENOMEM;
    entry.thread = thread->owner;
    result = signals_install(SIGNALS_SIM);
    if (!result)
        result = ticker_start();
    if (result)
        return result;
    if (pause_after_ns) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        entry.started_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }
    entry_current = &entry;
    result = sim_trampoline(thread, &entry);
    entry_current = entry.outer;
    /*
     * An error of the AEP's own ERESUME: the enclave has begun, and a negative errno would
     * say that it had not.  Paused, then; who resumes it is told the error.
     */
    if (result < 0 && function == SGX_EENTER && entry.function == SGX_ERESUME && !run->user_handler) {
        run->function = SGX_ERESUME;
        return TEEMATE_PAUSED;
    }
    return result;
}
