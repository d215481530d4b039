/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Slots of a grant: they come from the broker and go back to it.  A slot is unmapped before the broker hears
 * that it is released `clean`; it relies on that when it hands it to somebody else.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client.h"
#include "crypto.h"

#define SLOT_MAX 4095u

const char *slots_read_locked(struct teemate_grant *grant, const struct value *slots)
{
#define SLOT(kind, member, key) FIELD(kind, struct teemate_slot_args, member, key, false)
    static const struct field fields[] = {
        SLOT(FIELD_U32, index, "slot"), SLOT(FIELD_U64, tcs_offset, "tcs"), SLOT(FIELD_U64, generation, "generation"),
        SLOT(FIELD_BYTES, key, "key"), SLOT(FIELD_BYTES, bind, "bind"),
    };
    struct items items = items_of(slots);
    struct value one;
    const char *wrong;

    if (slots->kind != VALUE_ARRAY)
        return "slots";
    while (items_next(&items, &one)) {
        struct teemate_lease *lease = calloc(1, sizeof(*lease));

        if (lease == NULL)
            return "";
        lease->grant = grant;
        lease->next = grant->leases;
        grant->leases = lease;
        wrong = map_read(&one, fields, sizeof(fields) / sizeof(fields[0]), &lease->args);
        if (wrong == NULL && lease->args.index > SLOT_MAX)
            wrong = "slot";
        if (wrong != NULL)
            return wrong;
        lease->index = lease->args.index;
    }
    return NULL;
}

int slots_open_locked(struct teemate_grant *grant, struct teemate_error *error)
{
    for (struct teemate_lease *lease = grant->leases; lease != NULL; lease = lease->next) {
        struct teemate_diag diag = {0};
        char doing[128];
        int result;

        if (lease->native != NULL || lease->closed)
            continue;
        if (atomic_load(&lease->gone) != GONE_NOT) { /* taken away before it was here */
            crypto_wipe(&lease->args, sizeof(lease->args));
            lease->closed = true;
            continue;
        }
        result = teemate_slot_open(grant->native, &lease->args, &lease->native, &diag);
        crypto_wipe(&lease->args, sizeof(lease->args));
        if (result == 0)
            continue;
        snprintf(doing, sizeof(doing), "%s: opening slot %u", grant->entry.name, lease->index);
        return error_native(error, result, &diag, doing);
    }
    slots_acknowledge_locked(grant);
    return 0;
}

/* ---- back to the broker ---------------------------------------------------------- */

struct request *slots_release_request(struct teemate_broker *broker, uint64_t grant, uint64_t session, size_t count,
                                      bool stolen)
{
    struct request *request = request_new(broker, "slots.release", REQUEST_GIVES_BACK, stolen ? 4 : 3, 64 + 5 * count);

    if (request == NULL)
        return NULL;
    request->session = session;
    write_text(&request->writer, "grant");
    write_uint(&request->writer, grant);
    write_text(&request->writer, "clean");
    write_bool(&request->writer, true);
    if (stolen) {
        write_text(&request->writer, "stolen");
        write_bool(&request->writer, true);
    }
    write_text(&request->writer, "slots");
    write_array(&request->writer, count);
    return request;
}

static bool to_acknowledge(const struct teemate_lease *lease)
{
    return lease->closed && !lease->acknowledged && atomic_load(&lease->gone) != GONE_NOT;
}

void slots_acknowledge_locked(struct teemate_grant *grant)
{
    struct teemate_lease *lease, *next;
    struct request *request;
    size_t count = 0;

    if (grant->over)
        return;
    for (lease = grant->leases; lease != NULL; lease = lease->next)
        count += to_acknowledge(lease);
    if (count == 0)
        return;
    request = slots_release_request(grant->broker, grant->number, grant->session, count, false);
    if (request == NULL)
        return; /* the next one who closes something says it */
    for (lease = grant->leases; lease != NULL; lease = next) {
        next = lease->next;
        if (!to_acknowledge(lease))
            continue;
        write_uint(&request->writer, lease->index);
        lease->acknowledged = true;
        if (!lease->taken)
            lease_free_locked(lease);
    }
    request_post_locked(grant->broker, request);
}

/* ---- acquire ---------------------------------------------------------------------- */

static void undo_acquire(struct teemate_broker *broker, const struct value *ok, uint64_t grant)
{
    struct value slots = map_value(ok, "slots"), one, index;
    struct items items = items_of(&slots);
    struct request *request;

    if (slots.kind != VALUE_ARRAY || slots.number == 0)
        return;
    request = slots_release_request(broker, grant, broker->session.number, slots.number, false);
    if (request == NULL)
        return;
    while (items_next(&items, &one)) {
        index = map_value(&one, "slot");
        write_uint(&request->writer, index.number);
    }
    request_post_locked(broker, request);
}

/* Those that an answer brought and that are not open, from the first on up to `end`. */
static void drop_until_locked(struct teemate_grant *grant, struct teemate_lease *end)
{
    while (grant->leases != end) {
        lease_close_locked(grant->leases);
        lease_free_locked(grant->leases);
    }
}

static int take_acquire(struct teemate_broker *broker, const struct value *ok, struct descriptors *descriptors,
                        void *context, struct teemate_error *error)
{
    struct teemate_grant *grant = context;
    struct teemate_lease *before = grant->leases;
    struct value slots = map_value(ok, "slots");
    const char *wrong;
    int code = 0;

    (void)descriptors;
    if (atomic_load(&grant->gone) != GONE_NOT)
        return gone_error(grant, NULL, error); /* whoever ended the grant did not know of these: they are undone */
    wrong = slots_read_locked(grant, &slots);
    if (wrong != NULL && wrong[0] == 0)
        code = error_set(error, TEEMATE_LIMIT_REACHED, "no memory for slots");
    else if (wrong != NULL)
        code = error_set(error, TEEMATE_PROTOCOL_ERROR, "the broker's answer to slots.acquire has no valid '%s'", wrong);
    else
        code = slots_open_locked(grant, error);
    if (code != 0)
        drop_until_locked(grant, before);
    broker_wake_locked(broker); /* whoever waits for a slot */
    return code;
}

static int grant_check(const struct teemate_grant *grant, struct teemate_error *error)
{
    int code = broker_check_process(grant->broker, error);

    if (code != 0)
        return code;
    return atomic_load(&grant->gone) == GONE_NOT ? 0 : gone_error(grant, NULL, error);
}

int teemate_acquire(struct teemate_grant *grant, uint32_t count, uint32_t wait_ms, struct teemate_error *error)
{
    struct request *request;
    int code = grant_check(grant, error);

    if (code != 0)
        return code;
    if (count > 65535)
        return error_set(error, TEEMATE_BAD_ARGUMENT, "teemate_acquire: %u slots; at most 65535 can be asked for", count);
    request = request_new(grant->broker, "slots.acquire", 0, 3, 64);
    if (request != NULL) {
        request->session = grant->session;
        request->grant = grant->number;
        request->wait = wait_ms * NS_PER_MS;
        request->take = take_acquire;
        request->context = grant;
        request->undo = undo_acquire;
        write_text(&request->writer, "grant");
        write_uint(&request->writer, grant->number);
        write_text(&request->writer, "count");
        write_uint(&request->writer, count);
        write_text(&request->writer, "wait");
        write_seconds(&request->writer, wait_ms);
    }
    grant_visit(grant);
    code = request_do(grant->broker, request, NULL, error);
    grant_leave(grant);
    return code;
}

/* ---- release ---------------------------------------------------------------------- */

static bool is_free(const struct teemate_lease *lease)
{
    return !lease->taken && !lease->closed && atomic_load(&lease->gone) == GONE_NOT;
}

int teemate_release(struct teemate_grant *grant, uint32_t count, struct teemate_error *error)
{
    struct teemate_lease *lease, *next;
    struct request *request = NULL;
    uint32_t free_slots = 0, left = count;
    int code = grant_check(grant, error);

    if (code != 0 || count == 0)
        return code;
    pthread_mutex_lock(&grant->broker->lock);
    grant->visitors++;
    for (lease = grant->leases; lease != NULL; lease = lease->next)
        free_slots += is_free(lease);
    if (free_slots < count)
        code = error_set(error, TEEMATE_BUSY, "%s: %u slots to release, but only %u of this grant are free",
                         grant->entry.name, count, free_slots);
    else
        request = slots_release_request(grant->broker, grant->number, grant->session, count, false);
    for (lease = grant->leases; request != NULL && lease != NULL && left != 0; lease = next) {
        next = lease->next;
        if (!is_free(lease))
            continue;
        write_uint(&request->writer, lease->index);
        lease_close_locked(lease);
        lease_free_locked(lease);
        left--;
    }
    pthread_mutex_unlock(&grant->broker->lock);
    if (code == 0)
        code = request_do(grant->broker, request, NULL, error);
    grant_leave(grant);
    return code;
}
