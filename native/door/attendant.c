/* SPDX-License-Identifier: Apache-2.0 */
#include "attendant.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "crypto.h"
#include "plain.h"
#include "prompt.h"
#include "teemate_abi.h"

#define SHELF_MAX 64   /* grants on one */
#define SEAT_SHELVES 8 /* that one may take from */
#define AT_ONCE 64
#define REPLY_MAX 65536u
#define STACK_SIZE (256u << 10)
#define NO_SEAT UINT64_MAX /* find() finds none of that number */
/*
 * After a grant the broker has a note to take, and its client a mapping to make and a first call: if the
 * broker were woken at once, it would often have the processor that the client wants.  Whoever says
 * something earlier is heard at once.
 */
#define NOTE_DELAY_NS 2000000u
/* As the door's watch: it has little to do, but must not be late. */
#define PRIORITY (-15)
#define SLICE_US 100

_Static_assert(sizeof(struct attendant_cell) == 128, "attendant_cell");

struct ready {
    int cell;
    uint64_t tcs;
};

struct attendant_shelf {
    struct attendant_shelf *next;
    char *name;
    size_t name_size;
    struct plain_text text;
    struct plain_counts counts;
    uint8_t mac_key[32];
    uint64_t number;
    int fd, arena;
    struct ready ready[SHELF_MAX]; /* the next one is the first */
    size_t count;
};

enum seat_state { SEAT_UNUSED, SEAT_WAITS, SEAT_NOTED, SEAT_COLLECTED };

struct seat {
    enum seat_state state;
    uint32_t turn; /* how often this place was taken: part of the seat's number */
    int fd;
    struct attendant_client client;
    struct attendant_shelf *shelves[SEAT_SHELVES];
    size_t shelf_count;
    struct attendant_note note;
    uint8_t request[PLAIN_REQUEST_MAX];
    size_t request_size, reply_size;
    uint8_t *reply;
    size_t next; /* in the queue of notes, or of unused places; + 1 */
};

struct attendant {
    int bell, epoll;
    bool threaded;

    pthread_mutex_t lock; /* of all below */
    struct attendant_cell *cells;
    size_t cell_count;
    struct attendant_shelf *shelves;
    struct seat *seats;
    size_t seat_count, unused;     /* unused: + 1 */
    size_t first_note, last_note;  /* + 1 */
    uint64_t due;                  /* when the bell rings for grants that were given; 0: for none */
    pthread_t thread;
    bool started, ending;
    int (*alive)(void);
    bool dead;
    uint8_t buffer[REPLY_MAX];
};

static uint64_t now_ns(void)
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

/* Whether what comes next is done: always, but in tests. */
static bool alive_locked(struct attendant *attendant)
{
    if (attendant->alive != NULL && !attendant->dead)
        attendant->dead = attendant->alive() == 0;
    return !attendant->dead;
}

/* ---- cells -------------------------------------------------------------------------- */

/* Whoever kills us sees every store before this, or not this one either: stores of one thread keep their
 * order, and the memory is written back by nobody. */
static void commit(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static bool cell_exists(const struct attendant *attendant, int cell)
{
    return cell >= 0 && (size_t)cell < attendant->cell_count;
}

/* ---- shelves ------------------------------------------------------------------------ */

static uint8_t *copy(const void *bytes, size_t size)
{
    uint8_t *out = malloc(size + 1);

    if (out != NULL)
        memcpy(out, bytes, size);
    return out;
}

static void shelf_free(struct attendant_shelf *shelf)
{
    free(shelf->name);
    free((void *)shelf->text.info);
    free((void *)shelf->text.rest);
    crypto_wipe(shelf->mac_key, sizeof(shelf->mac_key));
    free(shelf);
}

struct attendant_shelf *attendant_open(struct attendant *attendant, const struct attendant_enclave *enclave)
{
    struct attendant_shelf *shelf = calloc(1, sizeof(*shelf));

    if (shelf == NULL)
        return NULL;
    shelf->name = (char *)copy(enclave->name, enclave->name_size);
    shelf->name_size = enclave->name_size;
    shelf->text.info = copy(enclave->info, enclave->info_size);
    shelf->text.info_size = enclave->info_size;
    shelf->text.info_pairs = enclave->info_pairs;
    shelf->text.rest = copy(enclave->rest, enclave->rest_size);
    shelf->text.rest_size = enclave->rest_size;
    memcpy(shelf->mac_key, enclave->mac_key, sizeof(shelf->mac_key));
    shelf->number = enclave->number;
    shelf->fd = enclave->fd;
    shelf->arena = enclave->arena;
    if (shelf->name == NULL || shelf->text.info == NULL || shelf->text.rest == NULL) {
        shelf_free(shelf);
        return NULL;
    }
    pthread_mutex_lock(&attendant->lock);
    shelf->next = attendant->shelves;
    attendant->shelves = shelf;
    pthread_mutex_unlock(&attendant->lock);
    return shelf;
}

void attendant_close(struct attendant *attendant, struct attendant_shelf *shelf)
{
    struct attendant_shelf **at = &attendant->shelves;

    pthread_mutex_lock(&attendant->lock);
    for (size_t i = 0; i < attendant->seat_count; i++) {
        struct seat *seat = &attendant->seats[i];

        for (size_t at_seat = 0; at_seat < seat->shelf_count; at_seat++)
            if (seat->shelves[at_seat] == shelf)
                seat->shelves[at_seat] = seat->shelves[--seat->shelf_count];
    }
    while (*at != shelf)
        at = &(*at)->next;
    *at = shelf->next;
    pthread_mutex_unlock(&attendant->lock);
    shelf_free(shelf);
}

int attendant_stock(struct attendant *attendant, struct attendant_shelf *shelf, int cell, uint64_t grant,
                    uint64_t slot, uint64_t tcs, uint64_t generation, const uint8_t *key)
{
    int result = -ENOSPC;

    pthread_mutex_lock(&attendant->lock);
    if (shelf->count < SHELF_MAX && cell_exists(attendant, cell) && alive_locked(attendant)) {
        struct attendant_cell *made = &attendant->cells[cell];

        commit(&made->client, 0);
        made->request = 0;
        made->grant = grant;
        made->slot = slot;
        made->generation = generation;
        memcpy(made->key, key, sizeof(made->key));
        commit(&made->enclave, shelf->number);
        shelf->ready[shelf->count++] = (struct ready){.cell = cell, .tcs = tcs};
        result = 0;
    }
    pthread_mutex_unlock(&attendant->lock);
    return result;
}

void attendant_withdraw(struct attendant *attendant, struct attendant_shelf *shelf)
{
    pthread_mutex_lock(&attendant->lock);
    shelf->count = 0;
    pthread_mutex_unlock(&attendant->lock);
}

void attendant_clear(struct attendant *attendant, int cell)
{
    pthread_mutex_lock(&attendant->lock);
    if (cell_exists(attendant, cell) && alive_locked(attendant)) {
        struct attendant_cell *used = &attendant->cells[cell];

        commit(&used->enclave, 0); /* first: without it nothing in here counts */
        commit(&used->client, 0);
        crypto_wipe(used->key, sizeof(used->key));
    }
    pthread_mutex_unlock(&attendant->lock);
}

void attendant_count(struct attendant *attendant, struct attendant_shelf *shelf, const uint64_t counts[7])
{
    pthread_mutex_lock(&attendant->lock);
    shelf->counts = (struct plain_counts){counts[0], counts[1], counts[2], counts[3],
                                          counts[4], counts[5], counts[6]};
    pthread_mutex_unlock(&attendant->lock);
}

/* ---- seats; all under the lock ------------------------------------------------------- */

static uint64_t number_of(const struct attendant *attendant, const struct seat *seat)
{
    return (uint64_t)seat->turn << 32 | (uint64_t)(seat - attendant->seats);
}

static struct seat *find(struct attendant *attendant, uint64_t number)
{
    size_t place = number & UINT32_MAX;

    if (place >= attendant->seat_count || attendant->seats[place].turn != number >> 32)
        return NULL;
    return &attendant->seats[place];
}

static int more_seats(struct attendant *attendant)
{
    size_t count = attendant->seat_count != 0 ? attendant->seat_count * 2 : 16;
    struct seat *seats;

    if (attendant->unused != 0)
        return 0;
    seats = realloc(attendant->seats, count * sizeof(*seats));
    if (seats == NULL)
        return -ENOMEM;
    memset(seats + attendant->seat_count, 0, (count - attendant->seat_count) * sizeof(*seats));
    attendant->seats = seats;
    for (size_t place = count; place-- > attendant->seat_count;) {
        seats[place].next = attendant->unused;
        attendant->unused = place + 1;
    }
    attendant->seat_count = count;
    return 0;
}

/* There is a slot's key in it. */
static void forget_reply(struct seat *seat)
{
    if (seat->reply != NULL)
        crypto_wipe(seat->reply, seat->reply_size);
    free(seat->reply);
    seat->reply = NULL;
}

static void free_seat(struct attendant *attendant, struct seat *seat)
{
    forget_reply(seat);
    seat->state = SEAT_UNUSED;
    seat->turn = (seat->turn + 1) & INT32_MAX; /* numbers are positive */
    seat->next = attendant->unused;
    attendant->unused = (size_t)(seat - attendant->seats) + 1;
}

static void note(struct attendant *attendant, struct seat *seat, int cell, uint64_t request, uint64_t asked)
{
    struct epoll_event again = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = number_of(attendant, seat)};
    size_t place = (size_t)(seat - attendant->seats) + 1;

    if (cell >= 0)
        epoll_ctl(attendant->epoll, EPOLL_CTL_MOD, seat->fd, &again); /* see NOTE_DELAY_NS */
    seat->state = SEAT_NOTED;
    seat->note = (struct attendant_note){number_of(attendant, seat), cell, request, asked, now_ns()};
    seat->next = 0;
    if (attendant->last_note != 0)
        attendant->seats[attendant->last_note - 1].next = place;
    else
        attendant->first_note = place;
    attendant->last_note = place;
}

/* ---- answering; all under the lock ----------------------------------------------------- */

static ssize_t peek(int fd, uint8_t *into, size_t size, bool *whole)
{
    struct iovec part = {into, size};
    /* No room for descriptors: MSG_CTRUNC tells of some, which stay where they are. */
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    ssize_t got = recvmsg(fd, &header, MSG_PEEK | MSG_DONTWAIT);

    *whole = (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0;
    return got;
}

static bool send_reply(const struct attendant_shelf *shelf, int fd, uint8_t *reply, size_t size)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(2 * sizeof(int))];
    } control = {0};
    const int fds[2] = {shelf->fd, shelf->arena};
    struct iovec part = {reply, size};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                            .msg_controllen = sizeof(control)};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&header);

    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(fds));
    memcpy(CMSG_DATA(rights), fds, sizeof(fds));
    return sendmsg(fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)size;
}

/* Takes the request, which was looked at only, out of the socket. */
static void take_request(int fd)
{
    uint8_t used;

    /* That the client has closed its end meanwhile is told once, and before anything that lies here. */
    if (recv(fd, &used, sizeof(used), MSG_DONTWAIT) < 0 && errno == ECONNRESET)
        (void)!recv(fd, &used, sizeof(used), MSG_DONTWAIT);
}

/* struct tm_bind, as broker/enclaves/control.py makes it. */
static void bind_slot(const struct attendant_shelf *shelf, const struct attendant_client *client,
                      struct plain_slot *slot)
{
    struct tm_bind bind = {.generation = slot->generation};
    uint8_t covered[TM_LABEL_SIZE + 8 + 56] = TM_BIND_LABEL;

    memcpy(bind.identity.principal, client->principal, sizeof(bind.identity.principal));
    bind.identity.uid = client->uid;
    bind.identity.gid = client->gid;
    bind.identity.grant = slot->grant;
    memcpy(covered + TM_LABEL_SIZE, &slot->slot, 8);
    memcpy(covered + TM_LABEL_SIZE + 8, &bind, 56);
    hmac_sha256(shelf->mac_key, sizeof(shelf->mac_key), covered, sizeof(covered), bind.mac);
    memcpy(slot->bind, &bind, sizeof(bind));
}

static struct attendant_shelf *shelf_for(const struct seat *seat, const struct plain_request *request)
{
    for (size_t i = 0; i < seat->shelf_count; i++) {
        struct attendant_shelf *shelf = seat->shelves[i];

        if (shelf->name_size == request->name_size && memcmp(shelf->name, request->name, shelf->name_size) == 0)
            return shelf->count != 0 ? shelf : NULL;
    }
    return NULL;
}

/* The first of the shelf is given: what is left moves up. */
static void take_first(struct attendant_shelf *shelf)
{
    shelf->count--;
    memmove(&shelf->ready[0], &shelf->ready[1], shelf->count * sizeof(shelf->ready[0]));
    shelf->counts.free--;
    shelf->counts.used++;
    shelf->counts.clients++;
}

/* Gives the first of the shelf to the seat.  Returns its cell; -1: it is on the shelf still. */
static int give(struct attendant *attendant, struct seat *seat, struct attendant_shelf *shelf, uint64_t id)
{
    struct ready *ready = &shelf->ready[0];
    struct attendant_cell *cell = &attendant->cells[ready->cell];
    struct plain_counts counts = shelf->counts;
    struct plain_slot slot = {
        .grant = cell->grant, .slot = cell->slot, .tcs = ready->tcs, .generation = cell->generation};
    int given = ready->cell;
    size_t size;

    counts.free--;
    counts.used++;
    counts.clients++;
    memcpy(slot.key, cell->key, sizeof(slot.key));
    bind_slot(shelf, &seat->client, &slot);
    size = plain_reply(&shelf->text, &counts, id, &slot, attendant->buffer, sizeof(attendant->buffer));
    crypto_wipe(&slot, sizeof(slot));
    seat->reply = size != 0 ? copy(attendant->buffer, size) : NULL;
    seat->reply_size = size;
    crypto_wipe(attendant->buffer, size != 0 ? size : sizeof(attendant->buffer));
    if (seat->reply == NULL || !alive_locked(attendant))
        return -1;
    cell->request = id;
    commit(&cell->client, seat->client.number);
    if (!alive_locked(attendant) || !send_reply(shelf, seat->fd, seat->reply, size)) {
        if (!attendant->dead)
            commit(&cell->client, 0); /* nobody has seen it */
        return -1;
    }
    if (alive_locked(attendant))
        take_request(seat->fd);
    take_first(shelf);
    return given;
}

/* The seat's client has sent something, or is gone. */
static void attend(struct attendant *attendant, struct seat *seat)
{
    struct plain_request request;
    struct attendant_shelf *shelf = NULL;
    uint64_t asked = now_ns();
    bool whole;
    ssize_t size = peek(seat->fd, seat->request, sizeof(seat->request), &whole);
    int cell = -1;

    if (size > 0 && whole && plain_parse(seat->request, (size_t)size, &request) &&
        request.id >= seat->client.least_id)
        shelf = shelf_for(seat, &request);
    if (shelf != NULL) {
        seat->request_size = (size_t)size;
        cell = give(attendant, seat, shelf, request.id);
    }
    note(attendant, seat, cell, cell >= 0 ? request.id : 0, asked);
}

/* Whether Python has to be told at once. */
static bool attend_locked(struct attendant *attendant, uint64_t number)
{
    struct seat *seat = find(attendant, number);

    if (seat != NULL && seat->state == SEAT_WAITS) {
        attend(attendant, seat);
        if (seat->note.cell < 0)
            return true;
        if (attendant->due == 0)
            attendant->due = seat->note.answered_ns + NOTE_DELAY_NS;
        return false;
    }
    return seat != NULL && seat->state == SEAT_NOTED; /* its client goes on */
}

static void attend_all(struct attendant *attendant, const struct epoll_event *events, int count)
{
    bool urgent = false;

    pthread_mutex_lock(&attendant->lock);
    for (int i = 0; i < count; i++)
        urgent = attend_locked(attendant, events[i].data.u64) || urgent;
    if (attendant->due != 0 && attendant->due <= now_ns())
        urgent = true;
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
    pthread_mutex_unlock(&attendant->lock);
    if (due == 0)
        return epoll_wait(attendant->epoll, events, AT_ONCE, -1);
    now = now_ns();
    if (due > now)
        left.tv_nsec = (long)(due - now);
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

struct attendant *attendant_new(struct attendant_cell *cells, size_t count, bool threaded)
{
    struct epoll_event silent = {.data.u64 = NO_SEAT}; /* until end_thread() */
    struct attendant *attendant = calloc(1, sizeof(*attendant));
    int error;

    if (attendant == NULL)
        return NULL;
    attendant->cells = cells;
    attendant->cell_count = count;
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
        forget_reply(&attendant->seats[i]);
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

static int start_thread(struct attendant *attendant)
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

int64_t attendant_seat(struct attendant *attendant, int fd, const struct attendant_client *client,
                       struct attendant_shelf *const *shelves, size_t count)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT};
    struct seat *seat = NULL;
    int64_t result;

    pthread_mutex_lock(&attendant->lock);
    result = start_thread(attendant);
    if (result == 0)
        result = count <= SEAT_SHELVES ? more_seats(attendant) : -EINVAL;
    if (result == 0) {
        seat = &attendant->seats[attendant->unused - 1];
        event.data.u64 = number_of(attendant, seat);
        if (epoll_ctl(attendant->epoll, EPOLL_CTL_ADD, fd, &event) != 0)
            result = -errno;
    }
    if (result == 0) {
        attendant->unused = seat->next;
        seat->state = SEAT_WAITS;
        seat->fd = fd;
        seat->client = *client;
        memcpy(seat->shelves, shelves, count * sizeof(*shelves));
        seat->shelf_count = count;
        seat->request_size = seat->reply_size = 0;
        result = (int64_t)event.data.u64;
    }
    pthread_mutex_unlock(&attendant->lock);
    return result;
}

int attendant_recall(struct attendant *attendant, uint64_t number)
{
    struct seat *seat;
    int recalled = 0;

    pthread_mutex_lock(&attendant->lock);
    seat = find(attendant, number);
    if (seat != NULL && seat->state == SEAT_WAITS) {
        epoll_ctl(attendant->epoll, EPOLL_CTL_DEL, seat->fd, NULL);
        free_seat(attendant, seat);
        recalled = 1;
    }
    pthread_mutex_unlock(&attendant->lock);
    return recalled;
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
    seat = find(attendant, number);
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
    seat = find(attendant, number);
    if (seat != NULL && seat->state == SEAT_COLLECTED)
        free_seat(attendant, seat);
    pthread_mutex_unlock(&attendant->lock);
}

void attendant_mortal(struct attendant *attendant, int (*alive)(void))
{
    attendant->alive = alive;
}
