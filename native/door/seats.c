/* SPDX-License-Identifier: Apache-2.0 */
/* Who waits for the next message of its client, and how a plain attach is answered. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "attending.h"
#include "crypto.h"
#include "teemate_abi.h"

uint64_t number_of(const struct attendant *attendant, const struct seat *seat)
{
    return (uint64_t)seat->turn << 32 | (uint64_t)(seat - attendant->seats);
}

struct seat *find_seat(struct attendant *attendant, uint64_t number)
{
    size_t place = number & UINT32_MAX;

    if (place >= attendant->seat_count || attendant->seats[place].turn != number >> 32)
        return NULL;
    return &attendant->seats[place];
}

struct seat *new_seat(struct attendant *attendant)
{
    size_t count = attendant->seat_count != 0 ? attendant->seat_count * 2 : 16;
    struct seat *seats;

    if (attendant->unused != 0)
        return &attendant->seats[attendant->unused - 1];
    seats = realloc(attendant->seats, count * sizeof(*seats));
    if (seats == NULL)
        return NULL;
    memset(seats + attendant->seat_count, 0, (count - attendant->seat_count) * sizeof(*seats));
    attendant->seats = seats;
    for (size_t place = count; place-- > attendant->seat_count;) {
        seats[place].next = attendant->unused;
        attendant->unused = place + 1;
    }
    attendant->seat_count = count;
    return &attendant->seats[attendant->unused - 1];
}

void take_seat(struct attendant *attendant, struct seat *seat, enum seat_state state, int fd)
{
    attendant->unused = seat->next;
    seat->state = state;
    seat->fd = fd;
    seat->shelf_count = 0;
    seat->request_size = seat->reply_size = 0;
}

/* There is a slot's key in it. */
static void forget_reply(struct seat *seat)
{
    if (seat->reply != NULL)
        crypto_wipe(seat->reply, seat->reply_size);
    free(seat->reply);
    seat->reply = NULL;
}

void free_seat(struct attendant *attendant, struct seat *seat)
{
    forget_reply(seat);
    free_caller(attendant, seat);
    seat->state = SEAT_UNUSED;
    seat->turn = (seat->turn + 1) & INT32_MAX; /* numbers are positive */
    seat->next = attendant->unused;
    attendant->unused = (size_t)(seat - attendant->seats) + 1;
}

ssize_t peek(int fd, uint8_t *into, size_t size, bool *whole)
{
    struct iovec part = {into, size};
    /* No room for descriptors: MSG_CTRUNC tells of some, which stay where they are. */
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    ssize_t got = recvmsg(fd, &header, MSG_PEEK | MSG_DONTWAIT);

    *whole = (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0;
    return got;
}

/* With what the seat's caller is told before, if it was not yet. */
static bool send_reply(struct seat *seat, const struct attendant_shelf *shelf)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(2 * sizeof(int))];
    } control = {0};
    const int fds[2] = {shelf->fd, shelf->arena};
    struct caller *caller = seat->caller;
    struct iovec parts[2] = {{NULL, 0}, {seat->reply, seat->reply_size}};
    struct mmsghdr messages[2] = {{.msg_hdr = {.msg_iov = &parts[0], .msg_iovlen = 1}},
                                  {.msg_hdr = {.msg_iov = &parts[1], .msg_iovlen = 1, .msg_control = &control,
                                               .msg_controllen = sizeof(control)}}};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&messages[1].msg_hdr);
    int first = caller != NULL && !caller->welcomed ? 0 : 1, sent;

    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(fds));
    memcpy(CMSG_DATA(rights), fds, sizeof(fds));
    if (first == 0)
        parts[0] = (struct iovec){caller->greeting.reply, caller->greeting.reply_size};
    sent = sendmmsg(seat->fd, &messages[first], 2 - (unsigned)first, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (first == 0 && sent > 0) {
        caller->welcomed = true;
        caller->greeting.unsent = 0;
    }
    return sent == 2 - first;
}

/* Takes the request, which was looked at only, out of the socket. */
void take_request(int fd)
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

/* Gives the last of the shelf to the seat.  Returns its cell; -1: it is on the shelf still. */
static int give(struct attendant *attendant, struct seat *seat, struct attendant_shelf *shelf, uint64_t id)
{
    struct ready *ready = &shelf->ready[shelf->count - 1];
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
    forget_reply(seat);
    seat->reply = size != 0 ? copy_of(attendant->buffer, size) : NULL;
    seat->reply_size = size;
    crypto_wipe(attendant->buffer, size != 0 ? size : sizeof(attendant->buffer));
    if (seat->reply == NULL || !alive_locked(attendant)) {
        forget_reply(seat);
        return -1;
    }
    cell->request = id;
    commit(&cell->client, seat->client.number);
    if (!alive_locked(attendant) || !send_reply(seat, shelf)) {
        forget_reply(seat); /* the next one is given this slot, with this key */
        if (!attendant->dead)
            commit(&cell->client, 0); /* nobody has seen it */
        return -1;
    }
    if (alive_locked(attendant))
        take_request(seat->fd);
    take_last(shelf);
    return given;
}

int serve(struct attendant *attendant, struct seat *seat, uint64_t *request)
{
    struct plain_request plain;
    struct attendant_shelf *shelf = NULL;
    bool whole;
    ssize_t size = peek(seat->fd, seat->request, sizeof(seat->request), &whole);

    if (size > 0 && whole && plain_parse(seat->request, (size_t)size, &plain) &&
        plain.id >= seat->client.least_id && !is_barred(attendant, seat))
        shelf = shelf_for(seat, &plain);
    if (shelf == NULL)
        return -1;
    *request = plain.id;
    seat->request_size = (size_t)size;
    return give(attendant, seat, shelf, plain.id);
}

int64_t attendant_seat(struct attendant *attendant, int fd, const struct attendant_client *client,
                       struct attendant_shelf *const *shelves, size_t count)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT};
    struct seat *seat = NULL;
    int64_t result;

    pthread_mutex_lock(&attendant->lock);
    result = count <= SEAT_SHELVES ? attendant_start(attendant) : -EINVAL;
    if (result == 0) {
        seat = new_seat(attendant);
        result = seat != NULL ? 0 : -ENOMEM;
    }
    if (result == 0) {
        event.data.u64 = number_of(attendant, seat);
        if (epoll_ctl(attendant->epoll, EPOLL_CTL_ADD, fd, &event) != 0)
            result = -errno;
    }
    if (result == 0) {
        take_seat(attendant, seat, SEAT_WAITS, fd);
        seat->client = *client;
        memcpy(seat->shelves, shelves, count * sizeof(*shelves));
        seat->shelf_count = count;
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
    seat = find_seat(attendant, number);
    if (seat != NULL && seat->state == SEAT_WAITS) {
        epoll_ctl(attendant->epoll, EPOLL_CTL_DEL, seat->fd, NULL);
        free_seat(attendant, seat);
        recalled = 1;
    }
    pthread_mutex_unlock(&attendant->lock);
    return recalled;
}
