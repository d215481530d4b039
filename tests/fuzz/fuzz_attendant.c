/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sends the attendant messages that are nearly a plain attach, and looks that each is either answered, with
 * two descriptors, and taken out of the socket, or left there as it came.
 *
 *   fuzz_attendant SEED ITERATIONS
 *
 * Prints what was answered, in hexadecimal: the broker's own parser has to take all of that too.
 *
 *   fuzz_attendant SEED ITERATIONS race
 *
 * Takes shelf and seat away while its thread is about to answer: what was taken away was not given, and what
 * was given has a note.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "attendant.h"
#include "fuzzing.h"

#define LONGEST 70000u
#define CELLS 4
#define PRINTED 3000

static const char *const seeds[] = {
    "\xa3\x62id\x01\x62op\x66" "attach\x64" "args\xa3\x67" "enclave\x65vault\x65slots\x01\x64wait\x0a",
    "\xa3\x62id\x19\x01\x00\x62op\x66" "attach\x64" "args\xa3\x67" "enclave\x65vault\x65slots\x01\x64wait"
    "\xfb\x40\x24\x00\x00\x00\x00\x00\x00",
    "\xa3\x62id\x1b\x00\x1f\xff\xff\xff\xff\xff\xff\x62op\x66" "attach\x64" "args\xa1\x67" "enclave\x65vault",
    "\xa3\x62id\x18\x2a\x62op\x66" "attach\x64" "args\xa2\x67" "enclave\x65vault\x65slots\x01",
};
static const size_t sizes[] = {48, 58, 43, 43};

static size_t make_message(uint8_t *message)
{
    size_t which = draw() % 4;

    memcpy(message, seeds[which], sizes[which]);
    return mutate(message, sizes[which]);
}

static void send_message(int fd, const uint8_t *message, size_t size, int attached)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {(void *)message, size};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};

    if (attached >= 0) {
        header.msg_control = &control;
        header.msg_controllen = sizeof(control);
        control.header = (struct cmsghdr){CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), &attached, sizeof(int));
    }
    REQUIRE(sendmsg(fd, &header, 0) == (ssize_t)size);
}

/* Returns how many bytes came, -1 for none; descriptors are counted and closed. */
static ssize_t receive(int fd, uint8_t *into, int *descriptors)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(8 * sizeof(int))];
    } control;
    struct iovec part = {into, LONGEST};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                            .msg_controllen = sizeof(control)};
    ssize_t size = recvmsg(fd, &header, MSG_DONTWAIT);

    *descriptors = 0;
    if (size < 0)
        return -1;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&header); c != NULL; c = CMSG_NXTHDR(&header, c)) {
        int count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int)), one;

        for (int i = 0; i < count; i++) {
            memcpy(&one, CMSG_DATA(c) + (size_t)i * sizeof(int), sizeof(int));
            close(one);
        }
        *descriptors += count;
    }
    return size;
}

struct race {
    struct attendant *attendant;
    struct attendant_shelf *shelf;
    struct attendant_cell *cells;
    int ours, theirs;
};

static void pause_a_while(void)
{
    for (volatile uint64_t left = draw() % 20000; left > 0; left--)
        ;
}

/* Returns whether the grant was given. */
static bool race_once(const struct race *race, uint64_t grant)
{
    static const uint8_t key[16] = {7};
    static uint8_t came[LONGEST];
    const struct attendant_client client = {.number = 9, .uid = 1};
    bool seat_first = draw() % 2;
    struct attendant_note note = {.cell = -1};
    int64_t seat = attendant_seat(race->attendant, race->ours, &client, &race->shelf, 1);
    int recalled = 0, descriptors;
    ssize_t got;

    REQUIRE(seat >= 0 && attendant_stock(race->attendant, race->shelf, 0, grant, 5, 4096, 1, key) == 0);
    send_message(race->theirs, (const uint8_t *)seeds[0], sizes[0], -1);
    pause_a_while();
    if (seat_first)
        recalled = attendant_recall(race->attendant, (uint64_t)seat);
    attendant_withdraw(race->attendant, race->shelf);
    if (!seat_first) {
        pause_a_while();
        recalled = attendant_recall(race->attendant, (uint64_t)seat);
    }
    REQUIRE(attendant_has_notes(race->attendant) == !recalled);
    REQUIRE(attendant_collect(race->attendant, &note, 1) == !recalled);
    got = receive(race->theirs, came, &descriptors);
    REQUIRE((got > 0) == (note.cell == 0) && (race->cells[0].client == 9) == (note.cell == 0));
    REQUIRE((receive(race->ours, came, &descriptors) > 0) == (note.cell != 0));
    if (!recalled)
        attendant_leave(race->attendant, (uint64_t)seat);
    attendant_clear(race->attendant, 0);
    return note.cell == 0;
}

static int race(const struct attendant_enclave *enclave, uint64_t count)
{
    static struct attendant_cell cells[CELLS];
    struct race race = {.attendant = attendant_new(cells, CELLS, NULL, 0, true), .cells = cells};
    unsigned long given = 0;
    int pair[2];

    REQUIRE(race.attendant != NULL && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    race.shelf = attendant_open(race.attendant, enclave);
    race.ours = pair[0];
    race.theirs = pair[1];
    for (uint64_t i = 0; i < count; i++)
        given += race_once(&race, i);
    attendant_free(race.attendant);
    fprintf(stderr, "%lu of %lu given\n", given, (unsigned long)count);
    return 0;
}

int main(int argc, char **argv)
{
    static uint8_t message[LONGEST], came[LONGEST], request[1024], reply[LONGEST];
    static struct attendant_cell cells[CELLS];
    static const uint8_t key[16] = {7};
    const uint8_t info[] = "\x64name\x65vault", rest[] = "\x65" "arena\x00";
    int file = memfd_create("fuzz", MFD_CLOEXEC), pair[2], descriptors, printed = 0;
    struct attendant *attendant = attendant_new(cells, CELLS, NULL, 0, false);
    struct attendant_enclave enclave = {
        .name = "vault", .name_size = 5, .info = info, .info_size = 11, .info_pairs = 1, .rest = rest,
        .rest_size = 7, .number = 3, .fd = file, .arena = file};
    struct attendant_shelf *shelf;
    unsigned long answered = 0, left = 0;

    REQUIRE(argc >= 3 && attendant != NULL && file >= 0);
    state = strtoull(argv[1], NULL, 0) * 2 + 1;
    if (argc == 4) {
        attendant_free(attendant);
        return race(&enclave, strtoull(argv[2], NULL, 0));
    }
    shelf = attendant_open(attendant, &enclave);
    REQUIRE(shelf != NULL && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    for (uint64_t i = 0; i < strtoull(argv[2], NULL, 0); i++) {
        struct attendant_client client = {.number = 9, .least_id = draw() % 2 ? 2 : 0, .uid = 1};
        bool attached = draw() % 16 == 0, stocked = draw() % 16 != 0;
        struct attendant_note note;
        size_t size = make_message(message), request_size = sizeof(request), reply_size = sizeof(reply);
        int64_t seat = attendant_seat(attendant, pair[0], &client, &shelf, 1);
        ssize_t got;

        REQUIRE(seat >= 0);
        if (stocked)
            REQUIRE(attendant_stock(attendant, shelf, 0, i, 5, 4096, 1, key) == 0);
        REQUIRE(attendant_step(attendant) == 0);
        send_message(pair[1], message, size, attached ? file : -1);
        REQUIRE(attendant_step(attendant) == 1);
        REQUIRE(attendant_recall(attendant, (uint64_t)seat) == 0);
        REQUIRE(attendant_collect(attendant, &note, 1) == 1 && note.seat == (uint64_t)seat);
        got = receive(pair[1], came, &descriptors);
        if (note.cell >= 0) {
            REQUIRE(stocked && !attached && note.cell == 0 && note.request >= client.least_id);
            REQUIRE(got > 0 && descriptors == 2);
            REQUIRE(cells[0].client == 9 && cells[0].request == note.request && cells[0].enclave == 3);
            REQUIRE(attendant_messages(attendant, note.seat, request, &request_size, reply, &reply_size) == 0);
            REQUIRE(request_size == size && memcmp(request, message, size) == 0);
            REQUIRE(reply_size == (size_t)got && memcmp(reply, came, reply_size) == 0);
            REQUIRE(receive(pair[0], came, &descriptors) < 0);
            answered++;
            for (size_t byte = 0; printed < PRINTED && byte < size; byte++)
                printf("%02x", message[byte]);
            if (printed++ < PRINTED)
                printf("\n");
        } else {
            REQUIRE(got < 0 && cells[0].client == 0);
            REQUIRE(receive(pair[0], came, &descriptors) == (ssize_t)size && descriptors == attached);
            REQUIRE(memcmp(came, message, size) == 0);
            left++;
        }
        attendant_leave(attendant, note.seat);
        attendant_withdraw(attendant, shelf);
        attendant_clear(attendant, 0);
    }
    attendant_free(attendant);
    fprintf(stderr, "%lu answered, %lu left\n", answered, left);
    return answered > 0 && left > 0 ? 0 : 1;
}
