/* SPDX-License-Identifier: Apache-2.0 */
#include "door.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "prompt.h"
#include "turn_away.h"

#define BUCKETS 1024 /* of the table of users; a power of two */
#define SWEEP 1024
#define LISTENERS 16
/* The watch has little to do, but must not be late. */
#define PRIORITY (-15)
#define SLICE_US 100

struct line {
    struct line *next;
    uint32_t uid;
    int waiting;
    uint32_t unlucky;
};

struct text {
    char *bytes;
    size_t length;
};

struct door {
    int longest, reserved, last;
    struct text full, scarce;
    int bell;

    pthread_mutex_t lock; /* of all below; never held during a system call but the bell's */
    struct line *lines[BUCKETS];
    struct door_caller *ready; /* a ring */
    size_t first, count, size;
    int failure;

    pthread_cond_t changed;
    pthread_t thread;
    int started, watching, ending;
    int listeners[LISTENERS];
    int listener_count;
    unsigned int pause_us, quiet_ms;
};

/* ---- what is counted; all under the lock -------------------------------------------- */

static struct line **find_line(struct door *door, uint32_t uid)
{
    struct line **at = &door->lines[(uid * 2654435761u) >> 22 & (BUCKETS - 1)];

    while (*at != NULL && (*at)->uid != uid)
        at = &(*at)->next;
    return at;
}

static void forget_if_unused(struct line **at)
{
    struct line *line = *at;

    if (line->waiting == 0 && line->unlucky == 0) {
        *at = line->next;
        free(line);
    }
}

static int make_room(struct door *door)
{
    size_t size = door->size != 0 ? door->size * 2 : SWEEP;
    struct door_caller *ready;

    if (door->count < door->size)
        return 0;
    ready = calloc(size, sizeof(*ready));
    if (ready == NULL)
        return -ENOMEM;
    for (size_t i = 0; i < door->count; i++)
        ready[i] = door->ready[(door->first + i) % door->size];
    free(door->ready);
    door->ready = ready;
    door->first = 0;
    door->size = size;
    return 0;
}

static int put(struct door *door, struct door_caller caller)
{
    const uint64_t one = 1;

    if (make_room(door) != 0)
        return -ENOMEM;
    door->ready[(door->first + door->count) % door->size] = caller;
    if (door->count++ == 0 && door->watching)
        (void)!write(door->bell, &one, sizeof(one));
    return 0;
}

/* Puts the connection in its user's line; else returns what it is to be told. */
static const struct text *line_up(struct door *door, int fd, uint32_t uid)
{
    struct door_caller caller = {.fd = fd, .kind = DOOR_WAITS, .uid = uid};
    const struct text *answer = NULL;
    struct line **at, *line;

    pthread_mutex_lock(&door->lock);
    at = find_line(door, uid);
    if (*at == NULL)
        *at = calloc(1, sizeof(**at));
    line = *at;
    if (line == NULL) {
        answer = &door->scarce;
    } else {
        line->uid = uid;
        if (fd >= door->reserved && (line->waiting > 0 || fd >= door->last))
            answer = &door->scarce;
        else if (line->waiting >= door->longest)
            answer = &door->full;
        else if (put(door, caller) != 0)
            answer = &door->scarce;
        if (answer != NULL)
            line->unlucky++;
        else
            line->waiting++;
    }
    pthread_mutex_unlock(&door->lock);
    return answer;
}

/* ---- the door ----------------------------------------------------------------------- */

static int copy(struct text *text, const char *bytes, size_t length)
{
    text->bytes = malloc(length);
    text->length = length;
    if (text->bytes == NULL)
        return -ENOMEM;
    memcpy(text->bytes, bytes, length);
    return 0;
}

struct door *door_new(int longest, int reserved, int last, const char *full, size_t full_length,
                      const char *scarce, size_t scarce_length)
{
    struct door *door = calloc(1, sizeof(*door));

    if (door == NULL)
        return NULL;
    door->longest = longest;
    door->reserved = reserved;
    door->last = last;
    door->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&door->lock, NULL);
    pthread_cond_init(&door->changed, NULL);
    if (door->bell < 0 || copy(&door->full, full, full_length) != 0 ||
        copy(&door->scarce, scarce, scarce_length) != 0) {
        int error = errno;

        door_free(door);
        errno = error;
        return NULL;
    }
    return door;
}

void door_free(struct door *door)
{
    struct door_caller caller;

    pthread_mutex_lock(&door->lock);
    door->ending = 1;
    pthread_cond_signal(&door->changed);
    pthread_mutex_unlock(&door->lock);
    if (door->started)
        pthread_join(door->thread, NULL);
    while (door_collect(door, &caller, 1) == 1)
        close(caller.fd);
    for (int i = 0; i < BUCKETS; i++) {
        while (door->lines[i] != NULL) {
            struct line *line = door->lines[i];

            door->lines[i] = line->next;
            free(line);
        }
    }
    if (door->bell >= 0)
        close(door->bell);
    pthread_cond_destroy(&door->changed);
    pthread_mutex_destroy(&door->lock);
    free(door->ready);
    free(door->full.bytes);
    free(door->scarce.bytes);
    free(door);
}

/* Returns 1 if the connection was turned away, else 0. */
static int admit(struct door *door, int fd, uint32_t uid)
{
    const struct text *answer = line_up(door, fd, uid);
    struct door_caller unread = {.fd = fd, .kind = DOOR_UNREAD, .uid = uid};

    if (answer == NULL)
        return 0;
    if (turn_away(fd, answer->bytes, answer->length) != 0) {
        pthread_mutex_lock(&door->lock);
        /* Without memory it stays open for ever: better than to hang in its close. */
        (void)put(door, unread);
        pthread_mutex_unlock(&door->lock);
    }
    return 1;
}

int door_line_up(struct door *door, int fd, uint32_t uid)
{
    int turned_away = admit(door, fd, uid);

    door_ring(door);
    return turned_away;
}

bool door_is_busy(struct door *door, int fd, uint32_t uid)
{
    struct line **at;
    bool busy;

    pthread_mutex_lock(&door->lock);
    at = find_line(door, uid);
    busy = fd >= door->reserved || (*at != NULL && (*at)->waiting > 0);
    pthread_mutex_unlock(&door->lock);
    return busy;
}

int door_sweep(struct door *door, int listener)
{
    int turned_away = 0;

    for (int i = 0; i < SWEEP; i++) {
        struct ucred peer;
        socklen_t size = sizeof(peer);
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (fd < 0) {
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            if (errno == EAGAIN)
                break;
            return -errno;
        }
        /* Cannot fail: every accepted Unix socket has a peer. */
        if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0)
            peer.uid = (uid_t)-1;
        turned_away += admit(door, fd, peer.uid);
    }
    return turned_away;
}

int door_collect(struct door *door, struct door_caller *callers, int most)
{
    uint64_t rung;
    int count = 0;

    pthread_mutex_lock(&door->lock);
    (void)!read(door->bell, &rung, sizeof(rung));
    for (; count < most && door->count > 0; count++, door->count--) {
        callers[count] = door->ready[door->first];
        door->first = (door->first + 1) % door->size;
    }
    pthread_mutex_unlock(&door->lock);
    return count;
}

void door_came_in(struct door *door, uint32_t uid)
{
    struct line **at;

    pthread_mutex_lock(&door->lock);
    at = find_line(door, uid);
    if (*at != NULL) {
        (*at)->waiting--;
        forget_if_unused(at);
    }
    pthread_mutex_unlock(&door->lock);
}

int door_unlucky(struct door *door, struct door_unlucky *users, int most)
{
    int count = 0;

    pthread_mutex_lock(&door->lock);
    for (int i = 0; i < BUCKETS && count < most; i++) {
        struct line **at = &door->lines[i];

        while (*at != NULL && count < most) {
            struct line *line = *at;

            if (line->unlucky != 0) {
                users[count].uid = line->uid;
                users[count++].count = line->unlucky;
                line->unlucky = 0;
                forget_if_unused(at);
            }
            if (*at == line)
                at = &line->next;
        }
    }
    pthread_mutex_unlock(&door->lock);
    return count;
}

int door_failure(struct door *door)
{
    int failure;

    pthread_mutex_lock(&door->lock);
    failure = door->failure;
    door->failure = 0;
    pthread_mutex_unlock(&door->lock);
    return failure;
}

int door_bell(struct door *door)
{
    return door->bell;
}

void door_ring(struct door *door)
{
    const uint64_t one = 1;

    (void)!write(door->bell, &one, sizeof(one));
}

/* ---- the watch ---------------------------------------------------------------------- */

static uint64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* Sweeps until it was quiet for long enough. */
static void watch(struct door *door)
{
    const struct timespec pause = {
        .tv_sec = door->pause_us / 1000000,
        .tv_nsec = (long)(door->pause_us % 1000000) * 1000,
    };
    uint64_t last = now_ms();

    while (!__atomic_load_n(&door->ending, __ATOMIC_RELAXED) && now_ms() - last < door->quiet_ms) {
        for (int i = 0; i < door->listener_count; i++) {
            int result = door_sweep(door, door->listeners[i]);

            if (result != 0)
                last = now_ms();
            if (result < 0) {
                pthread_mutex_lock(&door->lock);
                door->failure = -result;
                pthread_mutex_unlock(&door->lock);
            }
        }
        nanosleep(&pause, NULL);
    }
}

static void *run(void *argument)
{
    const uint64_t one = 1;
    struct door *door = argument;

    (void)door_be_prompt(PRIORITY, SLICE_US); /* else the watch has to do with an equal share */
    pthread_mutex_lock(&door->lock);
    while (!door->ending) {
        if (!door->watching) {
            pthread_cond_wait(&door->changed, &door->lock);
            continue;
        }
        pthread_mutex_unlock(&door->lock);
        watch(door);
        pthread_mutex_lock(&door->lock);
        door->watching = 0;
        (void)!write(door->bell, &one, sizeof(one));
    }
    pthread_mutex_unlock(&door->lock);
    return NULL;
}

static int start_thread(struct door *door)
{
    sigset_t all, before;
    int error;

    sigfillset(&all); /* signals are for the threads that expect them */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&door->thread, NULL, run, door);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    door->started = error == 0;
    return -error;
}

int door_watch(struct door *door, const int *listeners, int count, unsigned int pause_us,
               unsigned int quiet_ms)
{
    int result = 0;

    if (count < 0 || count > LISTENERS)
        return -EINVAL;
    pthread_mutex_lock(&door->lock);
    if (!door->watching) {
        memcpy(door->listeners, listeners, (size_t)count * sizeof(*listeners));
        door->listener_count = count;
        door->pause_us = pause_us;
        door->quiet_ms = quiet_ms;
        if (!door->started)
            result = start_thread(door);
        door->watching = result == 0;
        pthread_cond_signal(&door->changed);
    }
    pthread_mutex_unlock(&door->lock);
    return result;
}

int door_watched(struct door *door)
{
    int watching;

    pthread_mutex_lock(&door->lock);
    watching = door->watching;
    pthread_mutex_unlock(&door->lock);
    return watching;
}
