/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sockets to the broker, one after the other, and what comes and goes through them.
 *
 * `hello` goes out together with the first request, in one system call: both answers come in one round
 * trip.  Nothing blocks in a send: what the socket does not take at once waits for the reader, else two
 * sides that send and do not read could wait for each other.
 */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client.h"
#include "crypto.h"

/* So many the kernel lets through (include/net/scm.h).  There is room for all of them, so that what was
 * sent too much is closed here and nothing is left with the kernel. */
#define SCM_MAX_FD 253

bool link_is_end(int number)
{
    return number == EPIPE || number == ECONNRESET || number == ENOTCONN;
}

int link_connect(struct teemate_broker *broker, struct teemate_error *error)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), number;

    if (fd < 0)
        return error_native(error, -errno, NULL, "making a socket");
    while (connect(fd, (const struct sockaddr *)&broker->address, sizeof(broker->address)) != 0) {
        number = errno;
        if (number == EINTR)
            continue;
        close(fd);
        error_set(error, TEEMATE_CONNECTION_LOST,
                  "no broker answers at %s (%s): is teemate-broker running, and is TEEMATE_SOCKET right?",
                  broker->address.sun_path, strerror(number));
        if (error != NULL)
            error->system_errno = number;
        return TEEMATE_CONNECTION_LOST;
    }
    broker->fd = fd;
    return 0;
}

/* ---- sending ------------------------------------------------------------------ */

/* One request, with our greeting before it if need be.  0 or an errno. */
static int transmit(struct teemate_broker *broker, const struct request *request)
{
    uint8_t hello[192];
    struct iovec parts[2] = {{.iov_base = hello}, {.iov_base = request->writer.start}};
    struct mmsghdr messages[2] = {{.msg_hdr = {.msg_iov = &parts[0], .msg_iovlen = 1}},
                                  {.msg_hdr = {.msg_iov = &parts[1], .msg_iovlen = 1}}};
    int sent, first = broker->greeted ? 1 : 0;

    parts[1].iov_len = (size_t)(request->writer.at - request->writer.start);
    if (first == 0)
        parts[0].iov_len = session_hello(broker, false, hello, sizeof(hello));
    while (first < 2) {
        sent = sendmmsg(broker->fd, &messages[first], (unsigned)(2 - first), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0)
            return errno;
        first += sent;
        broker->greeted = true;
    }
    return 0;
}

/* False when the socket does not take it now. */
static bool send_now_locked(struct teemate_broker *broker, struct request *request)
{
    struct teemate_error error;
    int number = transmit(broker, request);

    if (number == EAGAIN)
        return false;
    if (number != 0 && !link_is_end(number)) {
        error_set(&error, TEEMATE_LIMIT_REACHED, "the kernel does not take '%s' for the broker: %s", request->op,
                  strerror(number));
        error.system_errno = number;
        request_answer_locked(broker, request, error.code, &error);
        return true;
    }
    /* The broker may have said why before it closed, and the reader finds out what comes next. */
    if (number != 0 && broker->broken.code == 0) {
        error_set(&broker->broken, TEEMATE_CONNECTION_LOST, "the broker at %s closed the connection (%s): see its log",
                  broker->address.sun_path, strerror(number));
        broker->broken.system_errno = number;
    }
    request->sent = true;
    return true;
}

int link_send_locked(struct teemate_broker *broker, struct request *request, struct teemate_error *error)
{
    if (broker->lost.code != 0)
        return error_copy(error, &broker->lost);
    if (request->session != 0 && request->session != broker->session.number)
        return resume_over(broker, error);
    request->deadline = now_ns() + request->wait + REPLY_TIMEOUT;
    *broker->last = request;
    broker->last = &request->next;
    if (broker->away || broker->backlog != 0 || !send_now_locked(broker, request)) {
        request->queued = true;
        broker->backlog++;
    }
    return 0;
}

void link_flush_locked(struct teemate_broker *broker)
{
    struct request *request = broker->first, *next;

    for (; request != NULL && broker->backlog != 0 && !broker->away; request = next) {
        next = request->next;
        if (!request->queued)
            continue;
        request->queued = false;
        broker->backlog--;
        if (!send_now_locked(broker, request)) {
            request->queued = true;
            broker->backlog++;
            return;
        }
    }
}

/* ---- receiving: only the thread that has set `reading` ------------------------------ */

static struct request *find_locked(struct teemate_broker *broker, uint64_t number)
{
    struct request *request = broker->first;

    while (request != NULL && request->number != number)
        request = request->next;
    return request;
}

static void end_protocol_locked(struct teemate_broker *broker, const char *what, const char *reason)
{
    struct teemate_error error;

    error_set(&error, TEEMATE_PROTOCOL_ERROR, "the broker at %s sent what the protocol does not allow: %s%s%s",
              broker->address.sun_path, what, reason[0] ? ": " : "", reason);
    link_end_locked(broker, &error, false);
}

struct untrusted_message {
    struct value id, ok, error, event;
};

static void answer_locked(struct teemate_broker *broker, const struct untrusted_message *message,
                          struct descriptors *descriptors)
{
    struct value id = message->id, ok = message->ok, untrusted = message->error;
    struct teemate_error error = {0};
    struct request *request;
    int code = 0;

    if (ok.kind != VALUE_MAP && untrusted.kind != VALUE_MAP) {
        end_protocol_locked(broker, "neither an answer nor an error", "");
        return;
    }
    if (ok.kind != VALUE_MAP)
        code = error_read(&error, &untrusted);
    if (id.kind == VALUE_NULL || id.kind == VALUE_NONE || (id.kind == VALUE_UINT && id.number == 0)) {
        if (code == 0) {
            resume_welcome_locked(broker, &ok);
            return;
        }
        /* The greeting was refused, or the broker could not read a request of ours. */
        broker->farewell = error;
        if (broker->away)
            resume_ended_locked(broker);
        return;
    }
    request = id.kind == VALUE_UINT ? find_locked(broker, id.number) : NULL;
    if (request == NULL) {
        end_protocol_locked(broker, "an answer to a request that nobody made", "");
        return;
    }
    if (code == 0 && request->orphan) {
        answer_undo undo = request->undo;
        uint64_t grant = request->grant;

        request_answer_locked(broker, request, 0, NULL);
        if (undo != NULL)
            undo(broker, &ok, grant);
    } else {
        answer_undo undo = request->undo;
        uint64_t grant = request->grant;
        bool granted = code == 0;

        if (granted && request->take != NULL)
            code = request->take(broker, &ok, descriptors, request->context, &error);
        request_answer_locked(broker, request, code, &error);
        if (granted && code == TEEMATE_PROTOCOL_ERROR)
            link_end_locked(broker, &error, false); /* what it granted cannot be told: the end gives it back */
        else if (granted && code != 0 && undo != NULL)
            undo(broker, &ok, grant);
    }
    link_flush_locked(broker);
}

static void packet_locked(struct teemate_broker *broker, size_t size, struct descriptors *descriptors)
{
#define MESSAGE(member) FIELD(FIELD_VALUE, struct untrusted_message, member, #member, true)
    static const struct field fields[] = {MESSAGE(id), MESSAGE(ok), MESSAGE(error), MESSAGE(event)};
    struct untrusted_message message = {0};
    struct value map;
    const char *reason = "";

    if (!message_check(broker->buffer, size, &map, &reason)) {
        end_protocol_locked(broker, "a malformed message", reason);
    } else {
        map_read(&map, fields, sizeof(fields) / sizeof(fields[0]), &message);
        if (message.event.kind == VALUE_TEXT)
            event_take_locked(broker, &map, descriptors);
        else
            answer_locked(broker, &message, descriptors);
    }
    descriptors_close(descriptors);
    crypto_wipe(broker->buffer, size); /* slot keys and tokens came this way */
}

/* Everything that rode on the packet; false when that is more than the protocol allows: closed then. */
static bool descriptors_of(struct msghdr *header, struct descriptors *descriptors)
{
    bool fit = true;

    for (struct cmsghdr *part = CMSG_FIRSTHDR(header); part != NULL; part = CMSG_NXTHDR(header, part)) {
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);

        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; i < count; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(fd));
            if (descriptors->count < MESSAGE_FDS) {
                descriptors->fd[descriptors->count++] = fd;
            } else {
                close(fd);
                fit = false;
            }
        }
    }
    if (!fit)
        descriptors_close(descriptors);
    return fit;
}

static void receive(struct teemate_broker *broker, int fd)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(SCM_MAX_FD * sizeof(int))];
    } control;
    struct iovec part = {.iov_base = broker->buffer, .iov_len = MESSAGE_MAX};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                            .msg_controllen = sizeof(control)};
    struct descriptors descriptors = {0};
    struct teemate_error error;
    ssize_t size = recvmsg(fd, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    int number = errno;

    if (size < 0 && (number == EAGAIN || number == EINTR))
        return;
    pthread_mutex_lock(&broker->lock);
    if (size < 0) {
        error_set(&error, TEEMATE_CONNECTION_LOST, "the connection to %s broke: %s", broker->address.sun_path,
                  strerror(number));
        error.system_errno = number;
        if (number != ECONNRESET)
            link_end_locked(broker, &error, false);
        else if (broker->broken.code == 0)
            /* The broker closed without having read everything; what it said before is still
             * to be read (the kernel reports the reset first, once). */
            broker->broken = error;
    } else if (!descriptors_of(&header, &descriptors)) {
        end_protocol_locked(broker, "more descriptors than a message can have", "");
    } else if (header.msg_flags & MSG_CTRUNC) {
        descriptors_close(&descriptors);
        error_set(&error, TEEMATE_LIMIT_REACHED,
                  "a message came with descriptors, and this process has none left: RLIMIT_NOFILE sets how many it"
                  " may have");
        memcpy(error.limit, "RLIMIT_NOFILE", sizeof("RLIMIT_NOFILE"));
        link_end_locked(broker, &error, false);
    } else if (header.msg_flags & MSG_TRUNC) {
        descriptors_close(&descriptors);
        end_protocol_locked(broker, "a message of more than 65536 bytes", "");
    } else if (size == 0) {
        descriptors_close(&descriptors);
        resume_ended_locked(broker);
    } else {
        packet_locked(broker, (size_t)size, &descriptors);
    }
    pthread_mutex_unlock(&broker->lock);
}

void link_read(struct teemate_broker *broker, uint64_t patience)
{
    struct pollfd fd = {.events = POLLIN};
    struct timespec wait;
    bool dialling = false;

    pthread_mutex_lock(&broker->lock);
    fd.fd = broker->fd;
    if (broker->away) {
        uint64_t now = now_ns(), left = broker->absence.deadline > now ? broker->absence.deadline - now : 0;

        if (left == 0)
            resume_give_up_locked(broker);
        dialling = broker->away && !broker->absence.dialled;
        patience = patience < left ? patience : left;
    }
    if (dialling) {
        resume_come_back_unlock(broker, patience);
        return;
    }
    pthread_mutex_unlock(&broker->lock);
    if (fd.fd < 0)
        return; /* given up, or closed by this program */
    if (patience != 0) {
        wait.tv_sec = (time_t)(patience / NS_PER_S);
        wait.tv_nsec = (long)(patience % NS_PER_S);
        if (ppoll(&fd, 1, patience == FOREVER ? NULL : &wait, NULL) <= 0)
            return;
    }
    receive(broker, fd.fd);
}

void link_stop_reading_locked(struct teemate_broker *broker)
{
    broker->reading = false;
    if (broker->lost.code != 0)
        link_close_locked(broker);
    broker_wake_locked(broker);
}

/* ---- the end --------------------------------------------------------------------- */

void link_close_locked(struct teemate_broker *broker)
{
    if (broker->fd < 0)
        return;
    listener_drop_fd_locked(broker);
    close(broker->fd);
    broker->fd = -1;
}

void link_end_locked(struct teemate_broker *broker, const struct teemate_error *error, bool forgotten)
{
    struct request *request, *next;

    if (broker->lost.code != 0)
        return;
    broker->lost = *error;
    broker->away = false;
    for (request = broker->first; request != NULL; request = next) {
        next = request->next;
        if (request->orphan)
            free(request);
        /* Whoever waits for it sees `lost`, and frees it. */
    }
    broker->first = NULL;
    broker->last = &broker->first;
    broker->backlog = 0;
    if (forgotten)
        grants_forgotten_locked(broker);
    broker_wake_locked(broker);
}
