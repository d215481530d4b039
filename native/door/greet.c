/* SPDX-License-Identifier: Apache-2.0 */
/* Who connects: accepted, looked at, and greeted if a place is kept for it; else the door's. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "attending.h"
#include "crypto.h"

/* For hello; whoever takes longer waits for it in Python, where those of each user are counted. */
#define PATIENCE_NS 100000000u
/* Connections in a row for which there is no place, after which another thread need not look at them first. */
#define MISSES 8

/* ---- callers; all under the lock ------------------------------------------------------ */

void free_caller(struct attendant *attendant, struct seat *seat)
{
    struct caller *caller = seat->caller;

    if (caller == NULL)
        return;
    if (seat->state == SEAT_CALLS)
        attendant->callers--;
    if (caller->greeting.pidfd >= 0)
        close(caller->greeting.pidfd);
    if (caller->greeting.fd >= 0)
        close(caller->greeting.fd);
    crypto_wipe(&caller->greeting, sizeof(caller->greeting));
    free(caller);
    seat->caller = NULL;
}

/* Has the door let it in, with nothing of it read; its place is free again. */
static void send_to_door(struct attendant *attendant, struct seat *seat)
{
    struct caller *caller = seat->caller;
    struct attendant_guest *guest = caller->guest;
    struct door *door = attendant->door;
    int fd = seat->fd;

    if (guest != NULL && guest->count < PLACES_MAX)
        guest->places[guest->count++] = caller->place;
    if (caller->listed)
        epoll_ctl(attendant->epoll, EPOLL_CTL_DEL, fd, NULL);
    caller->greeting.fd = -1;
    attendant->misses++;
    if (door_line_up(door, fd, seat->client.uid) != 0)
        attendant->misses = MISSES;
    free_seat(attendant, seat);
}

/* The door's owner looks after the listeners again. */
static void stop_listening(struct attendant *attendant)
{
    struct door *door = attendant->door;

    for (size_t i = 0; i < attendant->seat_count && attendant->callers != 0; i++)
        if (attendant->seats[i].state == SEAT_CALLS)
            send_to_door(attendant, &attendant->seats[i]);
    for (int i = 0; i < attendant->listener_count; i++)
        epoll_ctl(attendant->epoll, EPOLL_CTL_DEL, attendant->listeners[i], NULL);
    attendant->listener_count = 0;
    attendant->door = NULL;
    door_ring(door);
}

uint64_t first_caller_due(const struct attendant *attendant)
{
    uint64_t due = 0;

    for (size_t i = 0; i < attendant->seat_count; i++) {
        const struct seat *seat = &attendant->seats[i];

        if (seat->state == SEAT_CALLS && (due == 0 || seat->caller->due < due))
            due = seat->caller->due;
    }
    return due;
}

void send_away(struct attendant *attendant, uint64_t now)
{
    for (size_t i = 0; i < attendant->seat_count && attendant->callers != 0; i++)
        if (attendant->seats[i].state == SEAT_CALLS && attendant->seats[i].caller->due <= now)
            send_to_door(attendant, &attendant->seats[i]);
    if (attendant->misses >= MISSES && attendant->door != NULL)
        stop_listening(attendant);
}

/* ---- greeting; all under the lock ----------------------------------------------------- */

/* Makes the answer, and writes down whom it is for.  Returns false if that cannot be. */
static bool write_down(struct attendant *attendant, struct seat *seat, const struct plain_hello *hello)
{
    struct caller *caller = seat->caller;
    struct attendant_greeting *greeting = &caller->greeting;
    struct attendant_greeted *told = &greeting->told;
    const struct attendant_host *host = &caller->guest->host;
    const struct plain_welcome welcome = {host->before, host->behind, host->before_size, host->behind_size,
                                          host->pairs};
    struct attendant_greeted *cell = &attendant->places[caller->place.cell];
    uint8_t token[PLAIN_TOKEN_SIZE];
    struct sha256 sha;

    if (host->token) {
        if (getrandom(token, sizeof(token), GRND_NONBLOCK) != sizeof(token))
            return false;
        sha256_init(&sha);
        sha256_update(&sha, token, sizeof(token));
        sha256_final(&sha, told->token);
        told->flags |= ATTENDANT_TOKEN;
    }
    if (hello->session != NULL) {
        sha256_init(&sha);
        sha256_update(&sha, hello->session, PLAIN_TOKEN_SIZE);
        sha256_final(&sha, told->session);
        told->flags |= ATTENDANT_SESSION;
    }
    if (hello->counts)
        told->flags |= ATTENDANT_COUNTS;
    if (hello->name_size != 0)
        memcpy(told->name, hello->name, hello->name_size);
    told->name_size = hello->name_size;
    greeting->reply_size = plain_greet(&welcome, hello->id, host->token ? token : NULL, greeting->reply,
                                       sizeof(greeting->reply));
    crypto_wipe(token, sizeof(token));
    if (greeting->reply_size == 0 || !alive_locked(attendant))
        return false;
    told->client = 0;
    *cell = *told;
    told->client = caller->place.client;
    commit(&cell->client, told->client);
    return true;
}

bool greet(struct attendant *attendant, struct seat *seat)
{
    struct caller *caller = seat->caller;
    struct attendant_greeting *greeting = &caller->greeting;
    struct plain_hello hello;
    bool whole;
    ssize_t size = peek(seat->fd, greeting->hello, sizeof(greeting->hello), &whole);
    uint64_t asked, request = 0;
    int cell;

    if (size < 0 && (errno == EAGAIN || errno == EINTR)) {
        hear_again(attendant, seat);
        return false;
    }
    if (size <= 0 || !whole || !plain_parse_hello(greeting->hello, (size_t)size, &hello) ||
        !write_down(attendant, seat, &hello)) {
        send_to_door(attendant, seat);
        return false;
    }
    greeting->hello_size = (size_t)size;
    seat->client.number = greeting->told.client;
    caller->guest = NULL;
    attendant->callers--;
    attendant->misses = 0;
    seat->state = SEAT_GREETED;
    take_request(seat->fd);
    asked = attendant_now();
    cell = serve(attendant, seat, &request); /* mostly it came along */
    if (!caller->welcomed && alive_locked(attendant) &&
        send(seat->fd, greeting->reply, greeting->reply_size, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        greeting->unsent = errno;
    caller->welcomed = true;
    note_locked(attendant, seat, cell, request, asked);
    if (cell < 0)
        seat->state = SEAT_GREETED; /* also when something else is there: it is found out at once */
    hear_again(attendant, seat);
    return greeting->unsent != 0;
}

static struct attendant_guest *guest_of(const struct attendant *attendant, const struct attendant_peer *peer)
{
    for (struct attendant_guest *guest = attendant->guests; guest != NULL; guest = guest->next)
        if (guest->count != 0 && guest->host.uid == peer->uid && guest->host.gid == peer->gid)
            return guest;
    return NULL;
}

static bool is(const struct attendant_host *host, const struct attendant_peer *peer)
{
    return host->groups_size == peer->groups_size && host->label_size == peer->label_size &&
           memcmp(host->groups, peer->groups, host->groups_size) == 0 &&
           memcmp(host->label, peer->label, host->label_size) == 0;
}

/* Takes one of the guest's places for the connection.  Returns its seat, NULL if it is for the door. */
static struct seat *welcome(struct attendant *attendant, int fd, struct attendant_peer *peer)
{
    bool known = attendant->identify != NULL ? attendant->identify(fd, peer) == 0 : peer_credentials(fd, peer);
    struct attendant_guest *guest = known ? guest_of(attendant, peer) : NULL;
    struct caller *caller;
    struct seat *seat;

    if (guest == NULL || find_barred(attendant, peer->pid) != NULL || door_is_busy(attendant->door, fd, peer->uid) ||
        (attendant->identify == NULL && !peer_details(fd, guest->host.token, peer)))
        return NULL;
    for (; guest != NULL; guest = guest->next)
        if (guest->count != 0 && guest->host.uid == peer->uid && guest->host.gid == peer->gid &&
            is(&guest->host, peer))
            break;
    if (guest == NULL || (seat = new_seat(attendant)) == NULL || (caller = calloc(1, sizeof(*caller))) == NULL)
        return NULL;
    take_seat(attendant, seat, SEAT_CALLS, fd);
    attendant->callers++;
    caller->guest = guest;
    caller->place = guest->places[--guest->count];
    caller->due = attendant_now() + PATIENCE_NS;
    caller->greeting.fd = fd;
    caller->greeting.pidfd = peer->pidfd;
    peer->pidfd = -1;
    caller->greeting.told = (struct attendant_greeted){
        .guest = guest->host.number, .started = peer->started, .pid = (uint32_t)peer->pid};
    seat->caller = caller;
    seat->client = (struct attendant_client){.uid = peer->uid, .gid = peer->gid};
    memcpy(seat->client.principal, guest->host.principal, sizeof(seat->client.principal));
    memcpy(seat->shelves, guest->shelves, sizeof(seat->shelves));
    seat->shelf_count = guest->shelf_count;
    return seat;
}

void receive(struct attendant *attendant, size_t listener)
{
    struct attendant_peer peer = {.pidfd = -1, .uid = UINT32_MAX};
    struct seat *seat;
    int fd;

    if (listener >= (size_t)attendant->listener_count) /* we have stopped meanwhile */
        return;
    fd = accept4(attendant->listeners[listener], NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
            stop_listening(attendant); /* Python meets the same, and tells of it */
        return;
    }
    seat = welcome(attendant, fd, &peer);
    if (seat != NULL) {
        (void)greet(attendant, seat);
        return;
    }
    if (peer.pidfd >= 0)
        close(peer.pidfd);
    attendant->misses++;
    if (door_line_up(attendant->door, fd, peer.uid) != 0)
        attendant->misses = MISSES;
}

/* ---- for Python ---------------------------------------------------------------------- */

void attendant_dismiss(struct attendant *attendant, struct attendant_guest *guest)
{
    struct attendant_guest **at = &attendant->guests;

    pthread_mutex_lock(&attendant->lock);
    while (*at != guest)
        at = &(*at)->next;
    *at = guest->next;
    guest->count = PLACES_MAX; /* no place comes back */
    for (size_t i = 0; i < attendant->seat_count; i++)
        if (attendant->seats[i].state == SEAT_CALLS && attendant->seats[i].caller->guest == guest)
            send_to_door(attendant, &attendant->seats[i]);
    pthread_mutex_unlock(&attendant->lock);
    free_guest(guest);
}

void attendant_take(struct attendant *attendant, uint64_t number, struct attendant_greeting *greeting)
{
    struct seat *seat;

    pthread_mutex_lock(&attendant->lock);
    seat = find_seat(attendant, number);
    *greeting = (struct attendant_greeting){.fd = -1, .pidfd = -1};
    if (seat != NULL && seat->caller != NULL && seat->state == SEAT_COLLECTED) {
        *greeting = seat->caller->greeting;
        seat->caller->greeting.fd = seat->caller->greeting.pidfd = -1;
    }
    pthread_mutex_unlock(&attendant->lock);
}

int attendant_listen(struct attendant *attendant, struct door *door, const int *listeners, int count)
{
    int result;

    if (count < 0 || count > LISTENERS_MAX)
        return -EINVAL;
    pthread_mutex_lock(&attendant->lock);
    result = attendant->door == NULL ? attendant_start(attendant) : -EBUSY;
    for (int i = 0; result == 0 && i < count; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.u64 = A_LISTENER | (uint64_t)i};

        attendant->listeners[i] = listeners[i];
        if (epoll_ctl(attendant->epoll, EPOLL_CTL_ADD, listeners[i], &event) != 0)
            result = -errno;
        attendant->listener_count = i + 1;
    }
    if (result != -EBUSY) {
        attendant->door = door;
        attendant->misses = 0;
        if (result != 0)
            stop_listening(attendant);
    }
    pthread_mutex_unlock(&attendant->lock);
    return result;
}

void attendant_deafen(struct attendant *attendant)
{
    pthread_mutex_lock(&attendant->lock);
    if (attendant->door != NULL)
        stop_listening(attendant);
    pthread_mutex_unlock(&attendant->lock);
}

bool attendant_listens(struct attendant *attendant)
{
    bool listens;

    pthread_mutex_lock(&attendant->lock);
    listens = attendant->door != NULL;
    pthread_mutex_unlock(&attendant->lock);
    return listens;
}
