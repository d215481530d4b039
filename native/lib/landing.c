/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The landing page, right above ELRANGE at the same address in every process: where
 * an enclave goes that must not trust a register for its way out (a refused entry, a
 * rewritten SSA frame).  It arrives with whatever registers it likes, so the code
 * uses no stack; it is this process's own and finds the entry in progress itself.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "enclave.h"
#include "thread.h"

int landing_map(uint64_t address)
{
    /* endbr64; movabs $entry_landed, %rax; jmp *%rax */
    uint8_t code[] = {0xf3, 0x0f, 0x1e, 0xfa, 0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0};
    uint64_t target = (uint64_t)(uintptr_t)entry_landed;
    uint8_t *page = mmap((void *)address, SGX_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
                         -1, 0);

    if (page == MAP_FAILED)
        return -errno;
    memset(page, 0xcc, SGX_PAGE); /* int3: nobody enters in the middle */
    memcpy(code + 6, &target, sizeof(target));
    memcpy(page, code, sizeof(code));
    return mprotect(page, SGX_PAGE, PROT_READ | PROT_EXEC) ? -errno : 0;
}
