/* SPDX-License-Identifier: Apache-2.0 */
#include <cpuid.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include "tests.h"

#define THREADS 3
#define TICKS 1500

static struct teemate_enclave *enclave;

static void *spin_thread(void *unused)
{
    (void)unused;
    LEFT(call(enclave, 0, OP_SPIN, 0, 0));
    return NULL;
}

static void a_busy_tcs_refuses_the_next(void)
{
    pthread_t other;
    bool refused = false;

    enclave = test_enclave_mapped(NULL);
    CHECK(pthread_create(&other, NULL, spin_thread, NULL) == 0);
    while (__atomic_load_n(&board(enclave)[ROUNDS], __ATOMIC_RELAXED) == 0)
        sched_yield();
    /* At a tick it is idle for a moment, and an entry at CSSA 1 succeeds. */
    for (int i = 0; i < 100 && !refused; i++) {
        struct result r = enter(enclave, 0, OP_NOTHING, 0, 0);
        refused = r.run.function == SGX_EENTER && r.run.exception_vector == SGX_VECTOR_GP;
    }
    CHECK(refused);
    board(enclave)[STOP] = 1;
    pthread_join(other, NULL);
    EQUAL(tcs_word(enclave, 0), IDLE(0));
}

static bool wide; /* YMM too */
static int64_t ticks_seen[THREADS];

struct registers {
    uint64_t gprs[14], rflags;
    double x87;
    uint8_t vectors[16][32];
};

/* A thread's page: what OP_PATTERN loads, and what it finds when it is done. */
struct pattern {
    uint64_t control[64];
    struct registers in;
    uint8_t gap[1536 - 512 - sizeof(struct registers)];
    struct registers out;
};
_Static_assert(offsetof(struct pattern, in) == 512, "as enclave.S has it");
_Static_assert(offsetof(struct pattern, out) == 1536, "as enclave.S has it");

static void *keep_registers(void *argument)
{
    unsigned n = (unsigned)(uintptr_t)argument, seed = n + 1;
    struct pattern *pattern = (struct pattern *)((uint8_t *)board(enclave) + n * 4096);
    struct thread *self = thread_get();

    for (unsigned round = 0; ticks_seen[n] < TICKS; round++) {
        uint64_t before = self->sequence;
        struct result r = {.regs = {.rdi = OP_PATTERN, .rsi = n * 4096, .rdx = 300000, .r8 = wide}};

        for (size_t i = 0; i < sizeof(pattern->in); i++)
            ((uint8_t *)&pattern->in)[i] = (uint8_t)rand_r(&seed);
        pattern->in.rflags = 0x202 | ((uint64_t)rand_r(&seed) & 0x8d5) | (round & 1 ? 0x400 : 0);
        pattern->in.x87 = 1.5 * rand_r(&seed);
        memset(&pattern->out, 0, sizeof(pattern->out));
        r.outcome = teemate_enter(enclave, tcs_of(n), &r.regs, SGX_EENTER, 0, &r.run);
        while (r.outcome == TEEMATE_PAUSED)
            r.outcome = teemate_enter(enclave, tcs_of(n), &r.regs, SGX_ERESUME, 0, &r.run);
        LEFT(r);
        EQUAL(pattern->control[6], 0); /* R11 and RSP */
        for (int i = 0; i < 14; i++)
            EQUAL(pattern->out.gprs[i], pattern->in.gprs[i]);
        EQUAL(pattern->out.rflags & 0xcd5, pattern->in.rflags & 0xcd5);
        CHECK(pattern->out.x87 == pattern->in.x87);
        for (int i = 0; i < 16; i++)
            CHECK(memcmp(pattern->out.vectors[i], pattern->in.vectors[i], wide ? 32 : 16) == 0);
        ticks_seen[n] += (int64_t)(self->sequence - before) / 2 - 1;
        EQUAL(tcs_word(enclave, n), IDLE(0));
    }
    return NULL;
}

static void keep_registers_in_threads(uint64_t xfrm)
{
    pthread_t threads[THREADS];

    setenv("TEEMATE_TICK", "20us-120us", 1);
    enclave = test_enclave_mapped(&(struct options){.xfrm = xfrm});
    for (uintptr_t n = 0; n < THREADS; n++)
        CHECK(pthread_create(&threads[n], NULL, keep_registers, (void *)n) == 0);
    for (int n = 0; n < THREADS; n++)
        pthread_join(threads[n], NULL);
}

static void registers_and_xmm_survive_thousands_of_ticks(void)
{
    keep_registers_in_threads(SGX_XFRM_LEGACY);
}

static void ymm_survives_where_xfrm_has_avx(void)
{
    uint32_t a, b, c, d;

    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_AVX)) {
        puts("skipped: this processor has no AVX");
        return;
    }
    wide = true;
    keep_registers_in_threads(SGX_XFRM_LEGACY | SGX_XFRM_AVX);
}

static void *short_calls(void *unused)
{
    (void)unused;
    while (!__atomic_load_n(&board(enclave)[STOP], __ATOMIC_RELAXED))
        LEFT(call(enclave, 1, OP_COUNT, 0, 20000));
    return NULL;
}

static void short_calls_show_idle_with_cssa_1_too(void)
{
    pthread_t other;

    setenv("TEEMATE_TICK", "20us-60us", 1);
    enclave = test_enclave_mapped(NULL);
    CHECK(pthread_create(&other, NULL, short_calls, NULL) == 0);
    while (tcs_word(enclave, 1) != IDLE(1))
        ;
    board(enclave)[STOP] = 1;
    pthread_join(other, NULL);
}

static void *one_call(void *argument)
{
    LEFT(call(enclave, (unsigned)(uintptr_t)argument, OP_NOTHING, 0, 0));
    return NULL;
}

static unsigned long address_space(void)
{
    unsigned long pages = 0;
    FILE *statm = fopen("/proc/self/statm", "re");

    CHECK(fscanf(statm, "%lu", &pages) == 1);
    fclose(statm);
    return pages;
}

static void threads_that_end_leave_nothing_behind(void)
{
    unsigned long after_first = 0;

    enclave = test_enclave_mapped(NULL);
    LEFT(enter(enclave, 0, OP_NOTHING, 0, 0));
    for (int round = 0; round < 60; round++) {
        pthread_t threads[8];

        for (uintptr_t n = 0; n < 8; n++)
            CHECK(pthread_create(&threads[n], NULL, one_call, (void *)n) == 0);
        for (int n = 0; n < 8; n++)
            pthread_join(threads[n], NULL);
        if (round == 0)
            after_first = address_space();
    }
    EQUAL(threads_count(), 1);
    /* 480 blocks would be 63 MiB; malloc's arenas may come and go. */
    CHECK(address_space() < after_first + 32 * 256 || address_space() - after_first > 1000000);
}

/* Threads with ticks, faults, landings at once: the books balance at the end. */
static void *mixed(void *argument)
{
    unsigned n = (unsigned)(uintptr_t)argument, seed = n;

    for (int i = 0; i < 300; i++) {
        struct result r;

        switch (rand_r(&seed) % 4) {
        case 0:
            FAULTED(call(enclave, n, OP_DIVIDE, 0, 0), SGX_ERESUME, SGX_VECTOR_DE);
            frame(enclave, n, 0)->rip += 3;
            do
                r = resume(enclave, n);
            while (r.outcome == TEEMATE_PAUSED);
            LEFT(r);
            break;
        case 1:
            LEFT(call(enclave, n, OP_COUNT, 1, 5000));
            break;
        case 2:
            EQUAL(call(enclave, n, OP_LANDING, 0, 0).outcome, TEEMATE_LANDED);
            break;
        default:
            LEFT(call(enclave, n, OP_REGISTERS, 0, 0));
        }
        EQUAL(tcs_word(enclave, n), IDLE(0));
    }
    return NULL;
}

static void calls_faults_and_ticks_mix(void)
{
    pthread_t threads[6];

    setenv("TEEMATE_TICK", "20us-60us", 1);
    enclave = test_enclave_mapped(NULL);
    for (uintptr_t n = 0; n < 6; n++)
        CHECK(pthread_create(&threads[n], NULL, mixed, (void *)n) == 0);
    for (int n = 0; n < 6; n++)
        pthread_join(threads[n], NULL);
}

static void a_tick_that_comes_late_interrupts_no_system_call(void)
{
    struct timespec pause = {.tv_nsec = 500000};
    pthread_t other;

    setenv("TEEMATE_TICK", "20us-40us", 1);
    enclave = test_enclave_mapped(NULL);
    CHECK(pthread_create(&other, NULL, short_calls, NULL) == 0);
    for (int i = 0; i < 300; i++) {
        LEFT(call(enclave, 2, OP_COUNT, 0, 3000));
        EQUAL(nanosleep(&pause, NULL), 0);
    }
    board(enclave)[STOP] = 1;
    pthread_join(other, NULL);
}

const struct test thread_tests[] = {
    TEST(a_busy_tcs_refuses_the_next),
    TEST(registers_and_xmm_survive_thousands_of_ticks),
    TEST(ymm_survives_where_xfrm_has_avx),
    TEST(short_calls_show_idle_with_cssa_1_too),
    TEST(threads_that_end_leave_nothing_behind),
    TEST(calls_faults_and_ticks_mix),
    TEST(a_tick_that_comes_late_interrupts_no_system_call),
    {0},
};
