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
 * out.  One lock guards everything; no system call under it waits.
 *
 * All functions may be called from any thread, but for attendant_free().  The lines between the cffi marks
 * are read by build_door.py as well.
 */
#ifndef TEEMATE_DOOR_ATTENDANT_H
#define TEEMATE_DOOR_ATTENDANT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

/* As it lies in the memory that is kept.  It tells of a grant that was given if neither `enclave` nor
 * `client` is 0: `enclave` is written last when it is made ready, `client` when it is given. */
struct attendant_cell {
    uint64_t client, request, grant, enclave, slot, generation;
    uint8_t key[16];
    uint64_t reserved[8];
};

struct attendant_note {
    uint64_t seat;
    int32_t cell; /* of the grant that was given; -1: there is something for Python to read */
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

struct attendant;
struct attendant_shelf;

/*
 * `cells` are `count`, the caller's, all unused or to be forgotten.  Without `threaded` it works in
 * attendant_step() alone.  Returns NULL with errno.
 */
struct attendant *attendant_new(struct attendant_cell *cells, size_t count, bool threaded);

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

/*
 * For tests that kill the broker: `alive` is asked before everything that can be seen outside or that
 * outlives us, and once it has said 0 nothing of that is done any more.
 */
void attendant_mortal(struct attendant *attendant, int (*alive)(void));

/* cffi: end */

#endif
