/* SPDX-License-Identifier: Apache-2.0 */
/* The life of struct sim_thread: made at a thread's first entry into a sim enclave, gone with the thread. */
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

void sim_block_free(struct sim_thread *thread)
{
    if (thread)
        munmap((uint8_t *)thread - SGX_PAGE, SIM_BLOCK_SIZE);
}

void sim_block_forked(struct sim_thread *thread, uint32_t tid)
{
    if (thread)
        thread->tid = tid;
}

struct sim_thread *sim_thread_get(void)
{
    struct thread *owner = thread_get();
    struct sim_thread *thread;
    uint8_t *block;

    if (!owner)
        return NULL;
    if (__builtin_expect(owner->sim != NULL, 1))
        return owner->sim;
    block = mmap(NULL, SIM_BLOCK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED)
        return NULL;
    thread = (struct sim_thread *)(block + SGX_PAGE);
    if (mprotect(block, SGX_PAGE, PROT_NONE)) {
        munmap(block, SIM_BLOCK_SIZE);
        return NULL;
    }
    thread->self = thread;
    thread->owner = owner;
    thread->tid = owner->tid;
    thread->no_fsgsbase = !(getauxval(AT_HWCAP2) & HWCAP2_FSGSBASE);
    thread->xsave = (uint64_t)(uintptr_t)(block + 2 * SGX_PAGE);
    syscall(SYS_arch_prctl, ARCH_GET_FS, &thread->host_fs);
    syscall(SYS_arch_prctl, ARCH_GET_GS, &thread->host_gs);
    thread->magic = SIM_THREAD_MAGIC;
    owner->sim = thread;
    return thread;
}

_Static_assert(sizeof(struct sim_thread) <= SGX_PAGE, "the XSAVE area is on the page behind it");
_Static_assert((1 + SIM_XSAVE_MAX / SGX_PAGE) <= SIM_HEADER_PAGES, "the XSAVE area ends before the stack");
