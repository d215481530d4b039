/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Several words at once: a redo record in the slot's thread data.  It is valid from the
 * store of its count until the store that takes it away; whoever repairs the slot
 * does what it says again, which is as doing it once.
 */
#include "lock.h"

void tm_txn_begin(struct tm_txn *txn)
{
    txn->count = 0;
    txn->overflow = 0;
}

uint64_t txn_get(const struct tm_txn *txn, const void *where)
{
    for (uint32_t i = 0; i < txn->count; i++)
        if (txn->writes[i].where == where)
            return txn->writes[i].value;
    return *(const uint64_t *)where;
}

void tm_txn_set(struct tm_txn *txn, uint64_t *where, uint64_t value)
{
    /* A later write to the same word wins, so that readers of the record need no order. */
    for (uint32_t i = 0; i < txn->count; i++) {
        if (txn->writes[i].where == where) {
            txn->writes[i].value = value;
            return;
        }
    }
    txn_add(txn, where, value);
}

void tm_txn_set_ptr(struct tm_txn *txn, void *where, const void *value)
{
    tm_txn_set(txn, where, (uint64_t)value);
}

/* The record first, its count last: from that store on the writes will happen. */
void tm_txn_commit(struct tm_txn *txn)
{
    struct thread *self = thread_self();

    tm_assert(!txn->overflow && !self->redo_count);
    for (uint32_t i = 0; i < txn->count; i++) {
        self->redo[i].where = txn->writes[i].where;
        self->redo[i].value = txn->writes[i].value;
    }
    __atomic_store_n(&self->redo_count, txn->count, __ATOMIC_RELEASE);
    redo_apply(self);
}

void redo_apply(struct thread *thread)
{
    uint64_t count = __atomic_load_n(&thread->redo_count, __ATOMIC_ACQUIRE);

    for (uint64_t i = 0; i < count && i < TD_REDO; i++)
        __atomic_store_n(thread->redo[i].where, thread->redo[i].value, __ATOMIC_RELAXED);
    __atomic_store_n(&thread->redo_count, 0, __ATOMIC_RELEASE);
}
