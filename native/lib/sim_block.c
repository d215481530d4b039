/* SPDX-License-Identifier: Apache-2.0 */
/* The life of struct sim_thread: made at a thread's first entry, gone with the thread. */
#include <pthread.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "enclave.h"
#include "sim_thread.h"

#ifndef HWCAP2_FSGSBASE
#define HWCAP2_FSGSBASE (1 << 1)
#endif
#define ARCH_GET_FS 0x1003
#define ARCH_GET_GS 0x1004

__thread struct sim_entry *sim_current __attribute__((tls_model("initial-exec")));
static __thread struct sim_thread *mine __attribute__((tls_model("initial-exec")));

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct sim_thread *threads;
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int key_error;

void sim_threads_lock(void)
{
    pthread_mutex_lock(&lock);
}

void sim_threads_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

struct sim_thread *sim_threads_first(void)
{
    return threads;
}

size_t sim_threads_count(void)
{
    size_t count = 0;

    sim_threads_lock();
    for (struct sim_thread *thread = threads; thread; thread = thread->next)
        count++;
    sim_threads_unlock();
    return count;
}

static void enlist(struct sim_thread *thread)
{
    thread->next = threads;
    thread->link = &threads;
    if (threads)
        threads->link = &thread->next;
    threads = thread;
}

static void block_free(struct sim_thread *thread)
{
    munmap((uint8_t *)thread - SGX_PAGE, SIM_BLOCK_SIZE);
}

static void thread_ends(void *value)
{
    struct sim_thread *thread = value;

    sim_threads_lock(); /* the ticker holds it while it sends */
    *thread->link = thread->next;
    if (thread->next)
        thread->next->link = thread->link;
    sim_threads_unlock();
    mine = NULL;
    block_free(thread);
}

static void make_key(void)
{
    key_error = pthread_key_create(&key, thread_ends);
}

/* In a child of fork: of all threads only this one is left. */
void sim_threads_forked(void)
{
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    for (struct sim_thread *thread = threads, *next; thread; thread = next) {
        next = thread->next;
        if (thread != mine)
            block_free(thread);
    }
    threads = NULL;
    sim_current = NULL;
    if (mine) {
        mine->tid = (uint32_t)syscall(SYS_gettid);
        mine->tick_state = SIM_TICK_OUTSIDE;
        enlist(mine);
    }
    sim_ticker_forked();
    sim_signals_forked();
}

struct sim_thread *sim_thread_get(void)
{
    struct sim_thread *thread = mine;
    uint8_t *block;

    if (__builtin_expect(thread != NULL, 1))
        return thread;
    pthread_once(&once, make_key);
    if (key_error)
        return NULL;
    block = mmap(NULL, SIM_BLOCK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED)
        return NULL;
    thread = (struct sim_thread *)(block + SGX_PAGE);
    if (mprotect(block, SGX_PAGE, PROT_NONE) || pthread_setspecific(key, thread)) {
        munmap(block, SIM_BLOCK_SIZE);
        return NULL;
    }
    thread->self = thread;
    thread->tid = (uint32_t)syscall(SYS_gettid);
    thread->no_fsgsbase = !(getauxval(AT_HWCAP2) & HWCAP2_FSGSBASE);
    thread->xsave = (uint64_t)(uintptr_t)(block + 2 * SGX_PAGE);
    syscall(SYS_arch_prctl, ARCH_GET_FS, &thread->host_fs);
    syscall(SYS_arch_prctl, ARCH_GET_GS, &thread->host_gs);
    thread->magic = SIM_THREAD_MAGIC;
    sim_threads_lock();
    enlist(thread);
    sim_threads_unlock();
    mine = thread;
    return thread;
}

_Static_assert(sizeof(struct sim_thread) <= SGX_PAGE, "the XSAVE area is on the page behind it");
_Static_assert((1 + SIM_XSAVE_MAX / SGX_PAGE) <= SIM_HEADER_PAGES, "the XSAVE area ends before the stack");
