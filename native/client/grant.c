/* SPDX-License-Identifier: Apache-2.0 */
/* A grant: attach maps the enclave at its address and opens the slots, detach takes all of it back. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client.h"
#include "crypto.h"

#define NAME_MAX_BYTES 64u
#define DETACH_LIMIT (2 * LEAVE_WAIT)

/* ---- the end of a grant ------------------------------------------------------------- */

void grant_mark_locked(struct teemate_grant *grant, enum gone gone, uint64_t patience)
{
    if (atomic_load(&grant->gone) == GONE_NOT) {
        atomic_store(&grant->patience, patience);
        atomic_store(&grant->gone, gone);
    }
    broker_wake_locked(grant->broker);
}

static void unmap_locked(struct teemate_grant *grant)
{
    teemate_close(grant->native);
    grant->native = NULL;
}

void grant_unmap_when_left_locked(struct teemate_grant *grant)
{
    bool left = true;

    for (struct teemate_lease *lease = grant->leases; lease != NULL; lease = lease->next)
        left = lease_close_locked(lease) && left;
    if (left && grant->native != NULL)
        unmap_locked(grant);
}

void grant_end_locked(struct teemate_grant *grant, enum gone gone, uint64_t patience)
{
    uint64_t now = now_ns();

    grant->over = true;
    grant_mark_locked(grant, gone, patience == FOREVER ? FOREVER : now + patience);
    grant_unmap_when_left_locked(grant);
}

static void unlist_locked(struct teemate_grant *grant)
{
    struct teemate_grant **at = &grant->broker->grants;

    while (*at != NULL && *at != grant)
        at = &(*at)->next;
    if (*at != NULL)
        *at = grant->next;
}

void grant_free_unlock(struct teemate_grant *grant)
{
    struct teemate_broker *broker = grant->broker;

    unlist_locked(grant);
    while (grant->leases != NULL)
        lease_free_locked(grant->leases);
    if (grant->native != NULL)
        unmap_locked(grant);
    pthread_mutex_unlock(&broker->lock);
    free(grant->segments);
    free(grant);
    broker_unreference(broker);
}

static struct request *detach_request(struct teemate_broker *broker, uint64_t grant, uint64_t session)
{
    struct request *request = request_new(broker, "detach", REQUEST_GIVES_BACK, 2, 32);

    if (request == NULL)
        return NULL;
    request->session = session;
    write_text(&request->writer, "grant");
    write_uint(&request->writer, grant);
    write_text(&request->writer, "clean");
    write_bool(&request->writer, true);
    return request;
}

void grant_visit(struct teemate_grant *grant)
{
    pthread_mutex_lock(&grant->broker->lock);
    grant->visitors++;
    pthread_mutex_unlock(&grant->broker->lock);
}

void grant_leave(struct teemate_grant *grant)
{
    struct teemate_broker *broker = grant->broker;

    pthread_mutex_lock(&broker->lock);
    grant->visitors--;
    broker_wake_locked(broker);
    pthread_mutex_unlock(&broker->lock);
}

static bool anybody_inside(const struct teemate_grant *grant)
{
    if (grant->visitors != 0)
        return true;
    for (const struct teemate_lease *lease = grant->leases; lease != NULL; lease = lease->next)
        if (lease->taken && atomic_load(&lease->inside))
            return true;
    return false;
}

int teemate_detach(struct teemate_grant *grant, struct teemate_error *error)
{
    struct teemate_broker *broker;
    uint64_t now = now_ns();
    bool tell;

    if (grant == NULL || grant->process != fork_process())
        return 0;
    broker = grant->broker;
    pthread_mutex_lock(&broker->lock);
    grant_mark_locked(grant, GONE_DETACHED, now + LEAVE_WAIT);
    if (atomic_load(&grant->patience) > now + LEAVE_WAIT)
        atomic_store(&grant->patience, now + LEAVE_WAIT);
    while (anybody_inside(grant)) {
        if (now_ns() > now + DETACH_LIMIT) {
            pthread_mutex_unlock(&broker->lock);
            return error_set(error, TEEMATE_BUSY,
                             "%s: a thread of this program is still in a call (in an OCALL handler?) or waits for slots:"
                             " end it, then detach again", grant->entry.name);
        }
        broker_wait_locked(broker, now + DETACH_LIMIT + NS_PER_MS);
    }
    grant_unmap_when_left_locked(grant);
    tell = !grant->over;
    grant->over = true; /* for leases that are given back from now on: the broker hears it from us */
    unlist_locked(grant);
    pthread_mutex_unlock(&broker->lock);
    /* The grant may be gone already, or its broker: that is what was asked for. */
    if (tell)
        request_tell(broker, detach_request(broker, grant->number, grant->session));
    pthread_mutex_lock(&broker->lock);
    grant->ended = true;
    if (grant->taken == 0)
        grant_free_unlock(grant);
    else
        pthread_mutex_unlock(&broker->lock);
    return 0;
}

/* ---- attach ------------------------------------------------------------------------- */

static void undo_attach(struct teemate_broker *broker, const struct value *ok, uint64_t unused)
{
    struct value grant = map_value(ok, "grant");

    (void)unused;
    if (grant.kind == VALUE_UINT)
        request_post_locked(broker, detach_request(broker, grant.number, broker->session.number));
}

/* Segments as the wire has them: arrays of offset, size, prot, type. */
static const char *read_segments(const struct value *untrusted, struct teemate_grant *grant)
{
    struct items items = items_of(untrusted);
    struct value one, number;

    if (untrusted->kind != VALUE_ARRAY)
        return "segments";
    grant->segments = calloc(untrusted->number + 1, sizeof(*grant->segments));
    if (grant->segments == NULL)
        return "";
    for (size_t i = 0; items_next(&items, &one); i++) {
        struct items numbers = items_of(&one);
        uint64_t parts[4];

        if (one.kind != VALUE_ARRAY || one.number != 4)
            return "segments";
        for (int part = 0; part < 4; part++) {
            if (!items_next(&numbers, &number) || number.kind != VALUE_UINT)
                return "segments";
            parts[part] = number.number;
        }
        if (parts[2] > 7 || parts[3] < 1 || parts[3] > 2)
            return "segments";
        grant->segments[i] = (struct teemate_segment){parts[0], parts[1], (uint32_t)parts[2], (uint32_t)parts[3]};
        grant->segment_count = i + 1;
    }
    return NULL;
}

struct untrusted_attach {
    uint64_t grant;
    struct value enclave, segments, slots;
};

/* In whichever thread reads: from here on the grant hears what the broker says of it. */
static int take_attach(struct teemate_broker *broker, const struct value *ok, struct descriptors *descriptors,
                       void *context, struct teemate_error *error)
{
    static const struct field fields[] = {
        FIELD(FIELD_U64, struct untrusted_attach, grant, "grant", false),
        FIELD(FIELD_VALUE, struct untrusted_attach, enclave, "enclave", false),
        FIELD(FIELD_VALUE, struct untrusted_attach, segments, "segments", false),
        FIELD(FIELD_VALUE, struct untrusted_attach, slots, "slots", false),
    };
    struct teemate_grant *grant = context;
    struct untrusted_attach read;
    const char *wrong = map_read(ok, fields, sizeof(fields) / sizeof(fields[0]), &read);

    if (descriptors->count != 2)
        return error_set(error, TEEMATE_PROTOCOL_ERROR, "an attach reply brings 2 descriptors, this one %d",
                         descriptors->count);
    if (wrong == NULL)
        wrong = entry_read(&read.enclave, &grant->entry);
    if (wrong == NULL)
        wrong = read_segments(&read.segments, grant);
    if (wrong == NULL)
        wrong = slots_read_locked(grant, &read.slots);
    if (wrong != NULL && wrong[0] == 0)
        return error_set(error, TEEMATE_LIMIT_REACHED, "no memory for a grant");
    if (wrong != NULL)
        return error_set(error, TEEMATE_PROTOCOL_ERROR, "the broker's answer to attach has no valid '%s'", wrong);
    grant->number = read.grant;
    grant->session = broker->session.number;
    grant->enclave_fd = descriptors->fd[0];
    grant->arena_fd = descriptors->fd[1];
    descriptors->fd[0] = descriptors->fd[1] = -1;
    grant->next = broker->grants;
    broker->grants = grant;
    return 0;
}

/* Map what the broker has granted, and open its slots. */
static int map_granted(struct teemate_grant *grant, struct teemate_error *error)
{
    const struct teemate_enclave_entry *entry = &grant->entry;
    struct teemate_enclave *native = NULL;
    struct teemate_diag diag = {0};
    char doing[128];
    int code = 0, result;

    result = teemate_open((int)entry->backend, grant->enclave_fd, entry->base, entry->size, grant->segments,
                          grant->segment_count, &native, &diag);
    snprintf(doing, sizeof(doing), "opening enclave '%s'", entry->name);
    if (result == 0) {
        snprintf(doing, sizeof(doing), "mapping enclave '%s'", entry->name);
        result = teemate_map(native, &diag);
    }
    if (result == 0) {
        snprintf(doing, sizeof(doing), "mapping the arena of '%s'", entry->name);
        result = teemate_map_arena(native, grant->arena_fd, &diag);
    }
    close(grant->arena_fd);
    grant->enclave_fd = grant->arena_fd = -1;
    if (result != 0) {
        teemate_close(native);
        return error_native(error, result, &diag, doing);
    }
    pthread_mutex_lock(&grant->broker->lock);
    grant->native = native;
    if (grant->broker->counters != NULL)
        teemate_enclave_count(native, grant->broker->counters);
    if (!grant->over)
        code = slots_open_locked(grant, error);
    else
        grant_unmap_when_left_locked(grant); /* no broker knew of it any more before it was here */
    pthread_mutex_unlock(&grant->broker->lock);
    return code;
}

static struct teemate_grant *grant_new(struct teemate_broker *broker)
{
    struct teemate_grant *grant = calloc(1, sizeof(*grant));

    if (grant == NULL)
        return NULL;
    grant->broker = broker;
    atomic_fetch_add(&broker->references, 1);
    grant->process = broker->process;
    grant->enclave_fd = grant->arena_fd = -1;
    return grant;
}

/* The broker is at work, and we would do nothing. */
static void make_ready(void)
{
    teemate_prepare();
    listener_ready();
}

int teemate_attach(struct teemate_broker *broker, const char *name, uint32_t slots, uint32_t wait_ms,
                   struct teemate_grant **out, struct teemate_error *error)
{
    struct teemate_grant *grant;
    struct request *request;
    int code;

    if (name == NULL || strlen(name) < 1 || strlen(name) > NAME_MAX_BYTES || slots > 65535 || out == NULL)
        return error_set(error, TEEMATE_BAD_ARGUMENT,
                         "teemate_attach: a name has 1 to 64 bytes, and at most 65535 slots can be asked for");
    grant = grant_new(broker);
    if (grant == NULL)
        return error_set(error, TEEMATE_LIMIT_REACHED, "no memory for a grant");
    request = request_new(broker, "attach", REQUEST_REPEATABLE, 3, 128);
    if (request != NULL) {
        request->wait = wait_ms * NS_PER_MS;
        request->take = take_attach;
        request->context = grant;
        request->undo = undo_attach;
        write_text(&request->writer, "enclave");
        write_text(&request->writer, name);
        write_text(&request->writer, "slots");
        write_uint(&request->writer, slots);
        write_text(&request->writer, "wait");
        write_seconds(&request->writer, wait_ms);
    }
    code = request_do(broker, request, make_ready, error);
    if (code == 0) {
        code = map_granted(grant, error);
        if (code == 0) {
            *out = grant;
            return 0;
        }
        pthread_mutex_lock(&broker->lock);
        for (struct teemate_lease *lease = grant->leases; lease != NULL; lease = lease->next)
            lease_close_locked(lease);
        if (grant->native != NULL)
            unmap_locked(grant);
        if (!grant->over)
            request_post_locked(broker, detach_request(broker, grant->number, grant->session));
        pthread_mutex_unlock(&broker->lock);
    }
    pthread_mutex_lock(&broker->lock);
    grant_free_unlock(grant);
    return code;
}

const struct teemate_enclave_entry *teemate_grant_entry(const struct teemate_grant *grant)
{
    return &grant->entry;
}

uint64_t teemate_grant_number(const struct teemate_grant *grant)
{
    return grant->number;
}
