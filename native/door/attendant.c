/* SPDX-License-Identifier: Apache-2.0 */
#include "attendant.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "attending.h"
#include "crypto.h"
#include "prompt.h"

#define AT_ONCE 64
#define STACK_SIZE (256u << 10)
/*
 * After a grant the broker has a note to take, and its client a mapping to make and a first call: if the
 * broker were woken at once, it would often have the processor that the client wants.  Whoever says
 * something earlier is heard at once.
 */
#define NOTE_DELAY_NS 2000000u
/* As the door's watch: it has little to do, but must not be late. */
#define PRIORITY (-15)
#define SLICE_US 100

uint64_t attendant_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static void ring(struct attendant *attendant)
{
    const uint64_t one = 1;

    (void)!write(attendant->bell, &one, sizeof(one));
}

bool alive_locked(struct attendant *attendant)
{
    if (attendant->alive != NULL && !attendant->dead)
        attendant->dead = attendant->alive() == 0;
    return !attendant->dead;
}

/* Stores of one thread keep their order, and the memory is written back by nobody. */
void commit(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

uint8_t *copy_of(const void *bytes, size_t size)
{
    uint8_t *out = malloc(size + 1);

    if (out != NULL && size != 0)
        memcpy(out, bytes, size);
    return out;
}

/* ---- notes; all under the lock --------------------------------------------------------- */

void hear_again(struct attendant *attendant, struct seat *seat)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = number_of(attendant, seat)};
    bool listed = seat->caller == NULL || seat->caller->listed;

    epoll_ctl(attendant->epoll, listed ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, seat->fd, &event);
    if (seat->caller != NULL)
        seat->caller->listed = true;
}

void note_locked(struct attendant *attendant, struct seat *seat, int cell, uint64_t request, uint64_t asked)
{
    size_t place = (size_t)(seat - attendant->seats) + 1;

    seat->state = SEAT_NOTED;
    seat->note = (struct attendant_note){number_of(attendant, seat), -1, -1, 0, asked, attendant_now()};
    if (seat->caller != NULL)
        seat->note.place = seat->caller->place.cell;
    if (cell >= 0)
        note_grant(seat, cell, request, asked);
    seat->next = 0;
    if (attendant->last_note != 0)
        attendant->seats[attendant->last_note - 1].next = place;
    else
        attendant->first_note = place;
    attendant->last_note = place;
    if (attendant->due == 0 && (cell >= 0 || seat->caller != NULL))
        attendant->due = seat->note.answered_ns + NOTE_DELAY_NS;
}

void note_grant(struct seat *seat, int cell, uint64_t request, uint64_t asked)
{
    seat->note.cell = cell;
    seat->note.request = request;
    seat->note.asked_ns = asked;
    seat->note.answered_ns = attendant_now();
}

/* ---- the thread ------------------------------------------------------------------------ */

/* The seat's client has sent something, or is gone; returns whether Python has to be told at once. */
static bool attend(struct attendant *attendant, struct seat *seat)
{
    uint64_t asked = attendant_now(), request = 0;
    int cell = serve(attendant, seat, &request);

    if (seat->state == SEAT_WAITS)
        note_locked(attendant, seat, cell, request, asked);
    else if (cell >= 0)
        note_grant(seat, cell, request, asked);
    seat->state = SEAT_NOTED;
    if (cell >= 0)
        hear_again(attendant, seat); /* see NOTE_DELAY_NS */
    return cell < 0;
}

/* Whether Python has to be told at once. */
static bool attend_locked(struct attendant *attendant, uint64_t number)
{
    struct seat *seat = find_seat(attendant, number);

    if (number != NO_SEAT && (number & A_LISTENER) != 0)
        receive(attendant, (size_t)(number & ~A_LISTENER));
    if (seat == NULL)
        return false;
    switch (seat->state) {
    case SEAT_CALLS:
        return greet(attendant, seat);
    case SEAT_WAITS:
    case SEAT_GREETED:
        return attend(attendant, seat);
    case SEAT_NOTED:
        return true; /* its client goes on */
    default:
        return false;
    }
}

static void attend_all(struct attendant *attendant, const struct epoll_event *events, int count)
{
    bool urgent = false;
    uint64_t now;

    pthread_mutex_lock(&attendant->lock);
    for (int i = 0; i < count; i++)
        urgent = attend_locked(attendant, events[i].data.u64) || urgent;
    if (attendant->due != 0 || attendant->door != NULL) {
        now = attendant_now();
        urgent = urgent || (attendant->due != 0 && attendant->due <= now);
        send_away(attendant, now);
    }
    if (urgent)
        attendant->due = 0;
    pthread_mutex_unlock(&attendant->lock);
    if (urgent)
        ring(attendant);
}

int attendant_step(struct attendant *attendant)
{
    struct epoll_event events[AT_ONCE];
    int count = epoll_wait(attendant->epoll, events, AT_ONCE, 0);

    attend_all(attendant, events, count);
    if (count > 0)
        ring(attendant);
    return count > 0 ? count : 0;
}

/* Waits for clients, but not longer than until the bell has to ring. */
static int wait_for_clients(struct attendant *attendant, struct epoll_event *events)
{
    struct timespec left = {0};
    uint64_t due, now;
    int count;

    pthread_mutex_lock(&attendant->lock);
    due = attendant->due;
    if (attendant->callers != 0 && (due == 0 || first_caller_due(attendant) < due))
        due = first_caller_due(attendant);
    pthread_mutex_unlock(&attendant->lock);
    if (due == 0)
        return epoll_wait(attendant->epoll, events, AT_ONCE, -1);
    now = attendant_now();
    if (due > now)
        left = (struct timespec){(time_t)((due - now) / 1000000000u), (long)((due - now) % 1000000000u)};
    count = epoll_pwait2(attendant->epoll, events, AT_ONCE, &left, NULL);
    if (count < 0 && errno != EINTR) /* before Linux 5.11, or a filter has it not */
        count = epoll_wait(attendant->epoll, events, AT_ONCE, 1);
    return count;
}

static void *run(void *argument)
{
    struct epoll_event events[AT_ONCE];
    struct attendant *attendant = argument;

    (void)door_be_prompt(PRIORITY, SLICE_US);
    while (!__atomic_load_n(&attendant->ending, __ATOMIC_ACQUIRE))
        attend_all(attendant, events, wait_for_clients(attendant, events));
    return NULL;
}

/* ---- the attendant -------------------------------------------------------------------- */

struct attendant *attendant_new(struct attendant_cell *cells, size_t count, struct attendant_greeted *places,
                                size_t place_count, bool threaded)
{
    struct epoll_event silent = {.data.u64 = NO_SEAT}; /* until end_thread() */
    struct attendant *attendant = calloc(1, sizeof(*attendant));
    int error;

    if (attendant == NULL)
        return NULL;
    attendant->cells = cells;
    attendant->cell_count = count;
    attendant->places = places;
    attendant->place_count = place_count;
    attendant->threaded = threaded;
    attendant->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    attendant->epoll = epoll_create1(EPOLL_CLOEXEC);
    pthread_mutex_init(&attendant->lock, NULL);
    if (attendant->bell < 0 || attendant->epoll < 0 ||
        epoll_ctl(attendant->epoll, EPOLL_CTL_ADD, attendant->bell, &silent) != 0) {
        error = errno;
        attendant_free(attendant);
        errno = error;
        return NULL;
    }
    return attendant;
}

/* Wakes the thread by the bell, which nobody hears any more: for this nothing has to be had first. */
static void end_thread(struct attendant *attendant)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = NO_SEAT};

    __atomic_store_n(&attendant->ending, true, __ATOMIC_RELEASE);
    ring(attendant);
    epoll_ctl(attendant->epoll, EPOLL_CTL_MOD, attendant->bell, &event);
    pthread_join(attendant->thread, NULL);
}

void attendant_free(struct attendant *attendant)
{
    if (attendant->started)
        end_thread(attendant);
    while (attendant->shelves != NULL)
        attendant_close(attendant, attendant->shelves);
    for (size_t i = 0; i < attendant->seat_count; i++)
        if (attendant->seats[i].state != SEAT_UNUSED)
            free_seat(attendant, &attendant->seats[i]);
    free_guests(attendant);
    if (attendant->bell >= 0)
        close(attendant->bell);
    if (attendant->epoll >= 0)
        close(attendant->epoll);
    pthread_mutex_destroy(&attendant->lock);
    free(attendant->seats);
    crypto_wipe(attendant->buffer, sizeof(attendant->buffer));
    free(attendant);
}

int attendant_bell(struct attendant *attendant)
{
    return attendant->bell;
}

int attendant_start(struct attendant *attendant)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    int error;

    if (!attendant->threaded || attendant->started)
        return 0;
    sigfillset(&all); /* signals are for the threads that expect them */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_SIZE);
    error = pthread_create(&attendant->thread, &attributes, run, attendant);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    attendant->started = error == 0;
    return -error;
}

bool attendant_has_notes(struct attendant *attendant)
{
    bool some;

    pthread_mutex_lock(&attendant->lock); /* what is being given is waited for */
    some = attendant->first_note != 0;
    pthread_mutex_unlock(&attendant->lock);
    return some;
}

int attendant_collect(struct attendant *attendant, struct attendant_note *notes, int most)
{
    uint64_t rung;
    int count = 0;

    pthread_mutex_lock(&attendant->lock);
    (void)!read(attendant->bell, &rung, sizeof(rung));
    for (; count < most && attendant->first_note != 0; count++) {
        struct seat *seat = &attendant->seats[attendant->first_note - 1];

        notes[count] = seat->note;
        epoll_ctl(attendant->epoll, EPOLL_CTL_DEL, seat->fd, NULL);
        seat->state = SEAT_COLLECTED;
        attendant->first_note = seat->next;
        if (attendant->first_note == 0)
            attendant->last_note = 0;
    }
    pthread_mutex_unlock(&attendant->lock);
    return count;
}

int attendant_messages(struct attendant *attendant, uint64_t number, uint8_t *request, size_t *request_size,
                       uint8_t *reply, size_t *reply_size)
{
    struct seat *seat;
    int result = -ENOSPC;

    pthread_mutex_lock(&attendant->lock);
    seat = find_seat(attendant, number);
    if (seat != NULL && seat->reply != NULL && seat->request_size <= *request_size &&
        seat->reply_size <= *reply_size) {
        memcpy(request, seat->request, seat->request_size);
        memcpy(reply, seat->reply, seat->reply_size);
        *request_size = seat->request_size;
        *reply_size = seat->reply_size;
        result = 0;
    }
    pthread_mutex_unlock(&attendant->lock);
    return result;
}

void attendant_leave(struct attendant *attendant, uint64_t number)
{
    struct seat *seat;

    pthread_mutex_lock(&attendant->lock);
    seat = find_seat(attendant, number);
    if (seat != NULL && seat->state == SEAT_COLLECTED)
        free_seat(attendant, seat);
    pthread_mutex_unlock(&attendant->lock);
}

void attendant_model(struct attendant *attendant, int (*identify)(int fd, struct attendant_peer *peer))
{
    attendant->identify = identify;
}

void attendant_mortal(struct attendant *attendant, int (*alive)(void))
{
    attendant->alive = alive;
}
