/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a child of fork() finds: nothing.
 *
 * All mappings of an enclave are MADV_DONTFORK, so the child's address space is free
 * for an attach of its own.  A page that the kernel wipes in the child says that
 * this is another process, also after a bare clone() that runs no pthread_atfork
 * handler; every object remembers the process that made it.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "enclave.h"
#include "thread.h"

static _Atomic uint64_t *marker; /* 0 in a child until it asks */
static uint64_t last_process;    /* survives the fork */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void before(void)
{
    ticker_before_fork();
    threads_lock();
}

static void after_in_parent(void)
{
    threads_unlock();
    ticker_after_fork();
}

static void after_in_child(void)
{
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    fork_process();
}

static void prepare(void)
{
    void *page = mmap(NULL, SGX_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    /* Without the page two processes would write one enclave's state believing to be one. */
    if (page == MAP_FAILED || madvise(page, SGX_PAGE, MADV_WIPEONFORK))
        abort();
    marker = page;
    atomic_store(marker, ++last_process);
    pthread_atfork(before, after_in_parent, after_in_child);
}

uint64_t fork_process(void)
{
    uint64_t process;

    pthread_once(&once, prepare);
    process = atomic_load_explicit(marker, memory_order_relaxed);
    if (process)
        return process;
    pthread_mutex_lock(&lock);
    if (!atomic_load(marker)) {
        threads_forked();
        atomic_store(marker, ++last_process);
    }
    process = atomic_load(marker);
    pthread_mutex_unlock(&lock);
    return process;
}
