/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What makes a new connection the same client again, and how often one is tried.
 *
 * A broker with a descriptor store keeps its clients' grants while it is restarted.  It knows a client
 * again by a token, which is good in the process that got it and nowhere else.  The client's first hello
 * brings a random one of its own, since the broker may end before its answer with the first token of its
 * making has arrived, but after it has granted what came along with that hello.
 *
 * Requests without an answer are sent again with their numbers, by which the broker knows what it has done.
 */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client.h"

#define PROTOCOL_VERSION 1
#define FIRST_PAUSE (10 * NS_PER_MS)
#define LONGEST_PAUSE (500 * NS_PER_MS)
#define SETTLED (200 * NS_PER_MS)      /* a connection has to last this long until the pauses begin anew */
#define GREETING_GRACE (30 * NS_PER_S) /* for a first greeting, over however many of the broker's lives */

int session_begin(struct session *session)
{
    session->number = 1;
    session->grace = GREETING_GRACE;
    return getrandom(session->token, TOKEN_SIZE, 0) == TOKEN_SIZE ? 0 : -EIO;
}

size_t session_hello(const struct teemate_broker *broker, bool resume, uint8_t *buffer, size_t size)
{
    struct writer writer = {.start = buffer, .at = buffer, .end = buffer + size};

    write_map(&writer, 3);
    write_text(&writer, "id");
    write_uint(&writer, 0);
    write_text(&writer, "op");
    write_text(&writer, "hello");
    write_text(&writer, "args");
    write_map(&writer, broker->client[0] != 0 ? 4 : 3);
    write_text(&writer, "version");
    write_uint(&writer, PROTOCOL_VERSION);
    write_text(&writer, "counters");
    write_bool(&writer, true);
    if (broker->client[0] != 0) {
        write_text(&writer, "client");
        write_text(&writer, broker->client);
    }
    write_text(&writer, resume ? "resume" : "session");
    write_bytes(&writer, broker->session.token, TOKEN_SIZE);
    return (size_t)(writer.at - writer.start);
}

/* The error for what belongs to a session that the broker does not know any more. */
int resume_over(const struct teemate_broker *broker, struct teemate_error *error)
{
    return error_set(error, TEEMATE_ENCLAVE_LOST,
                     "the broker came back without this grant (it had lost its state, or this process was away for longer"
                     " than resume_grace = %g s): attach again",
                     (double)broker->session.grace / NS_PER_S);
}

/* ---- an absence ------------------------------------------------------------------ */

/* A try has failed. */
static void absence_failed(struct absence *absence, const char *reason)
{
    absence->dialled = false;
    text_copy(absence->reason, sizeof(absence->reason), (const uint8_t *)reason, strlen(reason));
    absence->next_try = now_ns() + absence->pause;
    absence->pause = 2 * absence->pause < LONGEST_PAUSE ? 2 * absence->pause : LONGEST_PAUSE;
}

static void absence_begin(struct absence *absence, uint64_t grace)
{
    uint64_t now = now_ns();
    bool settled = absence->over == 0 || now - absence->over >= SETTLED;

    absence->deadline = now + grace;
    absence->next_try = now;
    absence->dialled = false;
    absence->reason[0] = 0;
    if (settled)
        absence->pause = FIRST_PAUSE;
    else /* a broker that greets and ends at once is not asked faster than one that does not answer */
        absence_failed(absence, "the connection ended");
}

void resume_ended_locked(struct teemate_broker *broker)
{
    struct teemate_error farewell = broker->farewell, broken = broker->broken;
    bool full = farewell.code == TEEMATE_BUSY || farewell.code == TEEMATE_LIMIT_REACHED;

    broker->farewell.code = broker->broken.code = 0;
    if (broker->lost.code != 0)
        return;
    if (farewell.code != 0 && !(full && broker->away)) {
        /* Who keeps grants and says why it ends this connection has ended them with it. */
        link_end_locked(broker, &farewell, broker->away || broker->session.kept);
        return;
    }
    if (!broker->session.kept && broker->session.welcomed) {
        if (broken.code == 0)
            error_set(&broken, TEEMATE_CONNECTION_LOST,
                      "the broker at %s ended; calls in enclaves go on, new requests need it back",
                      broker->address.sun_path);
        link_end_locked(broker, &broken, false);
        return;
    }
    link_close_locked(broker);
    if (broker->away) {
        absence_failed(&broker->absence,
                       farewell.code != 0 ? farewell.text : "the broker ended again before it had greeted us");
        return;
    }
    absence_begin(&broker->absence, broker->session.grace);
    broker->away = true;
    atomic_store(&broker->attention, true);
    broker_event_locked(broker, (struct teemate_event){.kind = TEEMATE_EVENT_AWAY});
}

void resume_give_up_locked(struct teemate_broker *broker)
{
    struct teemate_error error;
    const char *path = broker->address.sun_path, *reason = broker->absence.reason;

    if (broker->session.welcomed)
        error_set(&error, TEEMATE_CONNECTION_LOST,
                  "the broker at %s did not come back within resume_grace = %g s (last try: %s): see its log, start it,"
                  " then connect and attach again", path, (double)broker->session.grace / NS_PER_S, reason);
    else
        error_set(&error, TEEMATE_CONNECTION_LOST,
                  "the broker at %s ended before it had greeted us, and none took its place (last try: %s): see its log,"
                  " start it, then connect and attach again", path, reason);
    link_end_locked(broker, &error, true);
}

/* Connect and greet, without ever waiting: a socket whose queue is full is tried again later.  The
 * descriptor, or -errno. */
static int dial(struct teemate_broker *broker)
{
    uint8_t hello[192];
    size_t size = session_hello(broker, true, hello, sizeof(hello));
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), number;

    if (fd < 0)
        return -errno;
    if (connect(fd, (const struct sockaddr *)&broker->address, sizeof(broker->address)) != 0 ||
        send(fd, hello, size, MSG_NOSIGNAL) < 0) {
        number = errno;
        close(fd);
        return -number;
    }
    return fd;
}

void resume_come_back_unlock(struct teemate_broker *broker, uint64_t patience)
{
    uint64_t now = now_ns(), due = broker->absence.next_try;
    int fd;

    if (due > now) {
        if (patience != 0)
            broker_wait_locked(broker, due < now + patience ? due : now + patience);
        pthread_mutex_unlock(&broker->lock);
        return;
    }
    fd = dial(broker); /* which does not wait */
    if (fd < 0) {
        absence_failed(&broker->absence, strerror(-fd));
        /* Nobody keeps this socket open for another broker. */
        if (!broker->session.welcomed && fd != -EAGAIN)
            resume_give_up_locked(broker);
    } else {
        broker->fd = fd;
        broker->greeted = true;
        broker->absence.dialled = true;
        listener_add_fd_locked(broker);
    }
    pthread_mutex_unlock(&broker->lock);
}

/* ---- greeted ------------------------------------------------------------------------ */

/*
 * Answer what must not be asked of a broker that does not know us.  `nothing_done`: it keeps its sessions and
 * knows nothing of this one, so none of its requests was carried out.
 */
static void forget_locked(struct teemate_broker *broker, bool nothing_done, const struct teemate_error *over)
{
    struct request *request = broker->first, *next;
    struct teemate_error error;

    for (; request != NULL; request = next) {
        next = request->next;
        if (request->session != 0 || request->orphan) {
            /* Of grants that have ended, or for callers that have gone: nothing is left to undo. */
            request_answer_locked(broker, request, over->code, over);
        } else if (request->sent && !nothing_done && !(request->flags & REQUEST_REPEATABLE)) {
            error_set(&error, TEEMATE_CONNECTION_LOST,
                      "the broker at %s came back without its state while '%s' was under way: whether it was done is not"
                      " known; `teemate status` tells what is there", broker->address.sun_path, request->op);
            request_answer_locked(broker, request, error.code, &error);
        }
    }
}

static void session_welcome(struct session *session, const struct value *ok)
{
    struct value token = map_value(ok, "token");
    uint32_t grace = (uint32_t)(session->grace / NS_PER_MS);
    const struct field fields[] = {{"resume_grace", FIELD_MILLISECONDS, true, 0, sizeof(grace)}};

    session->welcomed = true;
    session->kept = token.kind == VALUE_BYTES && token.size == TOKEN_SIZE;
    if (!session->kept)
        return;
    memcpy(session->token, token.data, TOKEN_SIZE);
    if (map_read(ok, fields, 1, &grace) == NULL)
        session->grace = grace * NS_PER_MS;
}

void resume_welcome_locked(struct teemate_broker *broker, const struct value *ok)
{
    struct value resumed = map_value(ok, "resumed"), token = map_value(ok, "token");
    bool known = resumed.kind == VALUE_ARRAY;
    struct teemate_error over;
    struct request *request;

    if (!broker->away) {
        session_welcome(&broker->session, ok);
        return;
    }
    if (!known) {
        resume_over(broker, &over);
        forget_locked(broker, token.kind == VALUE_BYTES && !broker->session.welcomed, &over);
        broker->session.number++;
    }
    session_welcome(&broker->session, ok);
    broker->backlog = 0;
    for (request = broker->first; request != NULL; request = request->next) {
        request->queued = true;
        request->deadline = now_ns() + request->wait + REPLY_TIMEOUT;
        broker->backlog++;
    }
    broker->absence.over = now_ns();
    broker->away = false;
    /* Before the requests: what they ask of grants that are gone is answered by what the grants know. */
    if (known)
        grants_resumed_locked(broker, &resumed);
    else
        grants_forgotten_locked(broker);
    broker_event_locked(broker, (struct teemate_event){.kind = known ? TEEMATE_EVENT_BACK : TEEMATE_EVENT_FORGOTTEN});
    link_flush_locked(broker);
    broker_wake_locked(broker);
}
