/* SPDX-License-Identifier: Apache-2.0 */
/* Between the SDK's locks, OCALLs and heap. */
#ifndef TMSDK_LOCK_H
#define TMSDK_LOCK_H

#include "thread.h"

/* May this thread leave the enclave now: in a client's ECALL, holding nothing? */
bool ocall_possible(void);
void ocall_wait(enum tm_ocall kind, uint32_t index, uint32_t expected, uint64_t timeout_ns);

/* The arena's word for waits at `object`, and its value: read that before the condition. */
uint32_t arena_index(const void *object);
uint32_t arena_read(uint32_t index);
#define WAIT_NS 100000000ull /* the longest wait: then look again */

/* ocall.c: the calling process does it (TM_STORAGE_CALLER); `data` is written or read. */
int64_t ocall_file(const struct tm_file_request *request, void *data);

/* tm_trylock(), so often: who cannot wait for a lock may still meet one that is about to be given back. */
int lock_spin(struct tm_mutex *mutex, uint32_t spins);

/* tm_txn_set() of a word that the transaction does not set again and does not read: nothing to look for. */
static inline void txn_add(struct tm_txn *txn, uint64_t *where, uint64_t value)
{
    if (txn->count == TM_TXN_MAX) {
        txn->overflow = 1;
        return;
    }
    txn->writes[txn->count].where = where;
    txn->writes[txn->count++].value = value;
}
/* A word as the open transaction would leave it. */
uint64_t txn_get(const struct tm_txn *txn, const void *where);
/* Do what the thread's redo record says, as often as it takes. */
void redo_apply(struct thread *thread);

#endif
