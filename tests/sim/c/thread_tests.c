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

    SIM_ONLY("a TCS is idle at each interrupt, and an entry then takes its thread's frame");
    enclave = test_enclave_mapped(NULL);
    CHECK(pthread_create(&other, NULL, spin_thread, NULL) == 0);
    while (board_get(enclave, ROUNDS) == 0)
        sched_yield();
    /* At a tick it is idle for a moment, and an entry at CSSA 1 succeeds. */
    for (int i = 0; i < 100 && !refused; i++) {
        struct result r = call(enclave, 0, OP_NOTHING, 0, 0);
        refused = r.run.function == SGX_EENTER && r.run.exception_vector == SGX_VECTOR_GP;
    }
    CHECK(refused);
    board_set(enclave, STOP, 1);
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

static struct pattern patterns[THREADS];

static void *keep_registers(void *argument)
{
    unsigned n = (unsigned)(uintptr_t)argument, seed = n + 1;
    struct pattern *pattern = &patterns[n];
    struct thread *self = thread_get();

    for (unsigned round = 0; ticks_seen[n] < (on_sgx() ? TICKS / 10 : TICKS); round++) {
        uint64_t before = self->sequence;
        struct result r = {.regs = {.rdi = OP_PATTERN, .rsi = n * 4096, .rdx = 300000, .r8 = wide}};

        for (size_t i = 0; i < sizeof(pattern->in); i++)
            ((uint8_t *)&pattern->in)[i] = (uint8_t)rand_r(&seed);
        pattern->in.rflags = 0x202 | ((uint64_t)rand_r(&seed) & 0x8d5) | (round & 1 ? 0x400 : 0);
        pattern->in.x87 = 1.5 * rand_r(&seed);
        memset(&pattern->out, 0, sizeof(pattern->out));
        memory_write(enclave, DATA + n * 4096ull, pattern, sizeof(*pattern));
        r.outcome = teemate_enter(enclave, tcs_of(n), &r.regs, SGX_EENTER, 0, &r.run);
        while (r.outcome == TEEMATE_PAUSED)
            r.outcome = teemate_enter(enclave, tcs_of(n), &r.regs, r.run.function, 0, &r.run);
        LEFT(r);
        memory_read(enclave, DATA + n * 4096ull, pattern, sizeof(*pattern));
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

/* ---- a call goes on elsewhere ------------------------------------------------- */

static struct result paused;
static struct sgx_enclave_run paused_run;
static enum entry_stack stack_of_call;

static int enter_on_stack(uint32_t function, uint64_t op)
{
    struct teemate_regs regs = {.rdi = op, .rsi = SSA + 4096 - sizeof(struct sgx_gprs)};
    int outcome = enclave_enter(enclave, tcs_of(0), &regs, function, 1, stack_of_call, &paused_run);

    paused = (struct result){.outcome = outcome, .regs = regs, .run = paused_run};
    return outcome;
}

/* From a stack that is deeper by some pages, whose callers' frames are then written over. */
static __attribute__((noinline)) int resume_deeper(unsigned depth)
{
    volatile uint8_t frame[4096];
    int outcome;

    memset((void *)frame, (int)depth, sizeof(frame));
    outcome = depth ? resume_deeper(depth - 1) : enter_on_stack(SGX_ERESUME, 0);
    for (size_t i = 0; i < sizeof(frame); i++)
        EQUAL(frame[i], depth);
    return outcome;
}

static __attribute__((noinline)) int pause_deeper(unsigned depth)
{
    volatile uint8_t frame[4096];

    memset((void *)frame, 0x5a, sizeof(frame));
    return depth ? pause_deeper(depth - 1) : enter_on_stack(SGX_EENTER, stack_of_call == ENTRY_STACK_TCS ? OP_SPIN : OP_SPIN_URSP);
}

static void go_on_at_another_depth(enum entry_stack stack)
{
    stack_of_call = stack;
    enclave = test_enclave_mapped(NULL);
    EQUAL(pause_deeper(3), TEEMATE_PAUSED);
    for (unsigned depth = 0; depth < 12; depth += 3)
        EQUAL(resume_deeper(depth), TEEMATE_PAUSED);
    board_set(enclave, STOP, 1);
    while (resume_deeper(20) == TEEMATE_PAUSED)
        ;
    LEFT(paused);
    EQUAL(tcs_word(enclave, 0), IDLE(0));
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
}

static void a_paused_call_goes_on_from_another_depth_of_the_stack(void)
{
    go_on_at_another_depth(ENTRY_STACK_TCS);
}

static void a_paused_call_of_an_sdk_image_does_so_on_its_callers_stack(void)
{
    go_on_at_another_depth(ENTRY_STACK_CALLER);
}

static void *pause_thread(void *unused)
{
    (void)unused;
    EQUAL(pause_deeper(5), TEEMATE_PAUSED);
    return NULL;
}

static void *end_thread(void *unused)
{
    (void)unused;
    board_set(enclave, STOP, 1);
    while (resume_deeper(1) == TEEMATE_PAUSED)
        ;
    return NULL;
}

static void go_on_in_another_thread(enum entry_stack stack)
{
    pthread_t thread;

    stack_of_call = stack;
    enclave = test_enclave_mapped(NULL);
    CHECK(pthread_create(&thread, NULL, pause_thread, NULL) == 0);
    pthread_join(thread, NULL); /* and its stack is gone */
    EQUAL(resume_deeper(2), TEEMATE_PAUSED);
    CHECK(pthread_create(&thread, NULL, end_thread, NULL) == 0);
    pthread_join(thread, NULL);
    LEFT(paused);
    EQUAL(tcs_word(enclave, 0), IDLE(0));
}

static void a_paused_call_goes_on_in_another_thread(void)
{
    go_on_in_another_thread(ENTRY_STACK_TCS);
}

static void a_paused_call_of_an_sdk_image_goes_on_in_another_thread(void)
{
    go_on_in_another_thread(ENTRY_STACK_CALLER);
}

static void *short_calls(void *unused)
{
    (void)unused;
    while (!board_get(enclave, STOP))
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
    board_set(enclave, STOP, 1);
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
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
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
            frame_skip(enclave, n, 0, 3);
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
    board_set(enclave, STOP, 1);
    pthread_join(other, NULL);
}

const struct test thread_tests[] = {
    TEST(a_busy_tcs_refuses_the_next),
    TEST(registers_and_xmm_survive_thousands_of_ticks),
    TEST(ymm_survives_where_xfrm_has_avx),
    TEST(a_paused_call_goes_on_from_another_depth_of_the_stack),
    TEST(a_paused_call_of_an_sdk_image_does_so_on_its_callers_stack),
    TEST(a_paused_call_goes_on_in_another_thread),
    TEST(a_paused_call_of_an_sdk_image_goes_on_in_another_thread),
    TEST(short_calls_show_idle_with_cssa_1_too),
    TEST(threads_that_end_leave_nothing_behind),
    TEST(calls_faults_and_ticks_mix),
    TEST(a_tick_that_comes_late_interrupts_no_system_call),
    {0},
};
