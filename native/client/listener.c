/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One thread per process that reads the brokers' sockets when nobody else does.
 *
 * A revocation wants an answer even when nobody asks anything, and a broker that is restarted wants its
 * clients back while all of their threads are inside.  It starts while the broker answers the first attach
 * of a process, when there is nothing else to do, and looks after a broker from the first call on.  Who waits
 * for an answer reads for itself, without a switch of threads: it mutes the listener for the while, which costs
 * two cheap system calls.
 *
 * A lock of its own guards the list.  It is taken with a broker's lock held, never the other way round.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "client.h"
#include "thread.h"

#define STACK_SIZE (256u << 10)
#define AT_ONCE 16

static struct {
    pthread_mutex_t lock;
    int epoll, kick;    /* -1: not started */
    struct teemate_broker *first;
} listener = {PTHREAD_MUTEX_INITIALIZER, -1, -1, NULL};

static void forked(void)
{
    /* The child has the descriptors and no thread. */
    if (listener.epoll >= 0) {
        close(listener.epoll);
        close(listener.kick);
    }
    listener.epoll = listener.kick = -1;
    listener.first = NULL;
    pthread_mutex_init(&listener.lock, NULL);
}

static void prepare(void)
{
    pthread_atfork(NULL, NULL, forked);
}

/* Read what is there, or try to get back; returns when (now_ns()) to look again. */
static uint64_t step(struct teemate_broker *broker)
{
    uint64_t due = FOREVER;

    pthread_mutex_lock(&broker->lock);
    if (!broker->reading && broker->lost.code == 0) {
        broker->reading = true;
        pthread_mutex_unlock(&broker->lock);
        link_read(broker, 0);
        pthread_mutex_lock(&broker->lock);
        link_stop_reading_locked(broker);
    }
    atomic_store(&broker->attention, broker->away);
    if (broker->away && broker->reading) /* whoever that is kicks us afterwards */
        due = FOREVER;
    else if (broker->away && !broker->absence.dialled && broker->absence.next_try < broker->absence.deadline)
        due = broker->absence.next_try;
    else if (broker->away)
        due = broker->absence.deadline;
    pthread_mutex_unlock(&broker->lock);
    broker_unreference(broker);
    return due;
}

/* Those that have something to read or to do, referenced, in a list of the listener's own. */
static struct teemate_broker *collect(const struct epoll_event *ready, int count)
{
    struct teemate_broker *found = NULL;

    pthread_mutex_lock(&listener.lock);
    for (struct teemate_broker *broker = listener.first; broker != NULL; broker = broker->next_watched) {
        bool wanted = atomic_load(&broker->attention);

        for (int i = 0; i < count && !wanted; i++)
            wanted = ready[i].data.ptr == broker;
        if (!wanted)
            continue;
        atomic_fetch_add(&broker->references, 1);
        broker->next_step = found;
        found = broker;
    }
    pthread_mutex_unlock(&listener.lock);
    return found;
}

static void *listen_all(void *unused)
{
    struct epoll_event ready[AT_ONCE];
    uint64_t due = FOREVER, word;
    int epoll = listener.epoll, kick = listener.kick;

    (void)unused;
    for (;;) {
        uint64_t now = now_ns(), left = due > now ? (due - now) / NS_PER_MS + 1 : 0;
        int count = epoll_wait(epoll, ready, AT_ONCE, due == FOREVER ? -1 : left < 60000 ? (int)left : 60000);
        struct teemate_broker *found, *next;

        for (int i = 0; i < count; i++)
            if (ready[i].data.ptr == NULL && read(kick, &word, sizeof(word)) < 0 && errno != EAGAIN)
                return NULL;
        found = collect(ready, count);
        due = FOREVER;
        for (; found != NULL; found = next) {
            uint64_t again;

            next = found->next_step; /* before: the step may free it */
            again = step(found);
            due = again < due ? again : due;
        }
    }
}

static int start(void)
{
    struct epoll_event event = {.events = EPOLLIN};
    sigset_t most;
    int error;

    listener.epoll = epoll_create1(EPOLL_CLOEXEC);
    listener.kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (listener.epoll < 0 || listener.kick < 0 ||
        epoll_ctl(listener.epoll, EPOLL_CTL_ADD, listener.kick, &event) != 0) {
        error = -errno;
    } else {
        /* Signals are for the program's own threads. */
        sigfillset(&most);
        sigdelset(&most, SIGSEGV);
        sigdelset(&most, SIGBUS);
        sigdelset(&most, SIGILL);
        sigdelset(&most, SIGFPE);
        sigdelset(&most, SIGTRAP);
        error = thread_start(listen_all, STACK_SIZE, &most);
    }
    if (error == 0)
        return 0;
    if (listener.epoll >= 0)
        close(listener.epoll);
    if (listener.kick >= 0)
        close(listener.kick);
    listener.epoll = listener.kick = -1;
    return error;
}

static int control(struct teemate_broker *broker, int operation)
{
    struct epoll_event event = {.events = broker->muted ? 0 : EPOLLIN, .data = {.ptr = broker}};

    return broker->fd < 0 ? 0 : epoll_ctl(listener.epoll, operation, broker->fd, &event);
}

static bool started_locked(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, prepare);
    return listener.epoll >= 0 || start() == 0;
}

void listener_ready(void)
{
    pthread_mutex_lock(&listener.lock);
    (void)started_locked();
    pthread_mutex_unlock(&listener.lock);
}

void listener_watch_locked(struct teemate_broker *broker)
{
    if (broker->watched || broker->lost.code != 0)
        return;
    pthread_mutex_lock(&listener.lock);
    /* Where no thread can be had it is tried again with the next call. */
    if (started_locked()) {
        broker->muted = broker->reading;
        if (control(broker, EPOLL_CTL_ADD) == 0) {
            broker->watched = true;
            broker->next_watched = listener.first;
            listener.first = broker;
        }
    }
    pthread_mutex_unlock(&listener.lock);
}

void listener_mute_locked(struct teemate_broker *broker, bool muted)
{
    broker->muted = muted;
    control(broker, EPOLL_CTL_MOD);
    if (!muted && broker->away)
        listener_kick();
}

void listener_drop_fd_locked(struct teemate_broker *broker)
{
    /* Closing would not do when a child of fork has the same file open. */
    if (broker->watched)
        control(broker, EPOLL_CTL_DEL);
}

void listener_add_fd_locked(struct teemate_broker *broker)
{
    if (broker->watched)
        control(broker, EPOLL_CTL_ADD);
}

void listener_kick(void)
{
    uint64_t one = 1;

    /* Full is as good: it will be read. */
    if (listener.kick >= 0 && write(listener.kick, &one, sizeof(one)) < 0)
        return;
}

void listener_forget_locked(struct teemate_broker *broker)
{
    struct teemate_broker **at = &listener.first;

    if (!broker->watched)
        return;
    pthread_mutex_lock(&listener.lock);
    while (*at != NULL && *at != broker)
        at = &(*at)->next_watched;
    if (*at != NULL)
        *at = broker->next_watched;
    broker->watched = false;
    pthread_mutex_unlock(&listener.lock);
}
