/* SPDX-License-Identifier: Apache-2.0 */
/* Between the SDK's locks, OCALLs and heap. */
#ifndef TMSDK_LOCK_H
#define TMSDK_LOCK_H

#include "thread.h"

/* May this thread leave the enclave now: in a client's ECALL, holding nothing? */
bool ocall_possible(void);
void ocall_wait(enum tm_ocall kind, uint32_t index, uint32_t expected, uint64_t timeout_ns);

/* tm_trylock(), so often: who cannot wait for a lock may still meet one that is about to be given back. */
int lock_spin(struct tm_mutex *mutex, uint32_t spins);

/* A word as the open transaction would leave it. */
uint64_t txn_get(const struct tm_txn *txn, const void *where);
/* Do what the thread's redo record says, as often as it takes. */
void redo_apply(struct thread *thread);

#endif
