/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One thread per process that ticks threads which have been inside for longer than about
 * 5 ms.  On the sim a tick is the timer interrupt; on sgx, where interrupts come by
 * themselves, it ends the call for now (sgx_enter.c).
 *
 * It compares each thread's entry count with what it saw one period ago, so an entry tells
 * it nothing but the count.  With nobody inside for a while it sleeps; the next entry
 * finds the flag and wakes it, and a steady caller never does.
 *
 * TEEMATE_TICK="20us-200us": tick whoever is inside at random intervals of that
 * length, so that short calls are interrupted too (tests).
 */
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "thread.h"

#define PERIOD_NS 5000000u
#define IDLE_ROUNDS 40u

_Atomic uint32_t ticker_asleep;

static struct {
    pthread_mutex_t lock;
    _Atomic bool running;
    _Atomic bool arrived; /* the thread has come to its own code */
    uint64_t least_ns, most_ns; /* 0: the usual period */
    uint64_t random;
} ticker = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* One thread that is inside; the ticker's lock on the list keeps its record alive. */
static void send_tick(struct thread *thread)
{
    uint32_t inside = TICK_INSIDE;
    siginfo_t info;

    if (!atomic_compare_exchange_strong(&thread->tick_state, &inside, TICK_SENDING))
        return;
    memset(&info, 0, sizeof(info));
    info.si_signo = signals_tick();
    info.si_code = SI_QUEUE;
    info.si_pid = getpid();
    info.si_uid = getuid();
    info.si_value.sival_ptr = (void *)(uintptr_t)signals_tick_cookie();
    syscall(SYS_rt_tgsigqueueinfo, getpid(), thread->tid, info.si_signo, &info);
    atomic_store(&thread->tick_state, TICK_INSIDE);
}

/*
 * On sgx a handler of the host's may keep a thread at the enclave's edge, or leave it for good
 * with longjmp(), which nobody tells us.  Ticks that find such a thread become rarer, to one in
 * 64 rounds, so as not to disturb its system calls.
 */
static bool is_due(struct thread *thread, uint64_t round)
{
    uint32_t shift = atomic_load_explicit(&thread->astray, memory_order_relaxed) / 4;

    return round % (1u << (shift < 6 ? shift : 6)) == 0;
}

/* Returns whether anybody has been inside since the last round. */
static bool tick_round(bool always)
{
    static uint64_t round;
    bool busy = false, ready = false;

    round++;
    threads_lock();
    for (struct thread *thread = threads_first(); thread; thread = thread->next) {
        uint64_t sequence = atomic_load(&thread->sequence);
        bool inside = atomic_load(&thread->tick_state) != TICK_OUTSIDE;

        /* Looked at only when one is sent: without a handler it would end the process. */
        if (inside && (always || sequence == thread->seen) && is_due(thread, round) && (ready || (ready = signals_tick_ready())))
            send_tick(thread);
        busy |= inside || sequence != thread->seen;
        thread->seen = sequence;
    }
    threads_unlock();
    return busy;
}

static uint64_t interval(void)
{
    if (!ticker.most_ns)
        return PERIOD_NS;
    ticker.random = ticker.random * 6364136223846793005u + 1442695040888963407u;
    return ticker.least_ns + (ticker.random >> 33) % (ticker.most_ns - ticker.least_ns + 1);
}

static void *tick_loop(void *unused)
{
    unsigned idle = 0;

    (void)unused;
    pthread_setname_np(pthread_self(), "teemate-ticker");
    atomic_store(&ticker.arrived, true);
    for (;;) {
        uint64_t ns = interval();
        struct timespec pause = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};

        clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
        if (tick_round(ticker.most_ns != 0)) {
            idle = 0;
            continue;
        }
        if (++idle < IDLE_ROUNDS)
            continue;
        /* Who enters after this store sees it, who entered before is seen by the round: both are
         * full barriers. */
        atomic_store(&ticker_asleep, 1);
        if (tick_round(false)) {
            atomic_store(&ticker_asleep, 0);
        } else {
            while (atomic_load(&ticker_asleep))
                syscall(SYS_futex, &ticker_asleep, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
        }
        idle = 0;
    }
    return NULL;
}

void ticker_wake(void)
{
    atomic_store(&ticker_asleep, 0);
    bare_syscall(SYS_futex, (long)&ticker_asleep, FUTEX_WAKE_PRIVATE, 1, 0);
}

/* "20us-200us" */
static bool parse_tick(const char *text, uint64_t *least, uint64_t *most)
{
    unsigned long low, high;
    char rest;

    if (sscanf(text, "%luus-%luus%c", &low, &high, &rest) != 2 || low == 0 || high < low || high > 1000000)
        return false;
    *least = (uint64_t)low * 1000;
    *most = (uint64_t)high * 1000;
    return true;
}

int ticker_start(void)
{
    const char *text;
    sigset_t all;
    int error = 0;

    if (__builtin_expect(atomic_load_explicit(&ticker.running, memory_order_acquire), 1))
        return 0;
    pthread_mutex_lock(&ticker.lock);
    if (atomic_load(&ticker.running)) {
        pthread_mutex_unlock(&ticker.lock);
        return 0;
    }
    text = secure_getenv("TEEMATE_TICK");
    if (text && !parse_tick(text, &ticker.least_ns, &ticker.most_ns)) {
        fprintf(stderr, "teemate: TEEMATE_TICK=%s: expected \"20us-200us\", two lengths of time up to 1000000us\n",
                text);
        pthread_mutex_unlock(&ticker.lock);
        return -EINVAL;
    }
    ticker.random = (uint64_t)getpid() * 0x9e3779b97f4a7c15u ^ (uint64_t)time(NULL);
    sigfillset(&all);
    error = thread_start(tick_loop, 128u * 1024u, &all);
    if (!error)
        atomic_store_explicit(&ticker.running, true, memory_order_release);
    pthread_mutex_unlock(&ticker.lock);
    return error;
}

/*
 * A fork now would find no thread of ours half started.  A thread that starts may hold locks of
 * whoever wrapped pthread_create() (libasan does), and in the child nobody would ever open them.
 */
void ticker_before_fork(void)
{
    pthread_mutex_lock(&ticker.lock);
    while (atomic_load(&ticker.running) && !atomic_load(&ticker.arrived))
        sched_yield();
}

void ticker_after_fork(void)
{
    pthread_mutex_unlock(&ticker.lock);
}

/* In a child of fork there is no ticker; the next entry starts one. */
void ticker_forked(void)
{
    ticker.lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    atomic_store(&ticker.running, false);
    atomic_store(&ticker.arrived, false);
    atomic_store(&ticker_asleep, 0);
}
