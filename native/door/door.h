/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The part of the broker's door (broker/connections/door.py says why there is one) that is passed by every
 * connection, also by the hundred thousandth of a flood: accept it, learn whose it is, count it to
 * its user, and turn it away when too many of that user wait already.
 *
 * All functions may be called from any thread, but for door_free().  The lines between the cffi
 * marks are read by build_door.py as well.
 */
#ifndef TEEMATE_DOOR_H
#define TEEMATE_DOOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

enum door_kind {
    DOOR_WAITS = 0,  /* to be let in */
    DOOR_UNREAD = 1, /* turned away, but descriptors are unread in it: closing it can take for ever */
};

struct door_caller {
    int fd; /* close-on-exec, does not block */
    int kind;
    uint32_t uid; /* of the process that connected, when it did (SO_PEERCRED) */
};

struct door_unlucky {
    uint32_t uid;
    uint32_t count;
};

struct door;

/*
 * A door with room for `longest` connections of each user.  Descriptors from `reserved` on are for
 * one of each user, those from `last` on for none.  `full` and `scarce` are what those are told who
 * are turned away for the one or the other; they are copied.  Returns NULL without memory (errno).
 */
struct door *door_new(int longest, int reserved, int last, const char *full, size_t full_length,
                      const char *scarce, size_t scarce_length);

/* Ends the watch and frees the door; what was not collected is closed. */
void door_free(struct door *door);

/*
 * Accepts who waits at `listener`, which does not block, but 1024 at most.  Returns how many of them
 * were turned away.  Fails as accept4(2) if there was somebody and could not be accepted.
 */
int door_sweep(struct door *door, int listener);

/*
 * Sweeps from a thread, every `pause_us`, until nobody was turned away for `quiet_ms`.  Fails as
 * pthread_create(3).  While it watches, the descriptor of door_bell() gets readable when there is
 * somebody to collect, and when the watch ends.
 */
int door_watch(struct door *door, const int *listeners, int count, unsigned int pause_us,
               unsigned int quiet_ms);

/* Whether the watch goes on. */
int door_watched(struct door *door);

/* An eventfd, the door's; reset by door_collect(). */
int door_bell(struct door *door);

/* Rings it. */
void door_ring(struct door *door);

/* Hands over up to `most` of those that were accepted, the first first; their fds are the caller's. */
int door_collect(struct door *door, struct door_caller *callers, int most);

/* One of the user's connections that were collected waits no more. */
void door_came_in(struct door *door, uint32_t uid);

/* Tells of up to `most` users how many were turned away since this was asked; returns of how many. */
int door_unlucky(struct door *door, struct door_unlucky *users, int most);

/* With what errno the watch could not accept last, since this was asked; 0 if it could. */
int door_failure(struct door *door);

/* cffi: end */

/* Whether somebody of the user waits, or a connection with that descriptor is to be let in by Python. */
bool door_is_busy(struct door *door, int fd, uint32_t uid);

/* Lines up a connection that somebody else accepted, and rings; returns 1 if it was turned away, or 0. */
int door_line_up(struct door *door, int fd, uint32_t uid);

#endif
