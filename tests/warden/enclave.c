/* SPDX-License-Identifier: Apache-2.0 */
/* An enclave that does what wardens and slots have to live with. */
#include "tmsdk.h"
#include "thread.h" /* header() */

/* The wake counter by which a test sees that the enclave hangs (warden_harness.py). */
#define HANGS_WORD (TM_ARENA_WORDS - 1)

static struct tm_mutex lock;
static volatile uint32_t released;
static uint64_t reset_hangs;
static volatile uint64_t starts;

static void say_that_it_hangs(void)
{
    uint32_t *arena = (void *)TM_ARENA((uint64_t)tm_enclave_base(), header()->size);

    __atomic_store_n(&arena[HANGS_WORD], 1, __ATOMIC_RELEASE);
}

static void hang(void)
{
    say_that_it_hangs();
    for (;;)
        __asm__ volatile("pause");
}

int tm_on_start(void)
{
    starts++;
#ifdef HANG_AT_START
    if (starts == 1)
        hang();
#endif
    return 0;
}

void tm_on_slot_reset(uint32_t slot)
{
    (void)slot;
    if (reset_hangs > 0) {
        reset_hangs--;
        hang();
    }
}

TM_ECALL(empty)
{
    return 0;
}

TM_ECALL(echo)
{
    return tm_reply(rq, rq->in, rq->in_len);
}

TM_ECALL(status)
{
    return rq->in_len > 0 ? rq->in[0] : 0;
}

TM_ECALL(whoami)
{
    struct tm_caller caller = tm_caller();

    return tm_reply(rq, &caller, sizeof(caller));
}

/* Ask the caller for `in`, and give back what it says. */
TM_ECALL(ask)
{
    uint8_t answer[512];
    size_t length = 0;
    int status = tm_ocall("question", rq->in, rq->in_len, answer, sizeof(answer), &length);

    return status < 0 ? status : tm_reply(rq, answer, length);
}

TM_ECALL(say)
{
    tm_print("enclave says \x1b[31m%s\n", "hello");
    return 0;
}

TM_ECALL(divide)
{
    volatile int zero = 0;

    return 1000 / zero;
}

TM_ECALL(spin)
{
    hang();
    return 0;
}

/* Spin until somebody calls `release`, with the lock held. */
TM_ECALL(hold)
{
    int status = tm_lock(&lock);

    if (status == TM_E_OWNERDEAD)
        tm_mutex_consistent(&lock);
    else if (status < 0)
        return status;
    say_that_it_hangs();
    while (!released)
        __asm__ volatile("pause");
    tm_unlock(&lock);
    return 0;
}

TM_ECALL(release)
{
    released = 1;
    return 0;
}

TM_ECALL(take)
{
    int status = tm_lock(&lock);

    if (status == TM_E_OWNERDEAD)
        tm_mutex_consistent(&lock);
    if (status == 0 || status == TM_E_OWNERDEAD)
        tm_unlock(&lock);
    return status;
}

TM_ECALL(starts)
{
    uint64_t count = starts;

    return tm_reply(rq, &count, sizeof(count));
}

TM_ECALL(clock)
{
    uint64_t now = tm_time();

    return tm_reply(rq, &now, sizeof(now));
}

TM_CONTROL(echo)
{
    return tm_reply(rq, rq->in, rq->in_len);
}

TM_CONTROL(hang)
{
    hang();
    return 0;
}

TM_CONTROL(hang_with_lock)
{
    if (tm_lock(&lock) < 0)
        return 1;
    hang();
    return 0;
}

TM_CONTROL(crash)
{
    tm_panic();
    return 0;
}

TM_CONTROL(hang_next_reset)
{
    reset_hangs = 1;
    return 0;
}
