/* SPDX-License-Identifier: Apache-2.0 */
/*
 * XSAVE areas in the standard form (SDM volume 1, chapter 13): what an SSA frame and
 * the kernel's signal frame both hold.  No TLS, no libc where it is called while inside.
 */
#include <cpuid.h>
#include <pthread.h>

#include "sim_thread.h"

#define COMPONENTS 19u /* AMX TILEDATA is 18; XFRM knows nothing above */
#define LEGACY_SSE_END 416u
#define HEADER_END 576u

static struct {
    uint32_t offset, size;
} place[COMPONENTS];
static uint64_t xcr0;

/*
 * Before anybody is inside: CPUID must not be needed there.  And once, and no more than is needed: where a hypervisor
 * answers it, it takes as long as ten system calls.
 */
__attribute__((constructor)) static void find_xcr0(void)
{
    uint32_t a, b, c, d;

    __cpuid(1, a, b, c, d);
    if (!(c & bit_OSXSAVE))
        return;
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    xcr0 = (uint64_t)d << 32 | a;
}

static void find_places(void)
{
    uint32_t a, b, c, d;

    if (__get_cpuid_max(0, NULL) < 0xd)
        return;
    for (uint32_t i = 2; i < COMPONENTS; i++) {
        if (!(xcr0 >> i & 1))
            continue;
        __cpuid_count(0xd, i, a, b, c, d);
        place[i].size = a;
        place[i].offset = b;
    }
}

void sim_xsave_prepare(uint64_t xfrm)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    if (xfrm & ~(uint64_t)SGX_XFRM_LEGACY)
        pthread_once(&once, find_places);
}

uint64_t sim_xcr0(void)
{
    return xcr0;
}

uint32_t sim_xsave_size(uint64_t xfrm)
{
    uint32_t size = HEADER_END;

    sim_xsave_prepare(xfrm);
    for (uint32_t i = 2; i < COMPONENTS; i++)
        if (xfrm >> i & 1 && place[i].offset + place[i].size > size)
            size = place[i].offset + place[i].size;
    return size;
}

static void copy(uint8_t *to, const uint8_t *from, uint64_t length)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(length) : : "memory");
}

void sim_xsave_copy(uint8_t *to, const uint8_t *from, uint64_t xfrm)
{
    copy(to, from, LEGACY_SSE_END);
    for (uint32_t i = LEGACY_SSE_END; i < HEADER_END; i++)
        to[i] = 0;
    *(uint64_t *)(to + 512) = *(const volatile uint64_t *)(from + 512) & xfrm;
    for (uint32_t i = 2; i < COMPONENTS; i++)
        if (xfrm >> i & 1)
            copy(to + place[i].offset, from + place[i].offset, place[i].size);
}
