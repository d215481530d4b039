/* SPDX-License-Identifier: Apache-2.0 */
/* The part of libc that compilers call by themselves, and what is like it. */
#include "crypto.h"
#include "thread.h"

/* Moves that compile to one load and one store, whatever the alignment. */
typedef uint64_t word __attribute__((aligned(1), may_alias));
typedef uint32_t half __attribute__((aligned(1), may_alias));
typedef long long vector __attribute__((vector_size(16), aligned(1), may_alias));

#define REP_MOVS 256u /* from here on its start-up cost is made up for */

void *memcpy(void *restrict to, const void *restrict from, size_t length)
{
    uint8_t *target = to;
    const uint8_t *source = from;
    void *result = to;

    if (length >= REP_MOVS) {
        __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(length) : : "memory");
    } else if (length >= 16) {
        /* The last 16 bytes first: they may overlap what the loop moves. */
        vector last = *(const vector *)(source + length - 16);

        for (size_t i = 0; i + 16 < length; i += 16)
            *(vector *)(target + i) = *(const vector *)(source + i);
        *(vector *)(target + length - 16) = last;
    } else if (length >= 8) {
        word first = *(const word *)source, last = *(const word *)(source + length - 8);

        *(word *)target = first;
        *(word *)(target + length - 8) = last;
    } else if (length >= 4) {
        half first = *(const half *)source, last = *(const half *)(source + length - 4);

        *(half *)target = first;
        *(half *)(target + length - 4) = last;
    } else {
        for (size_t i = 0; i < length; i++)
            *(volatile uint8_t *)(target + i) = source[i];
    }
    return result;
}

void *memmove(void *to, const void *from, size_t length)
{
    uint8_t *target = to;
    const uint8_t *source = from;

    if ((uintptr_t)target - (uintptr_t)source >= length) {
        __asm__ volatile("rep movsb" : "+D"(target), "+S"(source), "+c"(length) : : "memory");
        return to;
    }
    /* Backwards by words without touching DF, so that an AEX never shows it set. */
    while (length >= 8) {
        uint64_t word;

        length -= 8;
        __builtin_memcpy(&word, source + length, 8);
        __builtin_memcpy(target + length, &word, 8);
    }
    while (length--)
        *(volatile uint8_t *)(target + length) = source[length];
    return to;
}

void *memset(void *to, int byte, size_t length)
{
    void *result = to;

    __asm__ volatile("rep stosb" : "+D"(to), "+c"(length) : "a"(byte) : "memory");
    return result;
}

int memcmp(const void *a, const void *b, size_t length)
{
    const volatile uint8_t *x = a, *y = b;

    for (size_t i = 0; i < length; i++)
        if (x[i] != y[i])
            return x[i] < y[i] ? -1 : 1;
    return 0;
}

size_t strlen(const char *text)
{
    const volatile char *end = text;

    while (*end)
        end++;
    return (size_t)(end - (const volatile char *)text);
}

int strcmp(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return (uint8_t)*a - (uint8_t)*b;
}

int tm_compare(const void *a, const void *b, size_t length)
{
    return crypto_compare(a, b, length);
}

void tm_wipe(void *data, size_t length)
{
    crypto_wipe(data, length);
}

/* What the compiler calls when a canary was overwritten. */
void __stack_chk_fail(void);
__attribute__((noreturn)) void __stack_chk_fail(void)
{
    __builtin_trap();
}

bool range_outside(uint64_t address, uint64_t length)
{
    uint64_t base = enclave_base(), end;

    if (__builtin_add_overflow(address, length, &end))
        return false;
    return end <= base || address >= base + header()->size;
}

const void *tm_enclave_base(void)
{
    return __tm_base;
}

bool tm_is_outside(const void *address, size_t length)
{
    return range_outside((uint64_t)address, length);
}

uint64_t random_word(void)
{
    unsigned long long word;

    /* Intel's guide: 10 tries are ample; under SGX the host can starve us, so more. */
    for (int tries = 0; tries < 1000; tries++)
        if (__builtin_ia32_rdrand64_step(&word))
            return word;
    tm_panic();
}

void tm_random(void *data, size_t length)
{
    uint8_t *out = data;

    while (length) {
        uint64_t word = random_word();
        size_t some = length < 8 ? length : 8;

        memcpy(out, &word, some);
        out += some;
        length -= some;
    }
}
