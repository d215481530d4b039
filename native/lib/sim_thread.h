/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One thread's entries into sim enclaves.
 *
 *   enter.c       teemate_enter
 *   sim_enter.c   the checks and commits of EENTER and ERESUME
 *   sim_entry.S   the instructions: into the enclave, the AEP, the ways out
 *   sim_signals.c whose signal is it?          sim_block.c  this structure's life
 *   sim_aex.c     ENCLU and exceptions inside  ticker.c     interrupts
 */
#ifndef TEEMATE_SIM_THREAD_H
#define TEEMATE_SIM_THREAD_H

#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "sgx_arch.h"
#include "sim.h"
#include "sim_offsets.h"
#include "teemate.h"

#define SIM_THREAD_MAGIC 0x64616572687473ull

/*
 * [guard page][header: struct sim_thread and its XSAVE area][alternate stack].
 * The stack's size is odd enough that a foreign one of equal size is unlikely; who
 * finds it in a ucontext may look at the header below it.
 */
#define SIM_HEADER_PAGES 8u
#define SIM_STACK_SIZE (96u * 1024u - 208u)
#define SIM_BLOCK_SIZE ((1u + SIM_HEADER_PAGES) * SGX_PAGE + 96u * 1024u)
#define SIM_XSAVE_MAX (6u * SGX_PAGE)

/* The kernel's stack_t and sigset. */
struct sim_host {
    uint64_t mask;
    stack_t stack;
};

/* tick_state: the ticker sends to a thread only in INSIDE, and the thread leaves only from there. */
enum sim_tick { SIM_TICK_OUTSIDE, SIM_TICK_INSIDE, SIM_TICK_SENDING };

struct sim_entry;

struct sim_thread {
    uint64_t magic;
    struct sim_thread *self;
    /* Read and written by sim_entry.S, offsets in sim_offsets.h. */
    _Atomic uint32_t inside; /* enclave mode, unless RIP is in sim_entry.S's critical region */
    uint32_t no_fsgsbase;    /* the kernel wants arch_prctl instead of WRFSBASE */
    uint64_t enclave_fs;
    uint64_t enclave_gs;
    uint64_t tcs_addr; /* RBX */
    uint32_t cssa;     /* index of the frame that an AEX fills */
    uint32_t handling; /* our signal handler works for a thread inside; a fault now is the handler's */
    uint64_t xfrm;
    uint64_t xsave; /* address of the XSAVE area, 64-byte aligned */
    uint64_t host_fs;
    uint64_t host_gs;
    uint32_t host_tf;
    uint32_t tid;
    struct sim_tcs *tcs;
    uint64_t word; /* of the TCS while we are inside */
    uint8_t *ssa;  /* the frame cssa in the view */
    uint32_t ssa_size;
    uint32_t padding;
    uint64_t frame[5];   /* for IRETQ: RIP, CS, RFLAGS, RSP, SS */
    struct sgx_gprs gprs; /* what ERESUME loads */
    struct teemate_enclave *enclave;
    struct sim_entry *entry;
    struct sim_host host;
    /* For the ticker: changes at each entry and exit; odd while inside. */
    _Atomic uint64_t sequence;
    _Atomic uint32_t tick_state;
    uint64_t seen; /* the ticker's: the sequence when it last looked */
    struct sim_thread *next, **link;
};

/* One call of teemate_enter, on its caller's stack. */
struct sim_entry {
    uint64_t rsp, rbp; /* the host's, as the enclave gets them */
    struct teemate_regs *regs;
    struct sgx_enclave_run *run;
    uint64_t target;   /* OENTRY */
    uint32_t function; /* the leaf to execute */
    uint32_t error;    /* a fault of EENTER or ERESUME: error code, vector, address */
    uint32_t vector;
    uint32_t reserved;
    uint64_t addr;
    struct teemate_enclave *enclave;
    struct sim_thread *thread;
    uint64_t pause_after_ns;
    uint64_t started_ns;
    struct sim_entry *outer; /* the entry whose user handler or signal handler we are in */
};

/* Whatever the build's flags: a lazily bound call would run the dynamic linker with the enclave's FS. */
#pragma GCC visibility push(hidden)

/* sim_entry.S */
int sim_trampoline(struct sim_thread *thread, struct sim_entry *entry);
void sim_landing(void);
void sim_restorer(void);
extern const char sim_region_start[], sim_region_end[];
extern const char sim_exit[], sim_aep[], sim_exception[], sim_paused[];

/* The entry in progress; the landing page's code reads it without a stack, so its place
 * must not be looked up by a call. */
extern __thread struct sim_entry *sim_current __attribute__((tls_model("initial-exec")));

/* sim_block.c: this thread's block, made on first use; NULL when memory is short. */
struct sim_thread *sim_thread_get(void);
void sim_threads_lock(void);
void sim_threads_unlock(void);
void sim_threads_forked(void);
/* With the lock held. */
struct sim_thread *sim_threads_first(void);
/* How many blocks there are (tests). */
size_t sim_threads_count(void);

/* sim_enter.c */
int sim_enter(struct teemate_enclave *enclave, uint64_t tcs_offset, struct teemate_regs *regs, uint32_t function,
              uint64_t pause_after_ns, struct sgx_enclave_run *run);
int sim_go(struct sim_thread *thread, struct sim_entry *entry);
bool sim_canonical(uint64_t address);
/* Bytes of the XSAVE area (standard form) for these components. */
uint32_t sim_xsave_size(uint64_t xfrm);
/* Copy the components in `xfrm` of one XSAVE area to another. */
void sim_xsave_copy(uint8_t *to, const uint8_t *from, uint64_t xfrm);

/* sim_signals.c */
int sim_signals_install(void);
/* Before every entry: 0, or -EUCLEAN. */
int sim_signals_recheck(void);
int sim_tick_signal(void);
void sim_signals_forked(void);
/* What the value of our ticks points to. */
const void *sim_tick_cookie(void);

/* sim_aex.c: a signal while inside.  Changes the context to where the thread goes on. */
void sim_inside(struct sim_thread *thread, int sig, siginfo_t *info, void *context);

/* ticker.c: make sure that somebody ticks us. */
int sim_ticker_start(void);
void sim_ticker_wake(void);
void sim_ticker_forked(void);
extern _Atomic uint32_t sim_ticker_asleep;

#pragma GCC visibility pop

/* No TLS, no libc: also while FS is the enclave's. */
static inline long sim_syscall(long number, long a, long b, long c, long d)
{
    register long r10 __asm__("r10") = d;
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
                     : "rcx", "r11", "memory");
    return result;
}

#define SIM_MASK(sig) (1ull << ((sig)-1))

#endif
