/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Answers plain attaches by itself: broker/connections/attendant.py says when, and what has to hold.
 *
 * A *shelf* holds grants of one enclave that are ready: a slot with its key, and a number.  A *seat* is a
 * connection that waits for its client's next message.  Either the message is a plain attach to a shelf that
 * the seat may take from, and is answered, or it is left where it is: in both cases the seat comes
 * back with a note, and is Python's again.  So each connection has one reader at any time.
 *
 * Whose a ready grant is stands in its *cell*, in memory that outlives the broker, before the reply goes
 * out.  One lock guards everything.  No system call under it waits for anybody, but some come together: for
 * who connects /proc/PID/stat is read (peer.c), and of whom the door turns away what was sent is
 * thrown away, up to 256 messages (turn_away.c).
 *
 * A *guest* is who is expected to connect: processes that are the same to the policy.  For each there are a
 * few *places*: a client's number, and a cell.  While it listens (attendant_listen()) it accepts who
 * connects.  Whom a place is for and who says a plain hello is greeted, and is then as one that has a
 * seat; everybody else is the door's, with nothing read.
 *
 * All functions may be called from any thread, but for attendant_free().  The lines between the cffi marks
 * are read by build_door.py as well.
 */
#ifndef TEEMATE_DOOR_ATTENDANT_H
#define TEEMATE_DOOR_ATTENDANT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "door.h"

/* cffi: begin */

/* As it lies in the memory that is kept.  It tells of a grant that was given if neither `enclave` nor
 * `client` is 0: `enclave` is written last when it is made ready, `client` when it is given. */
struct attendant_cell {
    uint64_t client, request, grant, enclave, slot, generation;
    uint8_t key[16];
    uint64_t reserved[8];
};

/* The same of a client that was greeted: if `client` is not 0, which is written last. */
struct attendant_greeted {
    uint64_t client, guest, started;
    uint32_t pid, flags; /* ATTENDANT_... */
    uint8_t token[32], session[32]; /* SHA-256 of both */
    uint8_t name[64];
    uint64_t name_size;
    uint64_t reserved[3];
};

enum attendant_flags { ATTENDANT_COUNTS = 1, ATTENDANT_SESSION = 2, ATTENDANT_TOKEN = 4 };

struct attendant_note {
    uint64_t seat;
    int32_t cell; /* of the grant that was given; -1: there is something for Python to read */
    int32_t place; /* of the client that was greeted; -1: it is one that had a seat */
    uint64_t request;
    uint64_t asked_ns, answered_ns; /* CLOCK_MONOTONIC */
};

struct attendant_enclave {
    const char *name;
    size_t name_size;
    const uint8_t *info, *rest; /* struct plain_text of plain.h; copied */
    size_t info_size, rest_size;
    uint64_t info_pairs;
    uint8_t mac_key[32];
    uint64_t number; /* for the cells */
    int fd, arena;   /* stay the caller's, who closes the shelf before them */
};

/* Who has a connection. */
struct attendant_client {
    uint64_t number;
    uint64_t least_id; /* requests below may be known from before a restart */
    uint32_t uid, gid;
    uint8_t principal[32];
};

/* Processes that are the same to the policy, as the kernel tells of them; all of it is copied. */
struct attendant_host {
    uint64_t number; /* of its record */
    uint32_t uid, gid;
    const uint8_t *groups, *label; /* SO_PEERGROUPS; SO_PEERSEC, of size 0 if there is none */
    size_t groups_size, label_size;
    uint8_t principal[32];
    const uint8_t *before, *behind; /* what hello is answered, around the token; pairs of a map */
    size_t before_size, behind_size;
    uint64_t pairs; /* with the token */
    bool token;     /* whether there is one: something outlives the broker */
};

/* A client that was greeted. */
struct attendant_greeting {
    int fd, pidfd; /* the caller's */
    int32_t unsent; /* the errno for which it could not be told; 0: it was */
    struct attendant_greeted told;
    uint8_t hello[256], reply[512];
    size_t hello_size, reply_size;
};

/* Who is at the other end of a connection, as the kernel tells it. */
struct attendant_peer {
    int32_t pid;
    uint32_t uid, gid;
    int pidfd; /* the caller's; -1: it has ended, or cannot be known */
    uint64_t started;
    uint8_t groups[256], label[256];
    uint32_t groups_size, label_size;
};

struct attendant;
struct attendant_shelf;
struct attendant_guest;

/*
 * `cells` are `count`, and `places` `place_count`, the caller's, all unused or to be forgotten.  Without
 * `threaded` it works in attendant_step() alone.  Returns NULL with errno.
 */
struct attendant *attendant_new(struct attendant_cell *cells, size_t count, struct attendant_greeted *places,
                                size_t place_count, bool threaded);

/* Ends the thread, and forgets seats and shelves; no connection is touched. */
void attendant_free(struct attendant *attendant);

/* An eventfd, the attendant's: readable when there are notes.  Reset by attendant_collect(). */
int attendant_bell(struct attendant *attendant);

/* Looks after the seats whose client has sent something.  Returns how many those were. */
int attendant_step(struct attendant *attendant);

/* NULL without memory. */
struct attendant_shelf *attendant_open(struct attendant *attendant, const struct attendant_enclave *enclave);

/* Takes everything from the shelf and frees it; seats that may take from it lose that. */
void attendant_close(struct attendant *attendant, struct attendant_shelf *shelf);

/* Puts a grant on the shelf and writes its cell, which is unused.  Returns 0, or -ENOSPC. */
int attendant_stock(struct attendant *attendant, struct attendant_shelf *shelf, int cell, uint64_t grant,
                    uint64_t slot, uint64_t tcs, uint64_t generation, const uint8_t *key);

/* Takes everything from the shelf: what was not given by now will not be. */
void attendant_withdraw(struct attendant *attendant, struct attendant_shelf *shelf);

/* The cell's grant is known elsewhere, or was not given: it is unused again. */
void attendant_clear(struct attendant *attendant, int cell);

/* What replies say of the enclave's slots: total, free, used, withheld, quarantined, waiting, and clients. */
void attendant_count(struct attendant *attendant, struct attendant_shelf *shelf, const uint64_t counts[7]);

/*
 * Waits for the next message on `fd`, which does not block and stays the caller's.  Returns the seat's
 * number, or a negative errno: then nothing waits.
 */
int64_t attendant_seat(struct attendant *attendant, int fd, const struct attendant_client *client,
                       struct attendant_shelf *const *shelves, size_t count);

/* Ends the wait.  Returns 1, and the seat is no more; or 0 when there is a note of it. */
int attendant_recall(struct attendant *attendant, uint64_t seat);

/* Whether there are notes: also when the bell has not rung yet. */
bool attendant_has_notes(struct attendant *attendant);

/* Hands over up to `most` notes, the first first; their seats stay until attendant_leave(). */
int attendant_collect(struct attendant *attendant, struct attendant_note *notes, int most);

/* The request and the reply of a seat with a note of a grant; returns 0, or their sizes do not fit: -ENOSPC. */
int attendant_messages(struct attendant *attendant, uint64_t seat, uint8_t *request, size_t *request_size,
                       uint8_t *reply, size_t *reply_size);

/* Frees a seat whose note was collected. */
void attendant_leave(struct attendant *attendant, uint64_t seat);

/* Expects such a guest, who may take from the shelves.  NULL without memory. */
struct attendant_guest *attendant_expect(struct attendant *attendant, const struct attendant_host *host,
                                         struct attendant_shelf *const *shelves, size_t count);

/* Has a place for the guest, whose cell is unused.  Returns 0, or -ENOSPC. */
int attendant_place(struct attendant *attendant, struct attendant_guest *guest, int place, uint64_t client);

/* Frees the guest and its places: who was not greeted by now will not be here. */
void attendant_dismiss(struct attendant *attendant, struct attendant_guest *guest);

/* The note of a client that was greeted, which was collected: what is known of it.  Once for each. */
void attendant_take(struct attendant *attendant, uint64_t seat, struct attendant_greeting *greeting);

/* The client's record says what its place's cell does: it is unused again. */
void attendant_clear_place(struct attendant *attendant, int place);

/*
 * The process is not to be greeted here: what it may have depends on what it had.  Returns 0, or -ENOSPC; and
 * may be told of one twice.
 */
int attendant_bar(struct attendant *attendant, int32_t pid);

/* It has ended. */
void attendant_unbar(struct attendant *attendant, int32_t pid);

/*
 * Accepts who connects to the listeners from now on, which the door's owner looks after no more meanwhile.  It
 * ends by itself when nobody comes for a place, or nobody can be accepted: then the door's bell rings.
 * Returns 0 or a negative errno.
 */
int attendant_listen(struct attendant *attendant, struct door *door, const int *listeners, int count);

/* Ends that: who is not greeted yet is in the door's line afterwards. */
void attendant_deafen(struct attendant *attendant);

/* Whether it goes on. */
bool attendant_listens(struct attendant *attendant);

/* For tests whose processes are modelled: asked instead of the kernel; returns 0 when it knows. */
void attendant_model(struct attendant *attendant, int (*identify)(int fd, struct attendant_peer *peer));

/*
 * For tests that kill the broker: `alive` is asked before everything that can be seen outside or that
 * outlives us, and once it has said 0 nothing of that is done any more.
 */
void attendant_mortal(struct attendant *attendant, int (*alive)(void));

/* cffi: end */

#endif
