/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linked with the vault: what the tests kill callers in, and how they look at what is
 * left.  Numbers in requests and replies are u64, little endian.
 */
#include "tmsdk.h"

static uint64_t argument(const struct tm_request *rq, size_t n)
{
    uint64_t value = 0;

    if (rq->in_len >= (n + 1) * sizeof(value))
        memcpy(&value, rq->in + n * sizeof(value), sizeof(value));
    return value;
}

/* struct tm_heap_stats of a check of every block. */
TM_ECALL(heap_check)
{
    struct tm_heap_stats stats;
    int status = tm_heap_check(&stats);

    return status ? status : tm_reply(rq, &stats, sizeof(stats));
}

/* Allocate so many bytes, and once more for every further number; the slot owns them. */
TM_ECALL(take)
{
    void **blocks = tm_slot_data();
    int status = 0;

    for (size_t n = 0; !status && (n + 1) * 8 <= rq->in_len; n++)
        status = tm_try_alloc(argument(rq, n), &blocks[n]);
    return status;
}

/* Free those whose places are named. */
TM_ECALL(give)
{
    void **blocks = tm_slot_data();

    for (size_t n = 0; (n + 1) * 8 <= rq->in_len; n++) {
        tm_free(blocks[argument(rq, n)]);
        blocks[argument(rq, n)] = NULL;
    }
    return 0;
}

/* More blocks than a slot's list has room for, of so many bytes each. */
TM_ECALL(hoard)
{
    for (uint64_t n = argument(rq, 0); n; n--)
        if (!tm_alloc(argument(rq, 1)))
            return TM_E_NOMEM;
    return 0;
}

/*
 * Move a number from one account to the other, under a lock each, and note it in a block
 * that takes the place of the last note: four locks' worth of things to go wrong at once.
 */
static struct {
    struct tm_mutex left, right;
    uint64_t accounts[2];
    uint64_t *note;
} bank;

static int take_lock(struct tm_mutex *mutex)
{
    int status = tm_lock(mutex);

    if (status == TM_E_OWNERDEAD) {
        tm_mutex_consistent(mutex);
        status = 0;
    }
    return status;
}

TM_ECALL(transfer)
{
    uint64_t *note, *old = NULL, amount = argument(rq, 0);
    struct tm_txn txn;
    int status = take_lock(&bank.left);

    if (status)
        return status;
    status = take_lock(&bank.right);
    if (status) {
        tm_unlock(&bank.left);
        return status;
    }
    note = tm_alloc(40);
    if (note) {
        old = bank.note;
        note[0] = bank.accounts[1] + amount;
        tm_txn_begin(&txn);
        tm_txn_set(&txn, &bank.accounts[0], bank.accounts[0] - amount);
        tm_txn_set(&txn, &bank.accounts[1], note[0]);
        tm_txn_set_ptr(&txn, &bank.note, note);
        tm_txn_keep(&txn, note);
        if (old)
            tm_txn_own(&txn, old);
        tm_txn_commit(&txn);
    }
    tm_unlock(&bank.left);
    tm_free(old);
    tm_unlock(&bank.right);
    return note ? 0 : TM_E_NOMEM;
}

/* Both accounts, and what the note says. */
TM_ECALL(balance)
{
    uint64_t told[3];
    int status = take_lock(&bank.left);

    if (status)
        return status;
    status = take_lock(&bank.right);
    if (!status) {
        told[0] = bank.accounts[0];
        told[1] = bank.accounts[1];
        told[2] = bank.note ? bank.note[0] : 0;
        tm_unlock(&bank.right);
    }
    tm_unlock(&bank.left);
    return status ? status : tm_reply(rq, told, sizeof(told));
}

/* How often 100 ms are waited for a lock. */
TM_ECALL(patience)
{
    tm_lock_patience = (uint32_t)argument(rq, 0);
    return 0;
}
