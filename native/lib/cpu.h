/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which of the instructions that the cryptography can use are there.
 *
 * CPUID is not allowed inside an enclave (SDM 3D, "Illegal Instructions"), and
 * in a virtual machine it costs a trap, so it is asked once per file that includes
 * this.  TEEMATE_CRYPTO_PORTABLE leaves only plain C: tests compare both ways.
 */
#ifndef TEEMATE_CPU_H
#define TEEMATE_CPU_H

#define CPU_AES 1u   /* AES-NI, PCLMULQDQ and SSSE3 */
#define CPU_SHA 2u   /* the SHA extensions and SSE4.1 */
#define CPU_AVX2 4u  /* AVX2 and BMI2, switched on by the operating system; never inside an enclave */
#define CPU_KNOWN 8u /* CPUID has been asked */

#if defined(TEEMATE_CRYPTO_PORTABLE)

static inline unsigned cpu_features(void)
{
    return CPU_KNOWN;
}

#elif defined(TEEMATE_ENCLAVE)

/* Every CPU with SGX has AES-NI; the SHA extensions came later (TEEMATE_ENCLAVE_SHA). */
static inline unsigned cpu_features(void)
{
#ifdef TEEMATE_ENCLAVE_SHA
    return CPU_KNOWN | CPU_AES | CPU_SHA;
#else
    return CPU_KNOWN | CPU_AES;
#endif
}

#else

#include <cpuid.h>

static inline unsigned cpu_features(void)
{
    /* Two threads that come here at once write the same value. */
    static unsigned cached;
    unsigned features = __atomic_load_n(&cached, __ATOMIC_RELAXED);
    if (features)
        return features;

    unsigned a, b, c, d;
    unsigned leaf1_ecx = 0, leaf7_ebx = 0;
    if (__get_cpuid(1, &a, &b, &c, &d))
        leaf1_ecx = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d))
        leaf7_ebx = b;
    features = CPU_KNOWN;
    if ((leaf1_ecx & bit_AES) && (leaf1_ecx & bit_PCLMUL) && (leaf1_ecx & bit_SSSE3))
        features |= CPU_AES;
    if ((leaf1_ecx & bit_OSXSAVE) && (leaf7_ebx & bit_AVX2) && (leaf7_ebx & bit_BMI2)) {
        unsigned low, high;
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        if ((low & 6) == 6) /* XCR0: SSE and AVX state */
            features |= CPU_AVX2;
    }
    if ((leaf7_ebx & bit_SHA) && (leaf1_ecx & bit_SSE4_1) && (leaf1_ecx & bit_SSSE3))
        features |= CPU_SHA;
#ifdef TEEMATE_CRYPTO_NO_SHA /* tests: a CPU without the SHA extensions */
    features &= ~CPU_SHA;
#endif
    __atomic_store_n(&cached, features, __ATOMIC_RELAXED);
    return features;
}

#endif

#endif
