/* SPDX-License-Identifier: Apache-2.0 */
/* The life of struct thread: made at a thread's first entry, gone with the thread. */
#include "thread.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CHECK_OFFSET(struct_, field, number) _Static_assert(offsetof(struct struct_, field) == (number), #field)
CHECK_OFFSET(entry, rsp, ENTRY_RSP);
CHECK_OFFSET(entry, rbp, ENTRY_RBP);
CHECK_OFFSET(entry, regs, ENTRY_REGS);
CHECK_OFFSET(entry, run, ENTRY_RUN);
CHECK_OFFSET(entry, target, ENTRY_TARGET);
CHECK_OFFSET(entry, function, ENTRY_FUNCTION);
CHECK_OFFSET(entry, error, ENTRY_ERROR);
CHECK_OFFSET(entry, vector, ENTRY_VECTOR);
CHECK_OFFSET(entry, kept, ENTRY_KEPT);
CHECK_OFFSET(entry, addr, ENTRY_ADDR);
CHECK_OFFSET(entry, landing, ENTRY_LANDING);
CHECK_OFFSET(entry, stack, ENTRY_STACK);
CHECK_OFFSET(entry, frame, ENTRY_FRAME);
CHECK_OFFSET(entry, ssp, ENTRY_SSP);
CHECK_OFFSET(entry, flags, ENTRY_FLAGS);
CHECK_OFFSET(entry, mxcsr, ENTRY_MXCSR);
CHECK_OFFSET(entry, fcw, ENTRY_FCW);
CHECK_OFFSET(teemate_regs, rdi, REGS_RDI);
CHECK_OFFSET(teemate_regs, r9, REGS_R9);
CHECK_OFFSET(teemate_regs, r13, REGS_R13);
CHECK_OFFSET(sgx_enclave_run, function, RUN_FUNCTION);
CHECK_OFFSET(sgx_enclave_run, exception_vector, RUN_VECTOR);
CHECK_OFFSET(sgx_enclave_run, exception_error_code, RUN_ERROR);
CHECK_OFFSET(sgx_enclave_run, exception_addr, RUN_ADDR);
CHECK_OFFSET(sgx_enclave_run, user_handler, RUN_HANDLER);

__thread struct entry *entry_current __attribute__((tls_model("initial-exec")));
static __thread struct thread *mine __attribute__((tls_model("initial-exec")));

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct thread *threads;
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int key_error;

void threads_lock(void)
{
    pthread_mutex_lock(&lock);
}

void threads_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

struct thread *threads_first(void)
{
    return threads;
}

size_t threads_count(void)
{
    size_t count = 0;

    threads_lock();
    for (struct thread *thread = threads; thread; thread = thread->next)
        count++;
    threads_unlock();
    return count;
}

static void enlist(struct thread *thread)
{
    thread->next = threads;
    thread->link = &threads;
    if (threads)
        threads->link = &thread->next;
    threads = thread;
}

/* A page of its own: malloc() would give each thread that does nothing else an arena. */
static void record_free(struct thread *thread)
{
    sim_block_free(thread->sim);
    munmap(thread, SGX_PAGE);
}

static void thread_ends(void *value)
{
    struct thread *thread = value;

    threads_lock(); /* the ticker holds it while it sends */
    *thread->link = thread->next;
    if (thread->next)
        thread->next->link = thread->link;
    threads_unlock();
    mine = NULL;
    record_free(thread);
}

static void make_key(void)
{
    key_error = pthread_key_create(&key, thread_ends);
}

/* In a child of fork: of all threads only this one is left. */
void threads_forked(void)
{
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    for (struct thread *thread = threads, *next; thread; thread = next) {
        next = thread->next;
        if (thread != mine)
            record_free(thread);
    }
    threads = NULL;
    entry_current = NULL;
    if (mine) {
        mine->tid = (uint32_t)syscall(SYS_gettid);
        mine->tick_state = TICK_OUTSIDE;
        sim_block_forked(mine->sim, mine->tid);
        enlist(mine);
    }
    ticker_forked();
    signals_forked();
}

struct thread *thread_get(void)
{
    struct thread *thread = mine;

    if (__builtin_expect(thread != NULL, 1))
        return thread;
    pthread_once(&once, make_key);
    if (key_error)
        return NULL;
    thread = mmap(NULL, SGX_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (thread == MAP_FAILED)
        return NULL;
    if (pthread_setspecific(key, thread)) {
        munmap(thread, SGX_PAGE);
        return NULL;
    }
    thread->tid = (uint32_t)syscall(SYS_gettid);
    threads_lock();
    enlist(thread);
    threads_unlock();
    mine = thread;
    return thread;
}

void thread_inside(struct thread *thread)
{
    atomic_store_explicit(&thread->astray, 0, memory_order_relaxed);
    atomic_store_explicit(&thread->sequence, thread->sequence + 1, memory_order_relaxed);
    atomic_store(&thread->tick_state, TICK_INSIDE); /* a full barrier: see ticker.c */
    if (atomic_load_explicit(&ticker_asleep, memory_order_relaxed))
        ticker_wake();
}

int thread_start(void *(*run)(void *), size_t stack, const sigset_t *blocked)
{
    pthread_attr_t small, usual;
    pthread_t thread;
    sigset_t before;
    int error;

    pthread_attr_init(&small);
    pthread_attr_init(&usual);
    pthread_attr_setdetachstate(&small, PTHREAD_CREATE_DETACHED);
    pthread_attr_setdetachstate(&usual, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&small, stack);
    pthread_sigmask(SIG_SETMASK, blocked, &before);
    error = pthread_create(&thread, &small, run, NULL);
    if (error == EINVAL) /* glibc puts the program's thread-local data there too, and it did not fit */
        error = pthread_create(&thread, &usual, run, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&small);
    pthread_attr_destroy(&usual);
    return -error;
}
