/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the parts of the attendant (attendant.h) share: shelves.c what lies ready, seats.c who waits and is
 * given something, greet.c who connects, attendant.c the thread and the notes.
 *
 * Everything here is under the lock, unless it says otherwise.
 */
#ifndef TEEMATE_DOOR_ATTENDING_H
#define TEEMATE_DOOR_ATTENDING_H

#include <pthread.h>
#include <sys/types.h>

#include "attendant.h"
#include "plain.h"

#define SHELF_MAX 64   /* grants on one */
#define SEAT_SHELVES 8 /* that one may take from */
#define PLACES_MAX 8   /* of one guest */
#define LISTENERS_MAX 16
#define BARRED_MAX 64
#define REPLY_MAX 65536u
#define NO_SEAT UINT64_MAX        /* find() finds none of that number */
#define A_LISTENER (1ull << 63)   /* with its index: numbers of seats are less */

_Static_assert(sizeof(struct attendant_cell) == 128, "attendant_cell");
_Static_assert(sizeof(struct attendant_greeted) == 192, "attendant_greeted");

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
    struct ready ready[SHELF_MAX]; /* the next one is the last: its slot may have something ready */
    size_t count;
};

struct place {
    int cell;
    uint64_t client;
};

struct attendant_guest {
    struct attendant_guest *next;
    struct attendant_host host; /* with copies of our own */
    struct attendant_shelf *shelves[SEAT_SHELVES];
    size_t shelf_count;
    struct place places[PLACES_MAX];
    size_t count;
};

enum seat_state {
    SEAT_UNUSED,
    SEAT_CALLS,   /* was accepted, and has said nothing yet */
    SEAT_WAITS,
    SEAT_GREETED, /* is noted, and may be given something still */
    SEAT_NOTED,
    SEAT_COLLECTED
};

/* Of a connection that was accepted here. */
struct caller {
    struct attendant_guest *guest; /* until it is greeted */
    struct place place;
    uint64_t due; /* when it has to have said hello */
    bool listed;  /* whether epoll knows it */
    bool welcomed; /* whether the answer to its hello is sent */
    struct attendant_greeting greeting;
};

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
    struct caller *caller;
    size_t next; /* in the queue of notes, or of unused places; + 1 */
};

struct attendant {
    int bell, epoll;
    bool threaded;

    pthread_mutex_t lock; /* of all below */
    struct attendant_cell *cells;
    size_t cell_count;
    struct attendant_greeted *places;
    size_t place_count;
    struct attendant_shelf *shelves;
    struct attendant_guest *guests;
    struct seat *seats;
    size_t seat_count, unused;     /* unused: + 1 */
    size_t first_note, last_note;  /* + 1 */
    uint64_t due;                  /* when the bell rings for what was done; 0: for nothing */
    struct door *door;             /* while we listen; else NULL */
    int listeners[LISTENERS_MAX];
    int listener_count;
    unsigned int misses;           /* connections in a row that were the door's */
    size_t callers;
    int32_t barred[BARRED_MAX]; /* pids; 0: of nobody */
    pthread_t thread;
    bool started, ending;
    int (*alive)(void);
    bool dead;
    int (*identify)(int fd, struct attendant_peer *peer);
    uint8_t buffer[REPLY_MAX];
};

/* ---- attendant.c */

uint64_t attendant_now(void); /* CLOCK_MONOTONIC, ns */
int attendant_start(struct attendant *attendant);
/* Whether what comes next is done: always, but in tests. */
bool alive_locked(struct attendant *attendant);
/* Whoever kills us sees every store before this, or not this one either. */
void commit(uint64_t *word, uint64_t value);
uint8_t *copy_of(const void *bytes, size_t size);
/* Notes what was done; `cell` is that of a grant, or -1. */
void note_locked(struct attendant *attendant, struct seat *seat, int cell, uint64_t request, uint64_t asked);
/* Fills in the grant of a seat that is noted already. */
void note_grant(struct seat *seat, int cell, uint64_t request, uint64_t asked);
/* Waits for one more message. */
void hear_again(struct attendant *attendant, struct seat *seat);

/* ---- seats.c */

struct seat *find_seat(struct attendant *attendant, uint64_t number);
struct seat *new_seat(struct attendant *attendant); /* still unused; NULL without memory */
void take_seat(struct attendant *attendant, struct seat *seat, enum seat_state state, int fd);
void free_seat(struct attendant *attendant, struct seat *seat);
uint64_t number_of(const struct attendant *attendant, const struct seat *seat);
/* Looks at the next message; `whole`: it is all of it, and no descriptors are with it. */
ssize_t peek(int fd, uint8_t *into, size_t size, bool *whole);
/* Takes out of the socket what was looked at only. */
void take_request(int fd);
/* Answers a plain attach, if that is what is there: returns its cell and `request`, else -1.  What the seat's
 * caller is to be told goes out before it. */
int serve(struct attendant *attendant, struct seat *seat, uint64_t *request);

/* ---- shelves.c */

void take_last(struct attendant_shelf *shelf); /* is given */
/* A shelf that is closed is nobody's any more. */
void drop_shelf(struct attendant_shelf **shelves, size_t *count, const struct attendant_shelf *shelf);

/* ---- guests.c */

void free_guest(struct attendant_guest *guest);
void free_guests(struct attendant *attendant);
/* Where the process is barred, or there is room for one (0); else NULL. */
int32_t *find_barred(struct attendant *attendant, int32_t pid);
/* Whether it is a caller that has to be Python's. */
bool is_barred(struct attendant *attendant, const struct seat *seat);

/* ---- greet.c */

void receive(struct attendant *attendant, size_t listener);
/* The caller has sent something; returns whether Python has to be told at once. */
bool greet(struct attendant *attendant, struct seat *seat);
/* Who is late, or whoever comes if it is always for the door, is the door's. */
void send_away(struct attendant *attendant, uint64_t now);
uint64_t first_caller_due(const struct attendant *attendant); /* 0: there is none */
void free_caller(struct attendant *attendant, struct seat *seat);

/* ---- peer.c; needs no lock, but runs under it */

bool peer_credentials(int fd, struct attendant_peer *peer);
/* The rest; false: what is known is not enough, and no pidfd is left open. */
bool peer_details(int fd, bool with_start, struct attendant_peer *peer);

#endif
