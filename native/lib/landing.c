/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The landing page, right above ELRANGE at the same address in every process: where
 * an enclave goes that must not trust a register for its way out (a refused entry, a
 * rewritten SSA frame).  It arrives with whatever registers it likes, so the code
 * uses no stack; it is this process's own and finds the entry in progress itself.
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "enclave.h"
#include "thread.h"

/* The page that every enclave's is: shared, so that it can be mapped again, but with nobody else. */
struct master {
    uint64_t process; /* in a child of fork it is not there */
    uint8_t *page;
};

static struct master *_Atomic master; /* never changed once published, never freed */

static int make_master(struct master **made)
{
    /* endbr64; movabs $entry_landed, %rax; jmp *%rax */
    uint8_t code[] = {0xf3, 0x0f, 0x1e, 0xfa, 0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0};
    uint64_t target = (uint64_t)(uintptr_t)entry_landed;
    struct master *now = malloc(sizeof(*now)), *before = atomic_load(&master);
    int error = 0;

    if (now == NULL)
        return -ENOMEM;
    now->process = fork_process();
    now->page = mmap(NULL, SGX_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (now->page == MAP_FAILED) {
        error = -errno;
        free(now);
        return error;
    }
    memset(now->page, 0xcc, SGX_PAGE); /* int3: nobody enters in the middle */
    memcpy(code + 6, &target, sizeof(target));
    memcpy(now->page, code, sizeof(code));
    if (madvise(now->page, SGX_PAGE, MADV_DONTFORK) || mprotect(now->page, SGX_PAGE, PROT_READ | PROT_EXEC))
        error = -errno;
    if (error != 0 || !atomic_compare_exchange_strong(&master, &before, now)) {
        munmap(now->page, SGX_PAGE);
        free(now);
        now = before; /* another thread's */
    }
    *made = now;
    return error;
}

int landing_map(uint64_t address)
{
    struct master *from = atomic_load(&master);
    int error = 0;

    if (from == NULL || from->process != fork_process())
        error = make_master(&from);
    if (error)
        return error;
    /* Of a shared mapping, a length of 0 makes another one of the same pages: mremap(2). */
    if (mremap(from->page, 0, SGX_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)address) == MAP_FAILED)
        return -errno;
    return 0;
}
