/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A thread that enters enclaves, and the entries it is in; what both backends share.
 *
 *   thread.c   a thread's record, made at its first entry
 *   signals.c  whose signal is it?         ticker.c  interrupts
 *   landing.c  from the landing page to the entry in progress
 *   sim_*.c    entries into sim enclaves   sgx_enter.c  entries through the vDSO
 */
#ifndef TEEMATE_THREAD_H
#define TEEMATE_THREAD_H

#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>

#include "entry_offsets.h"
#include "sgx_arch.h"
#include "teemate.h"

struct sgx_stack;
struct sim_thread;
struct teemate_enclave;

/* tick_state: the ticker sends to a thread only in INSIDE, and the thread leaves only from there. */
enum tick { TICK_OUTSIDE, TICK_INSIDE, TICK_SENDING };

struct thread {
    uint32_t tid;
    _Atomic uint32_t tick_state;
    /* For the ticker: changes at each entry and exit. */
    _Atomic uint64_t sequence;
    _Atomic uint32_t astray; /* ticks in a row that found neither an enclave nor its edge */
    uint64_t seen;           /* the ticker's: the sequence when it last looked */
    struct sim_thread *sim;  /* the sim's block, made at the thread's first entry into a sim enclave */
    struct thread *next, **link;
};

/* One call of teemate_enter, on its caller's stack. */
struct entry {
    /* Read and written by assembly, offsets in entry_offsets.h. */
    uint64_t rsp, rbp; /* the host's; the sim gives them to the enclave */
    struct teemate_regs *regs;
    struct sgx_enclave_run *run;
    uint64_t target;   /* sim: OENTRY; sgx: the vDSO's function */
    uint32_t function; /* the leaf to execute */
    uint32_t error;    /* sim, a fault of EENTER or ERESUME: error code, vector, address */
    uint32_t vector;
    uint32_t kept; /* sgx: what the enclave left in the registers is in `regs` already */
    uint64_t addr;
    void (*landing)(void); /* where the landing page goes on, with RAX = the entry */
    uint64_t stack;        /* sgx: top of the stack for the vDSO's frame; 0: the caller's */
    uint64_t frame;        /* sgx: RBP inside of the vDSO function */
    uint64_t ssp;          /* sgx: the shadow stack's pointer, 0 without one */
    uint64_t flags;
    uint32_t mxcsr, fcw;

    struct teemate_enclave *enclave;
    struct thread *thread;
    struct entry *outer; /* the entry whose user handler or signal handler we are in */
    uint64_t pause_after_ns; /* sim */
    uint64_t started_ns;     /* sim */
    uint64_t handler;        /* sgx: the caller's run->user_handler */
    uint32_t inside;         /* sgx: thread_inside() was said for this entry, and not yet thread_outside() */
    uint32_t waiting;        /* sgx: ticks that found EENTER not done yet */
};

/* Whatever the build's flags: a lazily bound call would run the dynamic linker with the enclave's FS. */
#pragma GCC visibility push(hidden)

/* The entry in progress; the landing page's code reads it without a stack, so its place
 * must not be looked up by a call. */
extern __thread struct entry *entry_current __attribute__((tls_model("initial-exec")));

/* thread.c: this thread's record, made on first use; NULL when memory is short. */
struct thread *thread_get(void);
void threads_lock(void);
void threads_unlock(void);
void threads_forked(void);
/* With the lock held. */
struct thread *threads_first(void);
/* How many records there are (tests). */
size_t threads_count(void);

/* A detached thread with these signals blocked; `stack` bytes, or what it takes. 0 or a negative errno. */
int thread_start(void *(*run)(void *), size_t stack, const sigset_t *blocked);

/* Say to the ticker that this thread goes into an enclave. */
void thread_inside(struct thread *thread);

/* sim_block.c, `sim` may be NULL: the thread ends, or is not in this child of fork. */
void sim_block_free(struct sim_thread *sim);
/* This thread is the only one of a child of fork, and has another number. */
void sim_block_forked(struct sim_thread *sim, uint32_t tid);

/* signals.c: signals that a backend needs, a bit for each (signals_install). */
#define SIGNALS_SIM 0x3fu /* all that are owned */
#define SIGNALS_SGX 0x28u /* SIGBUS and the tick */
int signals_install(uint32_t which);
/* sim, before every entry: 0, or -EUCLEAN. */
int signals_recheck(void);
/* The ticker's: is the tick still ours, so that it may be sent? */
bool signals_tick_ready(void);
int signals_tick(void);
void signals_forked(void);
/* What the value of our ticks points to. */
const void *signals_tick_cookie(void);

/* entry.S: the landing page's code; the handlers' way back. */
void entry_landed(void);
void signals_restorer(void);

/* ticker.c: make sure that somebody ticks us. */
int ticker_start(void);
void ticker_wake(void);
void ticker_forked(void);
/* Around fork(), in the parent. */
void ticker_before_fork(void);
void ticker_after_fork(void);
extern _Atomic uint32_t ticker_asleep;

#pragma GCC visibility pop

/* No TLS, no libc: also while FS is the enclave's. */
static inline long bare_syscall(long number, long a, long b, long c, long d)
{
    register long r10 __asm__("r10") = d;
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
                     : "rcx", "r11", "memory");
    return result;
}

/*
 * This thread is in no enclave any more; may be said twice.  A tick on its way must be pending
 * when this returns, or it would interrupt a system call of the host's.
 */
static inline void thread_outside(struct thread *thread)
{
    uint32_t inside = TICK_INSIDE;

    atomic_store_explicit(&thread->sequence, thread->sequence + 1, memory_order_relaxed);
    while (!atomic_compare_exchange_weak(&thread->tick_state, &inside, TICK_OUTSIDE)) {
        if (inside == TICK_OUTSIDE)
            break;
        inside = TICK_INSIDE;
        bare_syscall(SYS_sched_yield, 0, 0, 0, 0);
    }
}

#define SIGNAL_MASK(sig) (1ull << ((sig)-1))

#endif
