/* SPDX-License-Identifier: Apache-2.0 */
/* What only instructions tell about the host; files tell the rest (`teemate doctor`). */
#include <cpuid.h>
#include <errno.h>

#include "sgx.h"

int teemate_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t registers[4])
{
    /* Hypervisors answer their own leaves, when they say that they are there (CPUID.1:ECX[31]). */
    if (leaf >= 0x40000000u && leaf < 0x40010000u) {
        __cpuid(1, registers[0], registers[1], registers[2], registers[3]);
        if (!(registers[2] & 1u << 31))
            return -ENXIO;
        __cpuid_count(leaf, subleaf, registers[0], registers[1], registers[2], registers[3]);
        return 0;
    }
    /* __get_cpuid_count asks for the highest leaf first: an Intel processor answers a leaf above
     * it with the data of another one (SDM 2A, CPUID). */
    if (!__get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]))
        return -ENXIO;
    return 0;
}

uint64_t teemate_xcr0(void)
{
    uint32_t registers[4], low, high;

    if (teemate_cpuid(1, 0, registers) < 0 || !(registers[2] & bit_OSXSAVE))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

int teemate_vdso_enters(void)
{
    return sgx_vdso_function() != NULL;
}
