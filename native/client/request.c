/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A request until its answer has come, and how its maker waits: whoever waits for an answer reads, one
 * thread at a time, and hands what belongs to others to them.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client.h"

#define SLICE (50 * NS_PER_MS)
#define HEAD_SIZE 64u /* map, "id", number, "op", name, "args", map */

void descriptors_close(struct descriptors *descriptors)
{
    for (int i = 0; i < descriptors->count; i++)
        if (descriptors->fd[i] >= 0)
            close(descriptors->fd[i]);
    descriptors->count = 0;
}

struct request *request_new(struct teemate_broker *broker, const char *op, uint32_t flags, size_t args, size_t capacity)
{
    struct request *request = malloc(sizeof(*request) + HEAD_SIZE + capacity);
    struct writer *writer;

    if (request == NULL)
        return NULL;
    *request = (struct request){.op = op, .flags = flags};
    request->number = atomic_fetch_add(&broker->last_number, 1) + 1;
    writer = &request->writer;
    writer->start = writer->at = request->data;
    writer->end = request->data + HEAD_SIZE + capacity;
    write_map(writer, args ? 3 : 2);
    write_text(writer, "id");
    write_uint(writer, request->number);
    write_text(writer, "op");
    write_text(writer, op);
    if (args) {
        write_text(writer, "args");
        write_map(writer, args);
    }
    return request;
}

static void unlink_locked(struct teemate_broker *broker, struct request *request)
{
    struct request **at = &broker->first;

    while (*at != request)
        at = &(*at)->next;
    *at = request->next;
    if (broker->last == &request->next)
        broker->last = at;
    if (request->queued)
        broker->backlog--;
    request->queued = false;
}

void request_answer_locked(struct teemate_broker *broker, struct request *request, int code,
                           const struct teemate_error *error)
{
    unlink_locked(broker, request);
    if (request->orphan) {
        free(request);
        return;
    }
    request->answered = true;
    request->code = code;
    if (code != 0 && error != NULL)
        error_copy(request->error, error);
    broker_wake_locked(broker);
}

/* Until when to look whether it was answered; 0: it takes too long. */
static uint64_t patience_locked(const struct teemate_broker *broker, const struct request *request)
{
    uint64_t now = now_ns();

    if (broker->away)
        return (broker->absence.deadline > now ? broker->absence.deadline : now) + SLICE;
    return request->deadline > now ? request->deadline : 0;
}

/* The caller goes without an answer. */
static int disown_locked(struct teemate_broker *broker, struct request *request, int code)
{
    if (request->sent || request->flags & REQUEST_GIVES_BACK) {
        request->orphan = true;
        request->error = NULL;
    } else {
        unlink_locked(broker, request);
        free(request);
    }
    return code;
}

static int await_locked(struct teemate_broker *broker, struct request *request, bool stays_if_away,
                        struct teemate_error *error)
{
    int code;

    while (!request->answered) {
        uint64_t until;

        if (broker->lost.code != 0) /* then it is in no list any more */
            break;
        if (broker->away && !stays_if_away) {
            code = disown_locked(broker, request, TEEMATE_CONNECTION_LOST);
            request = NULL;
            break;
        }
        until = patience_locked(broker, request);
        if (until == 0) {
            code = disown_locked(broker, request,
                                 error_set(error, TEEMATE_CONNECTION_LOST,
                                           "the broker at %s gave no answer to '%s' in time: see its log",
                                           broker->address.sun_path, request->op));
            request = NULL;
            break;
        }
        if (broker->reading) {
            broker_wait_locked(broker, until);
            continue;
        }
        broker->reading = true;
        if (broker->watched && !broker->muted)
            listener_mute_locked(broker, true);
        pthread_mutex_unlock(&broker->lock);
        until -= now_ns();
        link_read(broker, until < FOREVER / 2 ? until : 0);
        pthread_mutex_lock(&broker->lock);
        link_stop_reading_locked(broker);
    }
    if (request != NULL) {
        code = request->answered ? request->code : error_copy(error, &broker->lost);
        free(request);
    }
    return code;
}

static int request_run(struct teemate_broker *broker, struct request *request, void (*meanwhile)(void), bool stays_if_away,
                       struct teemate_error *error)
{
    int code;

    if (request == NULL)
        return error_set(error, TEEMATE_LIMIT_REACHED, "no memory for a request");
    if (request->writer.full) { /* names are checked, lists have room */
        free(request);
        return error_set(error, TEEMATE_INTERNAL_ERROR, "a request that does not fit its buffer");
    }
    code = broker_check_process(broker, error);
    if (code != 0) {
        free(request);
        return code;
    }
    request->error = error;
    pthread_mutex_lock(&broker->lock);
    broker->asking++;
    /* Before the answer can be there: else the listener would be woken for it as well, and hand it over. */
    if (broker->watched && !broker->muted && !broker->reading)
        listener_mute_locked(broker, true);
    code = link_send_locked(broker, request, error);
    if (code != 0) {
        free(request);
    } else {
        if (meanwhile != NULL) {
            pthread_mutex_unlock(&broker->lock);
            meanwhile();
            pthread_mutex_lock(&broker->lock);
        }
        code = await_locked(broker, request, stays_if_away, error);
    }
    broker->asking--;
    if (broker->asking == 0 && broker->watched && broker->muted)
        listener_mute_locked(broker, false);
    pthread_mutex_unlock(&broker->lock);
    return code;
}

int request_do(struct teemate_broker *broker, struct request *request, void (*meanwhile)(void), struct teemate_error *error)
{
    return request_run(broker, request, meanwhile, true, error);
}

void request_tell(struct teemate_broker *broker, struct request *request)
{
    /* What it would have given back ends with the session, when there is no broker any more. */
    (void)request_run(broker, request, NULL, false, NULL);
}

void request_post_locked(struct teemate_broker *broker, struct request *request)
{
    if (request == NULL)
        return;
    request->orphan = true;
    if (request->writer.full || link_send_locked(broker, request, NULL) != 0)
        free(request);
}
