/* SPDX-License-Identifier: Apache-2.0 */
/* Counting calls: see counters.h; the page's layout is in teemate.h. */
#include "counters.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

_Static_assert(sizeof(struct teemate_counters) == 64, "a line of the cache: slots do not wait for each other");
_Static_assert(TEEMATE_COUNTER_LINES * sizeof(struct teemate_counters) == SGX_PAGE, "one page");

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW)

/* By vDSO on every host whose clock the kernel trusts. */
static uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000ull + (uint64_t)time.tv_nsec;
}

int teemate_counters_map(int fd, struct teemate_counters **page)
{
    void *wanted = *page, *at;
    struct stat facts;
    int seals = fcntl(fd, F_GET_SEALS);

    /* A file that can be cut short would end the thread that counts. */
    if (seals < 0 || (seals & SEALS) != SEALS || fstat(fd, &facts) != 0 || facts.st_size != SGX_PAGE)
        return -EINVAL;
    at = mmap(wanted, SGX_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | (wanted != NULL ? MAP_FIXED : 0), fd, 0);
    if (at == MAP_FAILED)
        return -errno;
    /* A child of fork() is no client: it has no slot, and is not to count in its parent's name. */
    madvise(at, SGX_PAGE, MADV_DONTFORK);
    *page = at;
    return 0;
}

void teemate_counters_unmap(struct teemate_counters *page)
{
    if (page != NULL)
        munmap(page, SGX_PAGE);
}

void teemate_enclave_count(struct teemate_enclave *enclave, struct teemate_counters *page)
{
    atomic_store_explicit(&enclave->counters, page, memory_order_release);
}

struct counters_step counters_enter(struct teemate_slot *slot)
{
    struct teemate_counters *page = atomic_load_explicit(&slot->enclave->counters, memory_order_acquire);
    struct counters_step step = {NULL, 0};

    if (page == NULL)
        return step;
    step.line = &page[slot->index % TEEMATE_COUNTER_LINES];
    step.entered = now();
    __atomic_store_n(&step.line->entered_ns, step.entered, __ATOMIC_RELAXED);
    return step;
}

void counters_leave(struct counters_step step, bool finished)
{
    struct teemate_counters *line = step.line;

    if (line == NULL)
        return;
    /* Two slots share a line where a process has more slots than there are lines: hence atomic. */
    __atomic_fetch_add(&line->inside_ns, now() - step.entered, __ATOMIC_RELAXED);
    __atomic_store_n(&line->entered_ns, 0, __ATOMIC_RELAXED);
    if (finished)
        __atomic_fetch_add(&line->calls, 1, __ATOMIC_RELAXED);
}
