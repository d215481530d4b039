/* SPDX-License-Identifier: Apache-2.0 */
/* A connection as the program sees it: connect, disconnect, ping, enclaves, events. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "client.h"
#include "crypto.h"

#define DEFAULT_PATH "/run/teemate/broker.sock"

uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

/* ---- waiting and waking ---------------------------------------------------------- */

void broker_wait_locked(struct teemate_broker *broker, uint64_t deadline)
{
    struct timespec until;

    broker->waiting++;
    if (deadline == FOREVER) {
        pthread_cond_wait(&broker->wake, &broker->lock);
    } else {
        until.tv_sec = (time_t)(deadline / NS_PER_S);
        until.tv_nsec = (long)(deadline % NS_PER_S);
        pthread_cond_timedwait(&broker->wake, &broker->lock, &until);
    }
    broker->waiting--;
}

void broker_wake_locked(struct teemate_broker *broker)
{
    if (broker->waiting != 0)
        pthread_cond_broadcast(&broker->wake);
}

int broker_check_process(const struct teemate_broker *broker, struct teemate_error *error)
{
    if (broker->process == fork_process())
        return 0;
    return error_set(error, TEEMATE_NOT_ATTACHED,
                     "this process is a child of the one that holds the connection and the grants: connect and attach"
                     " here");
}

/* ---- making and ending ------------------------------------------------------------ */

static void broker_free(struct teemate_broker *broker)
{
    if (broker->fd >= 0)
        close(broker->fd);
    pthread_cond_destroy(&broker->wake);
    pthread_mutex_destroy(&broker->lock);
    crypto_wipe(&broker->session, sizeof(broker->session));
    free(broker->buffer);
    if (broker->process == fork_process()) /* a child has something else there by now, or nothing */
        teemate_counters_unmap(broker->counters);
    free(broker);
}

void broker_unreference(struct teemate_broker *broker)
{
    if (atomic_fetch_sub(&broker->references, 1) == 1)
        broker_free(broker);
}

static struct teemate_broker *broker_new(void)
{
    struct teemate_broker *broker = calloc(1, sizeof(*broker));
    pthread_condattr_t attributes;

    if (broker == NULL)
        return NULL;
    broker->buffer = malloc(MESSAGE_MAX);
    if (broker->buffer == NULL) {
        free(broker);
        return NULL;
    }
    pthread_mutex_init(&broker->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&broker->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    broker->references = 1;
    broker->process = fork_process();
    broker->fd = -1;
    broker->last = &broker->first;
    broker->address.sun_family = AF_UNIX;
    return broker;
}

int teemate_connect(const char *path, const char *client, struct teemate_broker **out, struct teemate_error *error)
{
    struct teemate_broker *broker;
    int code;

    if (path == NULL)
        path = getenv("TEEMATE_SOCKET");
    if (path == NULL || path[0] == 0)
        path = DEFAULT_PATH;
    if (out == NULL || (client != NULL && strlen(client) > 64))
        return error_set(error, TEEMATE_BAD_ARGUMENT, "teemate_connect: a client's name has at most 64 bytes");
    if (strlen(path) >= sizeof(((struct sockaddr_un *)0)->sun_path))
        return error_set(error, TEEMATE_BAD_ARGUMENT, "teemate_connect: a socket's path has at most %zu bytes: %s",
                         sizeof(((struct sockaddr_un *)0)->sun_path) - 1, path);
    broker = broker_new();
    if (broker == NULL)
        return error_set(error, TEEMATE_LIMIT_REACHED, "no memory for a connection");
    strcpy(broker->address.sun_path, path);
    strcpy(broker->client, client != NULL ? client : "");
    if (session_begin(&broker->session) != 0)
        code = error_set(error, TEEMATE_INTERNAL_ERROR, "the kernel gave no random bytes for a connection's token");
    else
        code = link_connect(broker, error);
    if (code != 0) {
        broker_free(broker);
        return code;
    }
    *out = broker;
    return 0;
}

/* What was given back and the broker does not know yet is said first. */
static void settle_locked(struct teemate_broker *broker)
{
    for (;;) {
        struct request *request = broker->first;

        while (request != NULL && !(request->flags & REQUEST_GIVES_BACK))
            request = request->next;
        if (request == NULL || broker->lost.code != 0)
            return;
        if (broker->reading) {
            broker_wait_locked(broker, FOREVER);
            continue;
        }
        if (!broker->away && now_ns() >= request->deadline)
            return;
        broker->reading = true;
        pthread_mutex_unlock(&broker->lock);
        link_read(broker, NS_PER_S);
        pthread_mutex_lock(&broker->lock);
        link_stop_reading_locked(broker);
    }
}

int teemate_disconnect(struct teemate_broker *broker, struct teemate_error *error)
{
    struct teemate_error closed;
    int code;

    if (broker == NULL)
        return 0;
    if (broker->process != fork_process()) {
        /* What else there is of it may be in the middle of a change by a thread that is not here. */
        if (broker->fd >= 0)
            close(broker->fd);
        broker->fd = -1;
        return 0;
    }
    while (broker->grants != NULL) {
        code = teemate_detach(broker->grants, error);
        if (code != 0)
            return code;
    }
    error_set(&closed, TEEMATE_CONNECTION_LOST, "the connection to %s was closed by this program",
              broker->address.sun_path);
    pthread_mutex_lock(&broker->lock);
    settle_locked(broker);
    link_end_locked(broker, &closed, false);
    listener_forget_locked(broker);
    while (broker->reading || broker->waiting != 0) { /* the listener, or who waits for events */
        broker_wake_locked(broker);
        broker_wait_locked(broker, now_ns() + 10 * NS_PER_MS);
    }
    link_close_locked(broker);
    pthread_mutex_unlock(&broker->lock);
    broker_unreference(broker);
    return 0;
}

/* ---- what everybody may ask --------------------------------------------------------- */

int teemate_ping(struct teemate_broker *broker, struct teemate_error *error)
{
    return request_do(broker, request_new(broker, "ping", REQUEST_REPEATABLE, 0, 0), NULL, error);
}

struct untrusted_entry {
    struct value backend, isolation, state, slots;
    struct teemate_enclave_entry entry;
};

static uint32_t choice(const struct value *value, const char *const *names, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (value_is_text(value, names[i]))
            return i;
    return count;
}

const char *entry_read(const struct value *untrusted, struct teemate_enclave_entry *entry)
{
#define ENTRY(kind, member, optional) FIELD(kind, struct untrusted_entry, entry.member, #member, optional)
#define OTHER(member) FIELD(FIELD_VALUE, struct untrusted_entry, member, #member, false)
    static const struct field fields[] = {
        ENTRY(FIELD_TEXT, name, false), ENTRY(FIELD_U64, generation, false), OTHER(backend), OTHER(isolation),
        OTHER(state), ENTRY(FIELD_TEXT, reason, true), ENTRY(FIELD_BYTES, mrenclave, false),
        ENTRY(FIELD_BYTES, mrsigner, false), ENTRY(FIELD_U16, isvprodid, false), ENTRY(FIELD_U16, isvsvn, false),
        ENTRY(FIELD_BOOL, debug, false), ENTRY(FIELD_BOOL, sdk, false), ENTRY(FIELD_U64, base, false),
        ENTRY(FIELD_U64, size, false), ENTRY(FIELD_U64, pages, false), ENTRY(FIELD_U64, owner, false), OTHER(slots),
        ENTRY(FIELD_U64, clients, false),
    };
#define COUNT(member) FIELD(FIELD_U64, struct teemate_enclave_entry, slots_##member, #member, false)
    static const struct field counts[] = {COUNT(total), COUNT(free), COUNT(used), COUNT(withheld), COUNT(quarantined),
                                          COUNT(waiting)};
    static const char *const backends[] = {"auto", "sim", "sgx"};
    static const char *const isolations[] = {"none", "gate", "fence"};
    static const char *const states[] = {"building", "ready", "draining", "quarantined", "lost"};
    struct untrusted_entry read = {0};
    const char *wrong = map_read(untrusted, fields, sizeof(fields) / sizeof(fields[0]), &read);

    if (wrong == NULL)
        wrong = map_read(&read.slots, counts, sizeof(counts) / sizeof(counts[0]), &read.entry);
    if (wrong != NULL)
        return wrong;
    read.entry.backend = choice(&read.backend, backends, 3);
    read.entry.isolation = choice(&read.isolation, isolations, 3);
    read.entry.state = choice(&read.state, states, 5);
    if (read.entry.backend != TEEMATE_SIM && read.entry.backend != TEEMATE_SGX)
        return "backend";
    if (read.entry.isolation == 3)
        return "isolation";
    if (read.entry.state == 5)
        return "state";
    *entry = read.entry;
    return NULL;
}

struct listing {
    struct teemate_enclave_entry *entries;
    size_t capacity, count;
};

static int take_enclaves(struct teemate_broker *broker, const struct value *ok, struct descriptors *descriptors,
                         void *context, struct teemate_error *error)
{
    struct listing *listing = context;
    struct value enclaves = map_value(ok, "enclaves"), one;
    struct items items = items_of(&enclaves);
    struct teemate_enclave_entry entry;
    const char *wrong = enclaves.kind == VALUE_ARRAY ? NULL : "enclaves";

    (void)broker, (void)descriptors;
    while (wrong == NULL && items_next(&items, &one)) {
        wrong = entry_read(&one, &entry);
        if (wrong == NULL && listing->count < listing->capacity)
            listing->entries[listing->count] = entry;
        listing->count++;
    }
    if (wrong != NULL)
        return error_set(error, TEEMATE_PROTOCOL_ERROR, "the broker's list of enclaves has no valid '%s'", wrong);
    return 0;
}

int teemate_enclaves(struct teemate_broker *broker, struct teemate_enclave_entry *entries, size_t capacity,
                     size_t *count, struct teemate_error *error)
{
    struct listing listing = {.entries = entries, .capacity = capacity};
    struct request *request = request_new(broker, "enclaves", REQUEST_REPEATABLE, 0, 0);
    int code;

    if (request != NULL) {
        request->take = take_enclaves;
        request->context = &listing;
    }
    code = request_do(broker, request, NULL, error);
    if (code == 0 && count != NULL)
        *count = listing.count;
    return code;
}

/* ---- events --------------------------------------------------------------------------- */

void broker_event_locked(struct teemate_broker *broker, struct teemate_event event)
{
    if (broker->event_count == EVENTS_KEPT) { /* the oldest goes */
        broker->event_first = (broker->event_first + 1) % EVENTS_KEPT;
        broker->event_count--;
        broker->events_missed++;
    }
    broker->events[(broker->event_first + broker->event_count) % EVENTS_KEPT] = event;
    broker->event_count++;
    broker_wake_locked(broker);
}

int teemate_next_event(struct teemate_broker *broker, int timeout_ms, struct teemate_event *event,
                       struct teemate_error *error)
{
    uint64_t deadline = timeout_ms < 0 ? FOREVER : now_ns() + (uint64_t)timeout_ms * NS_PER_MS;
    int code = broker_check_process(broker, error);

    if (code != 0)
        return code;
    pthread_mutex_lock(&broker->lock);
    listener_watch_locked(broker);
    while (broker->event_count == 0 && broker->lost.code == 0 && now_ns() < deadline)
        broker_wait_locked(broker, deadline);
    if (broker->event_count != 0) {
        *event = broker->events[broker->event_first];
        event->missed = broker->events_missed;
        broker->events_missed = 0;
        broker->event_first = (broker->event_first + 1) % EVENTS_KEPT;
        broker->event_count--;
    } else if (broker->lost.code != 0) {
        code = error_copy(error, &broker->lost);
    } else {
        code = error_set(error, TEEMATE_CALL_TIMEOUT, "no event within %d ms", timeout_ms);
    }
    pthread_mutex_unlock(&broker->lock);
    return code;
}
