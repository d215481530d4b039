/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the broker says of grants without being asked.  Nothing here waits: slots that nobody is inside of are
 * closed and acknowledged at once; a thread that is inside does it itself when it comes back, which it
 * does within 20 ms of the grant's patience, unless it is in an OCALL handler.
 */
#include <stdio.h>
#include <string.h>

#include "client.h"

struct untrusted_event {
    struct value kind, slots;
    uint64_t grant, generation;
    uint32_t deadline;
    char enclave[68];
};

static struct teemate_grant *find_locked(struct teemate_broker *broker, uint64_t number)
{
    struct teemate_grant *grant = broker->grants;

    /* One that is over is of another session, which may have had the same number. */
    while (grant != NULL && (grant->number != number || grant->over))
        grant = grant->next;
    return grant;
}

static bool contains(const struct value *numbers, uint64_t number)
{
    struct items items = items_of(numbers);
    struct value one;

    while (items_next(&items, &one))
        if (one.kind == VALUE_UINT && one.number == number)
            return true;
    return false;
}

static void revoke_locked(struct teemate_grant *grant, const struct untrusted_event *event)
{
    uint64_t patience = now_ns() + event->deadline * NS_PER_MS / 2;
    bool all = true;

    atomic_store(&grant->patience, patience);
    for (struct teemate_lease *lease = grant->leases; lease != NULL; lease = lease->next) {
        if (contains(&event->slots, lease->index))
            atomic_store(&lease->gone, GONE_REVOKED);
        else
            all = false;
    }
    if (all)
        grant_mark_locked(grant, GONE_REVOKED, patience);
    if (grant->native != NULL) { /* else it is attached just now, and they are not open yet */
        for (struct teemate_lease *lease = grant->leases; lease != NULL; lease = lease->next)
            if (atomic_load(&lease->gone) == GONE_REVOKED)
                lease_close_locked(lease);
        slots_acknowledge_locked(grant);
    }
    broker_wake_locked(grant->broker);
}

/* Count calls where `fd` says: a page of before (of a broker that was restarted) is replaced in its place. */
static void count_locked(struct teemate_broker *broker, int fd)
{
    if (teemate_counters_map(fd, &broker->counters) != 0)
        return; /* nothing is counted, and nothing is lost */
    for (struct teemate_grant *grant = broker->grants; grant != NULL; grant = grant->next)
        if (grant->native != NULL)
            teemate_enclave_count(grant->native, broker->counters);
}

void event_take_locked(struct teemate_broker *broker, const struct value *message,
                       const struct descriptors *descriptors)
{
    static const struct field fields[] = {
        FIELD(FIELD_VALUE, struct untrusted_event, kind, "event", false),
        FIELD(FIELD_U64, struct untrusted_event, grant, "grant", true),
        FIELD(FIELD_VALUE, struct untrusted_event, slots, "slots", true),
        FIELD(FIELD_MILLISECONDS, struct untrusted_event, deadline, "deadline", true),
        FIELD(FIELD_TEXT, struct untrusted_event, enclave, "enclave", true),
        FIELD(FIELD_U64, struct untrusted_event, generation, "generation", true),
    };
    struct untrusted_event event = {0};
    struct teemate_event told = {0};
    struct teemate_grant *grant;
    bool draining;

    if (map_read(message, fields, sizeof(fields) / sizeof(fields[0]), &event) != NULL)
        return; /* of a later broker's */
    if (value_is_text(&event.kind, "counters")) {
        if (descriptors->count == 1)
            count_locked(broker, descriptors->fd[0]);
        return;
    }
    draining = value_is_text(&event.kind, "draining");
    if (draining || value_is_text(&event.kind, "ready")) {
        told.kind = draining ? TEEMATE_EVENT_DRAINING : TEEMATE_EVENT_READY;
        told.generation = event.generation;
        memcpy(told.enclave, event.enclave, sizeof(told.enclave));
        for (grant = broker->grants; grant != NULL; grant = grant->next)
            if (strcmp(grant->entry.name, event.enclave) == 0 &&
                (event.generation == 0 || event.generation == grant->entry.generation))
                grant->draining = draining;
        broker_event_locked(broker, told);
        return;
    }
    grant = find_locked(broker, event.grant);
    if (grant == NULL)
        return;
    told.grant = grant->number;
    memcpy(told.enclave, grant->entry.name, sizeof(told.enclave));
    if (value_is_text(&event.kind, "revoked")) {
        told.kind = TEEMATE_EVENT_REVOKED;
        told.slots = (uint32_t)event.slots.number;
        told.deadline_ms = event.deadline;
        revoke_locked(grant, &event);
    } else if (value_is_text(&event.kind, "lost")) {
        told.kind = TEEMATE_EVENT_LOST;
        grant_mark_locked(grant, GONE_LOST, 0);
    } else {
        return;
    }
    broker_event_locked(broker, told);
}

void grants_resumed_locked(struct teemate_broker *broker, const struct value *numbers)
{
    for (struct teemate_grant *grant = broker->grants; grant != NULL; grant = grant->next) {
        struct teemate_event told = {.kind = TEEMATE_EVENT_REVOKED, .grant = grant->number};

        if (grant->over || contains(numbers, grant->number))
            continue;
        memcpy(told.enclave, grant->entry.name, sizeof(told.enclave));
        grant_end_locked(grant, GONE_TAKEN_BACK, LEAVE_WAIT);
        broker_event_locked(broker, told);
    }
}

void grants_forgotten_locked(struct teemate_broker *broker)
{
    /* What is inside goes on, since nobody gets these slots. */
    for (struct teemate_grant *grant = broker->grants; grant != NULL; grant = grant->next)
        if (!grant->over)
            grant_end_locked(grant, GONE_FORGOTTEN, FOREVER);
}
