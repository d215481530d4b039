/* @NAME@: what runs inside the enclave. */
#include "tmsdk.h"

/* Shared by all processes that are attached; lies in the enclave's memory. */
static struct tm_mutex mutex;
static uint64_t visits;

/* Called from Python as slot.call("hello", b"name"). */
TM_ECALL(hello)
{
    static const char greeting[] = "hello, ";
    int status = tm_reply(rq, greeting, sizeof(greeting) - 1);

    if (!status)
        status = tm_reply(rq, rq->in, rq->in_len);
    return status;
}

/* Counts the calls of every process; answers a little-endian u64. */
TM_ECALL(visit)
{
    uint64_t now;
    int status = tm_lock(&mutex);

    /* The last holder died with the lock: one store is either done or not. */
    if (status == TM_E_OWNERDEAD)
        tm_mutex_consistent(&mutex);
    else if (status)
        return status;
    now = ++visits;
    tm_unlock(&mutex);
    return tm_reply(rq, &now, sizeof(now));
}
