/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An enclave that does with files what its callers say.  Each ECALL answers what tm_file_*() returned, as an i64,
 * and then what was read; its input is struct order, the name, and the data.
 */
#include "files.h"
#include "tmsdk.h"

struct order {
    uint32_t handle;
    uint32_t flags;
    uint64_t offset;
    uint64_t length;
};

static int answer(struct tm_request *rq, int64_t result)
{
    return tm_reply(rq, &result, sizeof(result));
}

static const struct order *order(const struct tm_request *rq)
{
    return rq->in_len >= sizeof(struct order) ? (const void *)rq->in : NULL;
}

/* What follows the order, as a name. */
static const char *name(const struct tm_request *rq, char text[128])
{
    size_t length = rq->in_len - sizeof(struct order);

    if (length > 127)
        length = 127;
    memcpy(text, rq->in + sizeof(struct order), length);
    text[length] = 0;
    return text;
}

TM_ECALL(open)
{
    char text[128];
    uint32_t handle = 0;
    int result;

    if (!order(rq))
        return TM_E_ARGUMENT;
    result = tm_file_open(name(rq, text), order(rq)->flags, &handle);
    return answer(rq, result ? result : (int64_t)handle);
}

TM_ECALL(close)
{
    return order(rq) ? answer(rq, tm_file_close(order(rq)->handle)) : TM_E_ARGUMENT;
}

TM_ECALL(read)
{
    uint8_t *buffer;
    int64_t result;

    if (!order(rq) || order(rq)->length > TM_FILE_MOST + 1)
        return TM_E_ARGUMENT;
    buffer = tm_alloc(order(rq)->length + 1);
    if (!buffer)
        return TM_E_NOMEM;
    result = tm_file_read(order(rq)->handle, order(rq)->offset, buffer, order(rq)->length);
    answer(rq, result);
    if (result > 0)
        tm_reply(rq, buffer, (size_t)result);
    tm_free(buffer);
    return 0;
}

TM_ECALL(write)
{
    if (!order(rq))
        return TM_E_ARGUMENT;
    return answer(rq, tm_file_write(order(rq)->handle, order(rq)->offset, rq->in + sizeof(struct order),
                                    rq->in_len - sizeof(struct order)));
}

TM_ECALL(sync)
{
    return order(rq) ? answer(rq, tm_file_sync(order(rq)->handle)) : TM_E_ARGUMENT;
}

TM_ECALL(size)
{
    return order(rq) ? answer(rq, tm_file_size(order(rq)->handle)) : TM_E_ARGUMENT;
}

TM_ECALL(truncate)
{
    return order(rq) ? answer(rq, tm_file_truncate(order(rq)->handle, order(rq)->offset)) : TM_E_ARGUMENT;
}

TM_ECALL(delete)
{
    char text[128];

    return order(rq) ? answer(rq, tm_file_delete(name(rq, text))) : TM_E_ARGUMENT;
}

/* While a mutex is held nobody may leave. */
TM_ECALL(locked)
{
    static struct tm_mutex mutex;
    int status = tm_lock(&mutex);
    int64_t result;

    if (status && status != TM_E_OWNERDEAD)
        return status;
    result = tm_file_size(0);
    tm_unlock(&mutex);
    return answer(rq, result);
}

/*
 * Append one record of 64 bytes, its first 8 being its number, and have it on the disk; again and again,
 * `length` times.  The caller hears of the last only, so it is killed in here.
 */
TM_ECALL(append)
{
    const struct order *wanted = order(rq);
    uint64_t record[8];

    if (!wanted)
        return TM_E_ARGUMENT;
    for (uint64_t i = 0; i < wanted->length; i++) {
        int64_t result;

        for (unsigned word = 0; word < 8; word++)
            record[word] = wanted->offset + i;
        result = tm_file_write(wanted->handle, (wanted->offset + i) * sizeof(record), record, sizeof(record));
        if (result == (int64_t)sizeof(record))
            result = tm_file_sync(wanted->handle);
        if (result)
            return answer(rq, result);
    }
    return answer(rq, 0);
}

/* Of tm_on_slot_reset(): what files say there, where nobody may ask. */
static int64_t at_reset;

void tm_on_slot_reset(uint32_t slot)
{
    (void)slot;
    at_reset = tm_file_delete("never");
}

TM_ECALL(at_reset)
{
    return answer(rq, at_reset);
}
