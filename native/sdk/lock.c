/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Robust locks.  The holder (slot and generation) stands in the lock, in EPC; the
 * slot's thread data lists what it holds and names the lock that it is about to
 * take or leave (`pending`).  So whoever repairs a slot finds every lock of its:
 * all in the list, and the pending one if its holder is this slot.
 *
 * The arena outside holds wake counters only.  A waiter reads the counter, looks
 * at the lock again, and waits until the counter changes, 100 ms at most; a host
 * that lies about them costs time and nothing else.
 */
#include "lock.h"

#define WAITERS (1ull << 63)    /* somebody waits: unlocking wakes */
#define OWNERDEAD (1ull << 62)  /* set by repair; stays until tm_mutex_consistent() */
#define HOLDER(word) ((word) & ~(WAITERS | OWNERDEAD))
#define SPINS 200u
/* While another lock is held nobody may leave: about 50 ms of PAUSE. */
#define NESTED_SPINS (1u << 20)
/* A warden that makes something ready has others waiting for it: a few ms. */
#define READY_SPINS (1u << 15)

uint32_t tm_lock_patience = 20;

static uint64_t me(const struct thread *self)
{
    return TM_WORD_GENERATION(self->word) << 16 | (self->fixed.index + 1);
}

uint32_t arena_index(const void *object)
{
    uint64_t hash = ((uint64_t)object - enclave_base()) * 0x9e3779b97f4a7c15ull;

    return (uint32_t)(hash >> 54); /* 10 bits: TM_ARENA_WORDS */
}
_Static_assert(TM_ARENA_WORDS == 1024, "arena_index");

uint32_t arena_read(uint32_t index)
{
    const uint32_t *arena = (const void *)TM_ARENA(enclave_base(), header()->size);

    return __atomic_load_n(&arena[index], __ATOMIC_ACQUIRE);
}

static bool swap(struct tm_mutex *mutex, uint64_t *expected, uint64_t desired)
{
    return __atomic_compare_exchange_n((uint64_t *)&mutex->holder, expected, desired, false,
                                       __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* Into the slot's list; `pending` covers the time in between. */
static void note(struct thread *self, struct tm_mutex *mutex)
{
    self->locks[self->lock_count] = mutex;
    __atomic_store_n(&self->lock_count, self->lock_count + 1, __ATOMIC_RELEASE);
    __atomic_store_n(&self->pending, NULL, __ATOMIC_RELEASE);
    mutex->acquired++;
}

/* Take a free lock: 0, TM_E_OWNERDEAD or TM_E_BUSY. */
static int take(struct thread *self, struct tm_mutex *mutex, uint64_t flags)
{
    uint64_t word = mutex->holder;

    while (!HOLDER(word)) {
        __atomic_store_n(&self->pending, mutex, __ATOMIC_SEQ_CST);
        if (swap(mutex, &word, word | me(self) | flags)) {
            note(self, mutex);
            return word & OWNERDEAD ? TM_E_OWNERDEAD : 0;
        }
        __atomic_store_n(&self->pending, NULL, __ATOMIC_RELEASE);
    }
    return TM_E_BUSY;
}

int tm_trylock(struct tm_mutex *mutex)
{
    return lock_spin(mutex, 1);
}

int lock_spin(struct tm_mutex *mutex, uint32_t spins)
{
    struct thread *self = thread_self();
    int status = TM_E_BUSY;

    tm_assert(self->lock_count < TD_LOCKS);
    while (spins-- && (status = take(self, mutex, 0)) == TM_E_BUSY)
        __builtin_ia32_pause();
    return status;
}

static int refuse(struct thread *self, struct tm_mutex *mutex)
{
    self->refused = tm_mutex_holder(mutex);
    return TM_E_BUSY;
}

/* Tell unlockers that somebody waits; false when the lock became free instead. */
static bool announce(struct tm_mutex *mutex)
{
    uint64_t word = mutex->holder;

    while (HOLDER(word))
        if (word & WAITERS || swap(mutex, &word, word | WAITERS))
            return true;
    return false;
}

int tm_lock(struct tm_mutex *mutex)
{
    struct thread *self = thread_self();
    uint64_t seen = mutex->acquired, flags = 0;
    uint32_t rounds = 0, index = arena_index(mutex);
    bool nested = !ocall_possible();
    int status;

    tm_assert(HOLDER(mutex->holder) != me(self)); /* not recursive */
    status = lock_spin(mutex, self->for_slot ? READY_SPINS : nested ? NESTED_SPINS : SPINS);
    if (status != TM_E_BUSY)
        return status;
    if (nested)
        return refuse(self, mutex);
    for (;;) {
        uint32_t counter = arena_read(index);

        /* Having waited, leave the flag behind: others may be waiting too. */
        if (!announce(mutex)) {
            status = take(self, mutex, flags);
            if (status != TM_E_BUSY)
                return status;
            continue;
        }
        flags = WAITERS;
        ocall_wait(TM_OCALL_WAIT, index, counter, WAIT_NS);
        status = take(self, mutex, flags);
        if (status != TM_E_BUSY)
            return status;
        if (mutex->acquired != seen) {
            seen = mutex->acquired; /* it moves: others were faster */
            rounds = 0;
        } else if (++rounds >= tm_lock_patience) {
            return refuse(self, mutex);
        }
    }
}

/* Give it back without waking: true when somebody waits. */
static bool release(struct thread *self, struct tm_mutex *mutex)
{
    uint64_t place = self->lock_count, word = mutex->holder;

    while (place && self->locks[place - 1] != mutex)
        place--;
    tm_assert(place && HOLDER(word) == me(self));
    __atomic_store_n(&self->pending, mutex, __ATOMIC_SEQ_CST);
    self->locks[place - 1] = self->locks[self->lock_count - 1];
    __atomic_store_n(&self->lock_count, self->lock_count - 1, __ATOMIC_RELEASE);
    while (!swap(mutex, &word, word & OWNERDEAD))
        ;
    __atomic_store_n(&self->pending, NULL, __ATOMIC_RELEASE);
    return word & WAITERS;
}

void tm_unlock(struct tm_mutex *mutex)
{
    struct thread *self = thread_self();

    /* Who holds another lock cannot leave to wake; waiters then look by themselves. */
    if (release(self, mutex) && ocall_possible())
        ocall_wait(TM_OCALL_WAKE, arena_index(mutex), 1, 0);
}

void tm_mutex_consistent(struct tm_mutex *mutex)
{
    uint64_t word = mutex->holder;

    tm_assert(HOLDER(word) == me(thread_self()));
    while (!swap(mutex, &word, word & ~OWNERDEAD))
        ;
}

struct tm_holder tm_mutex_holder(const struct tm_mutex *mutex)
{
    uint64_t holder = HOLDER(mutex->holder);
    struct tm_holder result = {0};

    if (holder) {
        result.slot = (uint32_t)(holder & 0xffff) - 1;
        result.generation = holder >> 16;
    }
    return result;
}

struct tm_holder lock_refused(void)
{
    return thread_self()->refused;
}

int tm_cond_wait(struct tm_cond *cond, struct tm_mutex *mutex)
{
    struct thread *self = thread_self();
    uint32_t index = arena_index(cond);
    uint64_t before = cond->signals;
    uint32_t counter = arena_read(index);

    tm_assert(self->lock_count == 1);
    if (release(self, mutex) && ocall_possible())
        ocall_wait(TM_OCALL_WAKE, arena_index(mutex), 1, 0);
    if (cond->signals == before && ocall_possible())
        ocall_wait(TM_OCALL_WAIT, index, counter, WAIT_NS);
    return tm_lock(mutex);
}

static void signal(struct tm_cond *cond, uint32_t waiters)
{
    cond->signals++;
    /* Holding a lock nobody may leave: then waiters find out within 100 ms. */
    if (ocall_possible())
        ocall_wait(TM_OCALL_WAKE, arena_index(cond), waiters, 0);
}

void tm_cond_signal(struct tm_cond *cond)
{
    signal(cond, 1);
}

void tm_cond_broadcast(struct tm_cond *cond)
{
    signal(cond, TM_MAX_SLOTS);
}

/* The holder is gone: its locks are free, and say so to the next. */
static void bury(struct tm_mutex *mutex, uint64_t slot)
{
    uint64_t word = mutex->holder;

    while ((HOLDER(word) & 0xffff) == slot + 1)
        if (swap(mutex, &word, (word & WAITERS) | OWNERDEAD))
            return;
}

void thread_recover(struct thread *thread)
{
    uint64_t slot = thread->fixed.index;

    /* Before the locks: what it was writing has to be whole for the next who gets them. */
#ifndef TM_TEST_NO_REDO
    redo_apply(thread);
#endif
    thread->redo_count = 0;
    if (thread->pending)
        bury(thread->pending, slot);
    for (uint64_t i = 0; i < thread->lock_count && i < TD_LOCKS; i++)
        bury(thread->locks[i], slot);
    thread->pending = NULL;
    thread->lock_count = 0;
}
