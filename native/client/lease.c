/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A slot for one thread at a time: calls through it, and how they end.
 *
 * The lower half enters; this decides what happens between two entries.  A call comes back at least every
 * 20 ms (on Linux's driver after 5 to 10 ms inside), so that deadlines are kept and a revocation is heard; then
 * it goes on, or is abandoned: the enclave still stands in the middle of it, so the slot is out of use.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client.h"
#include "crypto.h"

#define PAUSE (20 * NS_PER_MS)
#define FAILED_OCALL TM_E_OCALL

/* ---- the end of a lease ---------------------------------------------------------- */

int gone_error(const struct teemate_grant *grant, const struct teemate_lease *lease, struct teemate_error *error)
{
    const char *name = grant->entry.name;
    uint32_t gone = atomic_load(&grant->gone);

    if (gone == GONE_NOT && lease != NULL)
        gone = atomic_load(&lease->gone);
    switch ((enum gone)gone) {
    case GONE_REVOKED:
        return error_set(error, TEEMATE_REVOKED,
                         "%s: the broker took the grant back: attach again if the policy still allows it", name);
    case GONE_TAKEN_BACK:
        return error_set(error, TEEMATE_REVOKED,
                         "%s: the broker ended the grant while the connection was down (it was revoked, or this process was"
                         " away for too long): attach again if the policy still allows it", name);
    case GONE_FORGOTTEN:
        return error_set(error, TEEMATE_ENCLAVE_LOST,
                         "%s: no broker knows this grant any more (it came back without its state, or not within"
                         " resume_grace): attach again", name);
    case GONE_LOST:
        return error_set(error, TEEMATE_ENCLAVE_LOST,
                         "%s: the enclave is gone (host suspended, memory error, or destroyed): attach to its next"
                         " generation", name);
    case GONE_REFUSED:
        return error_set(error, TEEMATE_REVOKED,
                         "%s: the enclave refused the key of slot %u: it was revoked; attach again if the policy still"
                         " allows it", name, lease != NULL ? lease->index : 0);
    case GONE_DETACHED:
    case GONE_NOT:
        break;
    }
    return error_set(error, TEEMATE_NOT_ATTACHED, "%s: this program has detached: attach again", name);
}

bool lease_close_locked(struct teemate_lease *lease)
{
    if (lease->closed)
        return true;
    if (atomic_exchange(&lease->inside, true))
        return false;
    if (lease->native != NULL)
        teemate_slot_close(lease->native); /* what was left in it is the broker's to repair */
    else
        crypto_wipe(&lease->args, sizeof(lease->args));
    lease->native = NULL;
    lease->closed = true;
    if (lease->broken[0] == 0)
        snprintf(lease->broken, sizeof(lease->broken), "it was given back");
    atomic_store(&lease->inside, false);
    return true;
}

void lease_free_locked(struct teemate_lease *lease)
{
    struct teemate_lease **at = &lease->grant->leases;

    while (*at != lease)
        at = &(*at)->next;
    *at = lease->next;
    lease_close_locked(lease);
    free(lease);
}

/* ---- take and give ----------------------------------------------------------------- */

static struct teemate_lease *find_free_locked(const struct teemate_grant *grant, unsigned *taken)
{
    struct teemate_lease *found = NULL;

    *taken = 0;
    for (struct teemate_lease *lease = grant->leases; lease != NULL; lease = lease->next) {
        if (lease->taken)
            ++*taken;
        else if (lease->native != NULL && atomic_load(&lease->gone) == GONE_NOT)
            found = lease;
    }
    return found;
}

int teemate_take(struct teemate_grant *grant, uint32_t wait_ms, struct teemate_lease **out, struct teemate_error *error)
{
    struct teemate_broker *broker = grant->broker;
    uint64_t deadline = now_ns() + wait_ms * NS_PER_MS;
    struct teemate_lease *lease = NULL;
    unsigned taken;
    int code = broker_check_process(broker, error);

    if (code != 0)
        return code;
    pthread_mutex_lock(&broker->lock);
    grant->visitors++;
    while (code == 0 && lease == NULL) {
        lease = find_free_locked(grant, &taken);
        if (atomic_load(&grant->gone) != GONE_NOT)
            code = gone_error(grant, NULL, error);
        else if (lease == NULL && taken == 0)
            code = error_set(error, TEEMATE_BUSY,
                             "%s: this process has no slot left (one that was left in a call or faulted is out of use):"
                             " acquire one, or attach again", grant->entry.name);
        else if (lease == NULL && now_ns() >= deadline)
            code = error_set(error, TEEMATE_BUSY,
                             "%s: no free slot after %u ms (%u in use by this process): attach with more slots, or acquire"
                             " one", grant->entry.name, wait_ms, taken);
        else if (lease == NULL)
            broker_wait_locked(broker, deadline);
    }
    if (code == 0) {
        lease->taken = true;
        grant->taken++;
        *out = lease;
    }
    grant->visitors--;
    broker_wake_locked(broker);
    pthread_mutex_unlock(&broker->lock);
    return code;
}

void teemate_give(struct teemate_lease *lease)
{
    struct teemate_grant *grant;
    struct teemate_broker *broker;
    struct request *request = NULL;

    if (lease == NULL || lease->grant->process != fork_process())
        return;
    grant = lease->grant;
    broker = grant->broker;
    atomic_fetch_add(&broker->references, 1);
    pthread_mutex_lock(&broker->lock);
    lease->taken = false;
    grant->taken--;
    if (lease->broken[0] != 0 || atomic_load(&lease->gone) != GONE_NOT || atomic_load(&grant->gone) != GONE_NOT) {
        bool told = lease->closed || grant->over || atomic_load(&lease->gone) != GONE_NOT;

        lease_close_locked(lease);
        /* Waits for the answer, so that the slot is where it belongs when the caller goes on. */
        if (!told)
            request = slots_release_request(broker, grant->number, grant->session, 1, lease->stolen);
        if (request != NULL)
            write_uint(&request->writer, lease->index);
        if (!told || lease->acknowledged || grant->over)
            lease_free_locked(lease);
        else
            slots_acknowledge_locked(grant); /* frees it */
        if (grant->over)
            grant_unmap_when_left_locked(grant);
    }
    broker_wake_locked(broker);
    if (grant->ended && grant->taken == 0)
        grant_free_unlock(grant);
    else
        pthread_mutex_unlock(&broker->lock);
    if (request != NULL)
        request_tell(broker, request);
    broker_unreference(broker);
}

uint32_t teemate_lease_slot(const struct teemate_lease *lease)
{
    return lease->index;
}

/* ---- around a call ------------------------------------------------------------------- */

/* Have the slot for a call.  0, or a code: then it was not taken. */
static int begin(struct teemate_lease *lease, struct teemate_error *error)
{
    struct teemate_grant *grant = lease->grant;
    int code = 0;

    if (grant->process != fork_process())
        return broker_check_process(grant->broker, error);
    if (atomic_exchange(&lease->inside, true)) {
        if (atomic_load(&grant->gone) != GONE_NOT || atomic_load(&lease->gone) != GONE_NOT)
            return gone_error(grant, lease, error);
        return error_set(error, TEEMATE_BUSY, "slot %u is used by another thread: take one lease for each thread",
                         lease->index);
    }
    if (atomic_load(&grant->gone) != GONE_NOT || atomic_load(&lease->gone) != GONE_NOT)
        code = gone_error(grant, lease, error);
    else if (lease->broken[0] != 0)
        code = error_set(error, TEEMATE_NOT_ATTACHED, "%s: slot %u is out of use: %s: give it back, take another",
                         grant->entry.name, lease->index, lease->broken);
    if (code != 0)
        atomic_store(&lease->inside, false);
    return code;
}

/*
 * From here on a revocation is heard even when the program makes no requests: its first call has ended, or it
 * takes long.  Not earlier, since who waits for the attach reads by itself, without a switch of threads.
 */
static void hear(struct teemate_grant *grant)
{
    struct teemate_broker *broker = grant->broker;

    if (atomic_load_explicit(&grant->listening, memory_order_relaxed))
        return;
    pthread_mutex_lock(&broker->lock);
    listener_watch_locked(broker);
    atomic_store(&grant->listening, broker->watched);
    pthread_mutex_unlock(&broker->lock);
}

/* The thread has left; what ended meanwhile is closed by us or by who ended it. */
static void end(struct teemate_lease *lease)
{
    struct teemate_grant *grant = lease->grant;
    struct teemate_broker *broker = grant->broker;
    bool heard = atomic_load_explicit(&grant->listening, memory_order_relaxed);

    atomic_store(&lease->inside, false);
    if (heard && atomic_load(&grant->gone) == GONE_NOT && atomic_load(&lease->gone) == GONE_NOT)
        return;
    pthread_mutex_lock(&broker->lock);
    if (!heard) { /* as hear() */
        listener_watch_locked(broker);
        atomic_store(&grant->listening, broker->watched);
    }
    if (atomic_load(&lease->gone) == GONE_REVOKED && lease_close_locked(lease))
        slots_acknowledge_locked(grant);
    if (grant->over && !grant->ended)
        grant_unmap_when_left_locked(grant);
    broker_wake_locked(broker);
    pthread_mutex_unlock(&broker->lock);
}

static void breaks(struct teemate_lease *lease, const char *format, const char *name)
{
    snprintf(lease->broken, sizeof(lease->broken), format, name);
}

static void abandon(struct teemate_lease *lease, const char *name)
{
    teemate_slot_abandon(lease->native);
    breaks(lease, "call '%.64s' was abandoned", name);
}

struct course {
    const struct teemate_call_options *options; /* not NULL */
    const char *name;
    uint64_t deadline; /* now_ns(), FOREVER */
    uint64_t pause;
};

static const struct teemate_call_options no_options = TEEMATE_CALL_OPTIONS_DEFAULT;

static struct course course_begin(const char *name, const struct teemate_call_options *options)
{
    struct course course = {options != NULL ? options : &no_options, name, FOREVER, PAUSE};

    if (course.options->timeout_ms >= 0) {
        uint64_t timeout = (uint64_t)course.options->timeout_ms * NS_PER_MS;

        course.deadline = now_ns() + timeout;
        course.pause = timeout < PAUSE ? timeout + 1 : PAUSE;
    }
    return course;
}

/* At a pause: go on, and for how long?  0, or the code of what ends the call. */
static int go_on(struct teemate_lease *lease, struct course *course, struct teemate_error *error)
{
    struct teemate_grant *grant = lease->grant;
    bool gone = atomic_load(&grant->gone) != GONE_NOT || atomic_load(&lease->gone) != GONE_NOT;
    uint64_t now = now_ns();

    hear(grant);
    if (course->options->give_up != NULL && course->options->give_up(course->options->context) != 0)
        return error_set(error, TEEMATE_CALL_ABANDONED, "%s: call '%s' was given up by this program; slot %u is out of use",
                         grant->entry.name, course->name, lease->index);
    if (gone && now >= atomic_load(&grant->patience))
        return gone_error(grant, lease, error);
    if (now >= course->deadline)
        return error_set(error, TEEMATE_CALL_TIMEOUT,
                         "%s: call '%s' took longer than its timeout of %lld ms and was given up; slot %u is out of use",
                         grant->entry.name, course->name, (long long)course->options->timeout_ms, lease->index);
    course->pause = course->deadline - now < PAUSE ? course->deadline - now : PAUSE;
    return 0;
}

/* The enclave did not finish the call: the slot is out of use. */
static int unfinished(struct teemate_lease *lease, int outcome, const struct sgx_enclave_run *run, const char *name,
                      struct teemate_error *error)
{
    struct teemate_grant *grant = lease->grant;

    switch (outcome) {
    case TEEMATE_CALL_FAULT:
        breaks(lease, "a fault in call '%.64s'", name);
        teemate_slot_abandon(lease->native);
        return error_fault(error, run, &grant->entry, name);
    case TEEMATE_CALL_STOLEN:
        breaks(lease, "call '%.64s' was resumed by another process", name);
        lease->stolen = true;
        teemate_slot_abandon(lease->native);
        return error_set(error, TEEMATE_ENCLAVE_FAULT,
                         "%s: another process that maps the enclave resumed call '%s' of slot %u, so its result is lost: see"
                         " who else is attached (`teemate status`)", grant->entry.name, name, lease->index);
    case TEEMATE_CALL_REVOKED: {
        uint32_t none = GONE_NOT;

        breaks(lease, "its key was refused%.0s", name);
        atomic_compare_exchange_strong(&lease->gone, &none, GONE_REFUSED); /* or the broker has told already */
        return gone_error(grant, lease, error);
    }
    default:
        breaks(lease, "the enclave is gone%.0s", name);
        pthread_mutex_lock(&grant->broker->lock);
        grant_mark_locked(grant, GONE_LOST, 0);
        pthread_mutex_unlock(&grant->broker->lock);
        return gone_error(grant, lease, error);
    }
}

/* The entry itself failed.  `begun`: the call stands in the enclave. */
static int refused(struct teemate_lease *lease, int result, bool begun, const char *name, struct teemate_error *error)
{
    struct teemate_diag diag = {0};
    char doing[192];

    if (result == -EUCLEAN)
        teemate_signals_check(0, &diag);
    if (begun)
        abandon(lease, name);
    snprintf(doing, sizeof(doing), "%s: call '%s' in slot %u", lease->grant->entry.name, name, lease->index);
    return error_native(error, result, &diag, doing);
}

/* ---- calls ----------------------------------------------------------------------------- */

/* An OCALL that the enclave made: have it answered, and go on.  A code ends the call. */
static int answer_ocall(struct teemate_lease *lease, struct course *course, struct teemate_call *call, int *result,
                        struct teemate_error *error)
{
    const struct teemate_call_options *options = course->options;
    const void *answer = NULL;
    size_t length = 0;
    int status = TM_E_UNKNOWN;

    hear(lease->grant); /* the handler may take long */
    if (options->ocall != NULL)
        status = options->ocall(options->context, call->ocall_name, call->ocall_name_length, call->ocall_data,
                                call->ocall_length, &answer, &length);
    if (status > 0)
        return error_set(error, TEEMATE_CALL_ABANDONED,
                         "%s: call '%s' was given up by its OCALL handler; slot %u is out of use", lease->grant->entry.name,
                         course->name, lease->index);
    if (status == 0 && length > SLOT_OCALL_CAPACITY)
        status = FAILED_OCALL;
    *result = teemate_slot_answer(lease->native, status, answer, status == 0 ? length : 0, PAUSE, call);
    return 0;
}

static int call_inside(struct teemate_lease *lease, struct course *course, const void *in, size_t in_length, void *out,
                       size_t out_capacity, size_t *out_length, struct teemate_error *error)
{
    struct teemate_call call;
    uint64_t length;
    bool begun = false;
    int code = 0, result;

    call.outcome = TEEMATE_CALL_DONE;
    result = teemate_slot_call(lease->native, course->name, strlen(course->name), in, in_length, out, out_capacity,
                               course->pause, &call);
    while (result == 0 && code == 0 && call.outcome != TEEMATE_CALL_DONE) {
        begun = true;
        if (call.outcome == TEEMATE_CALL_PAUSED) {
            code = go_on(lease, course, error);
            if (code == 0)
                result = teemate_slot_resume(lease->native, course->pause, &call);
        } else if (call.outcome == TEEMATE_CALL_OCALL) {
            code = answer_ocall(lease, course, &call, &result, error);
        } else {
            return unfinished(lease, call.outcome, &call.run, course->name, error);
        }
    }
    if (code != 0) {
        abandon(lease, course->name);
        return code;
    }
    if (result != 0)
        return refused(lease, result, begun || result == -EBADMSG, course->name, error);
    length = call.out_length < out_capacity ? call.out_length : out_capacity;
    if (out_length != NULL)
        *out_length = length;
    if (call.status != 0)
        return error_status(error, call.status, lease->grant->entry.name, course->name, call.out_length, out, length);
    return 0;
}

int teemate_call(struct teemate_lease *lease, const char *name, const void *in, size_t in_length, void *out,
                 size_t out_capacity, size_t *out_length, const struct teemate_call_options *options,
                 struct teemate_error *error)
{
    struct course course;
    int code;

    if (lease == NULL || name == NULL || strnlen(name, TM_NAME_MAX + 1) - 1 >= TM_NAME_MAX ||
        (in == NULL && in_length != 0) || (out == NULL && out_capacity != 0))
        return error_set(error, TEEMATE_BAD_ARGUMENT,
                         "teemate_call: the name of an ECALL has 1 to %u bytes, and a buffer that is NULL has none",
                         TM_NAME_MAX);
    code = begin(lease, error);
    if (code != 0)
        return code;
    course = course_begin(name, options);
    code = call_inside(lease, &course, in, in_length, out, out_capacity, out_length, error);
    end(lease);
    return code;
}

static int enter_inside(struct teemate_lease *lease, struct course *course, struct teemate_regs *regs,
                        struct teemate_error *error)
{
    struct sgx_enclave_run run = {0};
    uint32_t function = SGX_EENTER;
    int code, outcome;

    for (;;) {
        outcome = teemate_slot_enter(lease->native, regs, function, course->pause, &run);
        if (outcome != TEEMATE_PAUSED)
            break;
        code = go_on(lease, course, error);
        if (code != 0) {
            abandon(lease, course->name);
            return code;
        }
        /* Paused before EENTER had begun, the same entry is made again. */
        function = run.function == SGX_EENTER ? SGX_EENTER : SGX_ERESUME;
    }
    if (outcome < 0)
        return refused(lease, outcome, function == SGX_ERESUME, course->name, error);
    if (outcome != TEEMATE_LEFT)
        return unfinished(lease, TEEMATE_CALL_REVOKED, &run, course->name, error);
    if (run.function != SGX_EEXIT) {
        bool gone = run.exception_vector == SGX_VECTOR_MC ||
                    (run.function == SGX_EENTER && run.exception_vector == SGX_VECTOR_PF);

        return unfinished(lease, gone ? TEEMATE_CALL_LOST : TEEMATE_CALL_FAULT, &run, course->name, error);
    }
    return 0;
}

int teemate_call_raw(struct teemate_lease *lease, struct teemate_regs *regs, const struct teemate_call_options *options,
                     struct teemate_error *error)
{
    struct course course;
    int code;

    if (lease == NULL || regs == NULL)
        return error_set(error, TEEMATE_BAD_ARGUMENT, "teemate_call_raw: a lease and registers are needed");
    code = begin(lease, error);
    if (code != 0)
        return code;
    course = course_begin("a raw entry", options);
    code = enter_inside(lease, &course, regs, error);
    regs->r12 = regs->r13 = 0;
    end(lease);
    return code;
}
