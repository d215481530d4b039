/* SPDX-License-Identifier: Apache-2.0 */
/*
 * teemate-warden: started by the broker, one per enclave, with one end of a
 * SOCK_SEQPACKET socketpair as descriptor 3.  Answers one request after the other and
 * ends when the other end is closed.
 *
 *     teemate-warden [storage|lending LIMIT]
 *
 * With `storage`, descriptor 4 is the folder of the enclave's files, which may take LIMIT bytes (0: no limit).  With
 * `lending` clients may have descriptors of them besides: what they write is not held to the limit.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "crypto.h"
#include "sandbox.h"
#include "slot.h"
#include "warden.h"

/*
 * End with the broker.  Not PR_SET_PDEATHSIG: that fires when the thread ends
 * that forked us, and trio forks in a short-lived one.  This thread never enters
 * the enclave, so it ends the process also while a control ECALL hangs.
 */
static void *watch(void *unused)
{
    struct pollfd watched = {.fd = WARDEN_SOCKET, .events = 0};

    (void)unused;
    for (;;) {
        if (poll(&watched, 1, -1) > 0 && (watched.revents & (POLLHUP | POLLERR | POLLNVAL)) != 0)
            _exit(0);
    }
}

static int watch_start(void)
{
    pthread_attr_t attributes;
    sigset_t all;
    sigset_t before;
    pthread_t thread;
    int result;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    result = pthread_create(&thread, &attributes, watch, NULL);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -result;
}

static void fds_close(struct warden_fds *fds)
{
    for (size_t i = 0; i < fds->count; i++) {
        if (fds->fd[i] >= 0)
            close(fds->fd[i]);
    }
    fds->count = 0;
}

/* Every descriptor that came is either in `fds` or closed: more than two are too many. */
static void fds_collect(struct msghdr *message, struct warden_fds *fds, bool *too_many)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c != NULL; c = CMSG_NXTHDR(message, c)) {
        size_t count;

        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
            if (fds->count < sizeof(fds->fd) / sizeof(fds->fd[0])) {
                fds->fd[fds->count++] = fd;
            } else {
                close(fd);
                *too_many = true;
            }
        }
    }
}

/*
 * The next request.  Returns 0, or -EBADMSG for one that cannot be one (its
 * descriptors are closed), or -EPIPE when there are no more.
 */
static int receive(struct warden_request *request, struct warden_fds *fds)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(8 * sizeof(int))];
    } control;
    struct iovec part = {.iov_base = request, .iov_len = sizeof(*request)};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    bool too_many = false;
    ssize_t size;

    memset(request, 0, sizeof(*request));
    fds->count = 0;
    do
        size = recvmsg(WARDEN_SOCKET, &message, MSG_CMSG_CLOEXEC);
    while (size < 0 && errno == EINTR);
    if (size <= 0)
        return -EPIPE;
    fds_collect(&message, fds, &too_many);
    if (size == (ssize_t)sizeof(*request) && (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0 && !too_many &&
        request->version == WARDEN_PROTOCOL_VERSION)
        return 0;
    fds_close(fds);
    return -EBADMSG;
}

/* Wait for a request, and tell the time meanwhile to an enclave that wants it. */
static void await_request(struct warden *warden)
{
    struct pollfd waiting = {.fd = WARDEN_SOCKET, .events = POLLIN};

    while (poll(&waiting, 1, warden_wants_time(warden) ? WARDEN_TICK_MS : -1) == 0)
        warden_tick(warden);
}

static int serve(struct warden *warden)
{
    struct warden_request *request = secret_map(sizeof(*request));
    struct warden_reply reply;
    struct warden_fds fds;

    if (request == NULL)
        return -ENOMEM;
    for (;;) {
        int result;

        await_request(warden);
        result = receive(request, &fds);
        if (result == -EPIPE)
            return 0;
        memset(&reply, 0, sizeof(reply));
        reply.id = request->id;
        if (result == 0) {
            warden_handle(warden, request, &fds, &reply);
        } else {
            reply.status = -EBADMSG;
            snprintf(reply.text, sizeof(reply.text), "requests have %zu bytes, version %u and at most 2 descriptors",
                     sizeof(*request), WARDEN_PROTOCOL_VERSION);
        }
        crypto_wipe(request, sizeof(*request));
        fds_close(&fds);
        if (sendto(WARDEN_SOCKET, &reply, sizeof(reply), MSG_NOSIGNAL, NULL, 0) != (ssize_t)sizeof(reply))
            return 0;
    }
}

/* Whether the enclave has storage is known before anything of the enclave is: it decides what may be called. */
static int read_arguments(struct warden *warden, int count, char **arguments)
{
    char *end = NULL;

    if (count == 1)
        return 0;
    if (count != 3 || (strcmp(arguments[1], "storage") != 0 && strcmp(arguments[1], "lending") != 0))
        return -EINVAL;
    warden->storage = true;
    warden->lends = strcmp(arguments[1], "lending") == 0;
    warden->storage_limit = strtoull(arguments[2], &end, 10);
    return *end == '\0' && end != arguments[2] ? 0 : -EINVAL;
}

int main(int count, char **arguments)
{
    struct warden warden = {0};
    const char *step = "arguments: none, or `storage LIMIT`, or `lending LIMIT`";
    int result = read_arguments(&warden, count, arguments);

    if (result == 0)
        result = sandbox_enter(warden.storage, &step);

    if (result == 0) {
        step = "memory for the control key";
        warden.key = secret_map(sizeof(*warden.key));
        result = warden.key != NULL ? 0 : -ENOMEM;
    }
    if (result == 0) {
        step = "seccomp";
        result = sandbox_filter(warden.storage);
    }
    if (result == 0) {
        step = "watching the socketpair";
        result = watch_start();
    }
    if (result == 0) {
        step = "serving";
        result = serve(&warden);
    }
    if (result == 0)
        return 0;
    fprintf(stderr, "teemate-warden: %s: %s (is descriptor 3 the broker's socketpair?)\n", step,
            strerror(-result));
    return 1;
}
