/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Connects to the attendant with messages that are nearly a plain hello, and looks that each connection is
 * either greeted, with what it said taken out of the socket, or at the door with everything as it came.
 *
 *   fuzz_greeting SEED ITERATIONS
 *
 * Prints what was greeted, in hexadecimal: the broker's own parser has to take all of that too.
 *
 *   fuzz_greeting SEED ITERATIONS race
 *
 * Takes the places away, or the listener, while the thread is about to greet: a connection has a note or is
 * at the door, and never both.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "attendant.h"
#include "fuzzing.h"

#define PRINTED 3000
#define LONGEST 4096

#define TOKEN "0123456789abcdef0123456789abcdef"
static const char attach[] = "\xa3\x62id\x01\x62op\x66" "attach\x64" "args\xa2\x67" "enclave\x65vault\x65slots\x01";
static const char *const seeds[] = {
    "\xa3\x62id\x00\x62op\x65hello\x64" "args\xa3\x67version\x01\x68" "counters\xf5\x67session\x58\x20" TOKEN,
    "\xa3\x62id\x00\x62op\x65hello\x64" "args\xa4\x67version\x01\x68" "counters\xf4\x66" "client\x64name\x67session\x58\x20"
    TOKEN,
    "\xa3\x62id\x18\x2a\x62op\x65hello\x64" "args\xa1\x67version\x01",
};
/* A zero byte is in some of them. */
static const size_t sizes[] = {81, 93, 30};

static size_t make_message(uint8_t *message)
{
    size_t which = draw() % 3;

    memcpy(message, seeds[which], sizes[which]);
    return mutate(message, sizes[which]);
}

static int identify(int fd, struct attendant_peer *peer)
{
    (void)fd;
    *peer = (struct attendant_peer){.pid = 77, .uid = 5, .gid = 6, .started = 123, .groups = "abcd", .groups_size = 4};
    peer->pidfd = memfd_create("pidfd", MFD_CLOEXEC);
    return peer->pidfd < 0 ? -1 : 0;
}

struct house {
    struct attendant *attendant;
    struct attendant_cell cells[2];
    struct attendant_greeted places[2];
    struct attendant_shelf *shelf;
    struct attendant_guest *guest;
    struct door *door;
    struct sockaddr_un address;
    socklen_t address_size;
    int listener, file;
};

static const struct attendant_host host = {
    .number = 8, .uid = 5, .gid = 6, .groups = (const uint8_t *)"abcd", .groups_size = 4, .label = (const uint8_t *)"",
    .before = (const uint8_t *)"\x61" "a\x01", .before_size = 3, .behind = (const uint8_t *)"\x61" "b\x02", .behind_size = 3,
    .pairs = 3, .token = true};

static void build(struct house *house, bool threaded)
{
    struct attendant_enclave enclave = {
        .name = "vault", .name_size = 5, .info = (const uint8_t *)"\x64name\x65vault", .info_size = 11, .info_pairs = 1,
        .rest = (const uint8_t *)"\x65" "arena\x00", .rest_size = 7, .number = 3};

    house->file = enclave.fd = enclave.arena = memfd_create("fuzz", MFD_CLOEXEC);
    house->attendant = attendant_new(house->cells, 2, house->places, 2, threaded);
    REQUIRE(house->attendant != NULL);
    attendant_model(house->attendant, identify);
    house->shelf = attendant_open(house->attendant, &enclave);
    house->door = door_new(512, 1000, 1010, "full", 4, "scarce", 6);
    REQUIRE(house->shelf != NULL && house->door != NULL);
    house->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    house->address = (struct sockaddr_un){.sun_family = AF_UNIX};
    house->address_size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 +
                                      (size_t)snprintf(house->address.sun_path + 1, 90, "fuzz greeting %d", getpid()));
    REQUIRE(bind(house->listener, (struct sockaddr *)&house->address, house->address_size) == 0 &&
            listen(house->listener, 8) == 0);
}

static void take_down(struct house *house)
{
    attendant_deafen(house->attendant);
    attendant_free(house->attendant);
    door_free(house->door);
    close(house->listener);
    close(house->file);
}

static int knock(struct house *house)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    REQUIRE(connect(fd, (struct sockaddr *)&house->address, house->address_size) == 0);
    return fd;
}

/* One place and one grant, for whoever comes next. */
static void lay_ready(struct house *house, uint64_t number)
{
    static const uint8_t key[16] = {7};

    house->guest = attendant_expect(house->attendant, &host, &house->shelf, 1);
    REQUIRE(house->guest != NULL && attendant_place(house->attendant, house->guest, 1, number) == 0);
    REQUIRE(attendant_stock(house->attendant, house->shelf, 0, number, 5, 4096, 1, key) == 0);
    if (!attendant_listens(house->attendant))
        REQUIRE(attendant_listen(house->attendant, house->door, &house->listener, 1) == 0);
}

static ssize_t receive(int fd, uint8_t *into)
{
    return recv(fd, into, LONGEST, MSG_DONTWAIT);
}

/* Whether the connection is known to the attendant, or at the door; never both.  `fd`: whose it is now. */
static bool was_greeted(struct house *house, struct attendant_note *note, struct attendant_greeting *greeting, int *fd)
{
    struct door_caller caller;
    bool noted = attendant_collect(house->attendant, note, 1) == 1;
    bool at_door = door_collect(house->door, &caller, 1) == 1;

    REQUIRE(noted != at_door);
    if (at_door) {
        door_came_in(house->door, caller.uid);
        REQUIRE(house->places[1].client == 0 && house->cells[0].client == 0);
        *fd = caller.fd;
        return false;
    }
    REQUIRE(note->place == 1);
    attendant_take(house->attendant, note->seat, greeting);
    *fd = greeting->fd;
    close(greeting->pidfd);
    attendant_leave(house->attendant, note->seat);
    return true;
}

static void clean_up(struct house *house, int ours, int theirs)
{
    close(ours);
    if (theirs >= 0)
        close(theirs);
    attendant_withdraw(house->attendant, house->shelf);
    attendant_clear(house->attendant, 0);
    attendant_clear_place(house->attendant, 1);
}

/* Whether the client can be told anything. */
enum hearing { HEARS, READS_NO_MORE, IS_GONE, HEARINGS };

/* Says it, with or without an attach behind it; returns whether it was greeted. */
static bool greet_once(struct house *house, uint64_t number, const uint8_t *message, size_t size, bool attached,
                       bool asks, enum hearing hearing)
{
    static uint8_t came[LONGEST];
    struct attendant_greeting greeting;
    struct attendant_note note;
    int theirs = knock(house), ours = -1;
    bool greeted;

    if (draw() % 2)
        REQUIRE(attendant_step(house->attendant) == 1);
    if (attached) {
        union {
            struct cmsghdr header;
            char room[CMSG_SPACE(sizeof(int))];
        } control = {0};
        struct iovec part = {(void *)message, size};
        struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                                .msg_controllen = sizeof(control)};

        control.header = (struct cmsghdr){CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), &house->file, sizeof(int));
        REQUIRE(sendmsg(theirs, &header, 0) == (ssize_t)size);
    } else {
        REQUIRE(send(theirs, message, size, 0) == (ssize_t)size);
    }
    if (asks)
        REQUIRE(send(theirs, attach, sizeof(attach) - 1, 0) == (ssize_t)sizeof(attach) - 1);
    if (hearing == READS_NO_MORE)
        REQUIRE(shutdown(theirs, SHUT_RD) == 0);
    if (hearing == IS_GONE) {
        close(theirs);
        theirs = -1;
    }
    while (attendant_step(house->attendant) != 0)
        ;
    greeted = was_greeted(house, &note, &greeting, &ours);
    if (greeted && hearing != HEARS) { /* it is told nothing, and what it asked for is left */
        REQUIRE(!attached && greeting.unsent == EPIPE && note.cell == -1 && house->cells[0].client == 0);
        REQUIRE(house->places[1].client == number);
        REQUIRE((receive(ours, came) == (ssize_t)sizeof(attach) - 1) == asks);
        REQUIRE(receive(ours, came) <= 0);
    } else if (greeted) {
        REQUIRE(!attached && !greeting.unsent && (note.cell == 0) == asks);
        REQUIRE(greeting.hello_size == size && memcmp(greeting.hello, message, size) == 0);
        REQUIRE(house->places[1].client == number && house->places[1].guest == 8 && house->places[1].pid == 77);
        REQUIRE(memcmp(&house->places[1], &greeting.told, sizeof(greeting.told)) == 0);
        REQUIRE(receive(theirs, came) == (ssize_t)greeting.reply_size &&
                memcmp(came, greeting.reply, greeting.reply_size) == 0);
        REQUIRE(house->cells[0].client == (asks ? number : 0));
        REQUIRE((receive(theirs, came) > 0) == asks);
        REQUIRE(receive(ours, came) < 0);
    } else {
        REQUIRE(receive(theirs, came) <= 0);
        REQUIRE(receive(ours, came) == (ssize_t)size && memcmp(came, message, size) == 0);
        REQUIRE((receive(ours, came) > 0) == asks);
    }
    clean_up(house, ours, theirs);
    return greeted;
}

static bool race_once(struct house *house, uint64_t number)
{
    struct attendant_greeting greeting;
    struct attendant_note note;
    bool deafen = draw() % 2, greeted;
    int theirs = knock(house), ours = -1, left;

    REQUIRE(send(theirs, seeds[0], sizes[0], 0) == (ssize_t)sizes[0]);
    REQUIRE(send(theirs, attach, sizeof(attach) - 1, 0) > 0);
    for (volatile uint64_t wait = draw() % 40000; wait > 0; wait--)
        ;
    if (deafen) {
        attendant_deafen(house->attendant);
        (void)door_sweep(house->door, house->listener);
    }
    attendant_dismiss(house->attendant, house->guest);
    house->guest = NULL;
    attendant_withdraw(house->attendant, house->shelf);
    while (!deafen && !attendant_has_notes(house->attendant)) { /* it may have been in nobody's hands yet */
        struct door_caller caller;

        if (door_collect(house->door, &caller, 1) == 1) {
            door_came_in(house->door, caller.uid);
            clean_up(house, caller.fd, theirs);
            return false;
        }
    }
    greeted = was_greeted(house, &note, &greeting, &ours);
    left = 0;
    REQUIRE(!greeted || house->places[1].client == number);
    for (uint8_t came[LONGEST]; receive(ours, came) > 0;)
        left++;
    REQUIRE(left == (greeted ? note.cell != 0 : 2));
    clean_up(house, ours, theirs);
    return greeted;
}

int main(int argc, char **argv)
{
    static struct house house;
    static uint8_t message[LONGEST];
    unsigned long greeted = 0, left = 0;
    int printed = 0;
    bool race = argc == 4;

    REQUIRE(argc >= 3);
    state = strtoull(argv[1], NULL, 0) * 2 + 1;
    build(&house, race);
    for (uint64_t i = 1; i <= strtoull(argv[2], NULL, 0); i++) {
        size_t size = make_message(message);
        bool was;

        lay_ready(&house, i);
        was = race ? race_once(&house, i) : greet_once(&house, i, message, size, draw() % 16 == 0, draw() % 2,
                                                                draw() % 8 ? HEARS : draw() % HEARINGS);
        if (!race)
            attendant_dismiss(house.attendant, house.guest);
        greeted += was;
        left += !was;
        for (size_t byte = 0; was && !race && printed < PRINTED && byte < size; byte++)
            printf("%02x", message[byte]);
        if (was && !race && printed++ < PRINTED)
            printf("\n");
    }
    take_down(&house);
    fprintf(stderr, "%lu greeted, %lu left\n", greeted, left);
    return race || (greeted > 0 && left > 0) ? 0 : 1;
}
