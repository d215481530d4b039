/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ECALLs by name.  Everything of the caller is copied in once, checked, and
 * only then used; the output is the one range that is written directly, after
 * the same check.
 */
#include "thread.h"

extern const struct tm_ecall_entry __tm_ecalls_start[], __tm_ecalls_end[];
extern const struct tm_ecall_entry __tm_controls_start[], __tm_controls_end[];

#define INPUT_ON_STACK 2048u

/*
 * An image can define these to have a word before anything of a call is copied in (a status other than 0 is what the
 * caller gets), and to be told when nothing of it is left.
 */
int tm_on_call(uint64_t in_len);
void tm_on_called(void);

static const struct tm_ecall_entry *find(const struct tm_ecall_entry *entry,
                                         const struct tm_ecall_entry *end, const char *name, uint64_t length)
{
    for (; entry < end; entry++)
        if (entry->length == length && !memcmp(entry->name, name, length))
            return entry;
    return NULL;
}

int tm_reply(struct tm_request *rq, const void *data, size_t length)
{
    uint64_t end;

    if (__builtin_add_overflow(rq->out_len, (uint64_t)length, &end))
        return TM_E_ARGUMENT;
    if (end <= rq->out_cap)
        memcpy((void *)(rq->out + rq->out_len), data, length);
    rq->out_len = end;
    return end <= rq->out_cap ? 0 : TM_E_SPACE;
}

size_t tm_reply_room(const struct tm_request *rq)
{
    return rq->out_len < rq->out_cap ? rq->out_cap - rq->out_len : 0;
}

void tm_reply_reset(struct tm_request *rq)
{
    rq->out_len = 0;
}

struct tm_caller tm_caller(void)
{
    struct thread *self = thread_self();
    struct tm_caller caller = {.slot = (uint32_t)thread_served()->fixed.index};

    if (self->in_call) {
        caller.generation = TM_WORD_GENERATION(self->word);
        caller.identity = self->identity;
    }
    return caller;
}

void *tm_slot_data(void)
{
    return thread_served()->user;
}

static int run(const struct tm_ecall_entry *entry, struct tm_request *rq)
{
    int status = entry->function(rq);

    if (status == TM_E_BUSY && !rq->out_len && rq->out_cap >= sizeof(struct tm_holder)) {
        struct tm_holder holder = lock_refused();

        tm_reply(rq, &holder, sizeof(holder));
    }
    /* An answer that did not fit is none, whatever the author made of it. */
    return rq->out_len > rq->out_cap ? TM_E_SPACE : status;
}

/* Apart, so that only calls with an input pay for the room. */
static __attribute__((noinline)) int run_small(const struct tm_ecall_entry *entry, struct tm_request *rq,
                                               uint64_t in)
{
    uint8_t copy[INPUT_ON_STACK];

    memcpy(copy, (const void *)in, rq->in_len);
    rq->in = copy;
    return run(entry, rq);
}

static int run_large(const struct tm_ecall_entry *entry, struct tm_request *rq, uint64_t in)
{
    void *copy;
    int status = tm_try_alloc(rq->in_len, &copy);

    if (status)
        return status;
    memcpy(copy, (const void *)in, rq->in_len);
    rq->in = copy;
    status = run(entry, rq);
    tm_free(copy);
    return status;
}

static int run_sized(const struct tm_ecall_entry *entry, struct tm_request *rq, uint64_t in)
{
    if (!rq->in_len)
        return run(entry, rq);
    return rq->in_len <= INPUT_ON_STACK ? run_small(entry, rq, in) : run_large(entry, rq, in);
}

int64_t ecall(struct thread *self, uint64_t address, uint64_t *length)
{
    struct tm_call *call = &self->call;
    const struct tm_ecall_entry *entry;
    struct tm_request rq = {0};
    char name[TM_NAME_MAX];
    int status;

    if (!range_outside(address, sizeof(*call)))
        return TM_E_ARGUMENT;
    memcpy(call, (const void *)address, sizeof(*call));
    if (call->reserved || !call->name_len || call->name_len > TM_NAME_MAX ||
        call->ocall_cap < TM_OCALL_MIN || !range_outside(call->name, call->name_len) ||
        !range_outside(call->in, call->in_len) || !range_outside(call->out, call->out_cap) ||
        !range_outside(call->ocall_buf, call->ocall_cap))
        return TM_E_ARGUMENT;
    memcpy(name, (const void *)call->name, call->name_len);
    if (call->bind) {
        status = bind_identity(self, call->bind);
        if (status)
            return status;
    } else if (self->bound != TM_WORD_GENERATION(self->word)) {
        return TM_E_UNBOUND;
    }
    entry = find(__tm_ecalls_start, __tm_ecalls_end, name, call->name_len);
    if (!entry)
        return TM_E_UNKNOWN;
    rq.in_len = call->in_len;
    rq.out = call->out;
    rq.out_cap = call->out_cap;
    self->in_call = true;
    status = tm_on_call(rq.in_len);
    if (!status)
        status = run_sized(entry, &rq, call->in);
    /* An author that keeps a mutex would lock everybody out. */
    tm_assert(!self->lock_count);
    tm_on_called();
    self->in_call = false;
    *length = rq.out_len;
    return status;
}

/* TM_CTL_AUTHOR: name padded to 64 bytes, then 192 bytes of input. */
int64_t author_control(const uint8_t data[256], struct tm_control_result *result)
{
    struct tm_request rq = {
        .in = data + TM_NAME_MAX,
        .in_len = 256 - TM_NAME_MAX,
        .out = (uint64_t)result->data,
        .out_cap = sizeof(result->data),
    };
    const struct tm_ecall_entry *entry;
    uint64_t length = 0;
    int status;

    while (length < TM_NAME_MAX && data[length])
        length++;
    entry = find(__tm_controls_start, __tm_controls_end, (const char *)data, length);
    if (!entry)
        return TM_E_UNKNOWN;
    status = entry->function(&rq);
    tm_assert(!thread_self()->lock_count);
    result->length = rq.out_len;
    return status;
}

__attribute__((weak)) int tm_on_call(uint64_t in_len)
{
    (void)in_len;
    return 0;
}

__attribute__((weak)) void tm_on_called(void)
{
}

__attribute__((weak)) int tm_on_start(void)
{
    return 0;
}

__attribute__((weak)) void tm_on_slot_reset(uint32_t slot)
{
    (void)slot;
}

__attribute__((weak)) bool tm_on_slot_armed(uint32_t slot)
{
    (void)slot;
    return false;
}
