/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Programs that `teemate bench` measures, or compares with.
 *
 * teemate-floor does the least that something can cost, one word for each kind of floor;
 * teemate-subject attaches through the C library.  Once one is set up it prints "ready"; then every line
 * that it reads ("WHAT COUNT PAUSE", PAUSE in microseconds) makes it do WHAT so often, with a rest between
 * two, and print one line: the nanoseconds of each.  So whoever measures has floor and product take turns
 * in the same run, and whatever else the machine does hits both alike.
 */
#ifndef TEEMATE_BENCH_FLOOR_H
#define TEEMATE_BENCH_FLOOR_H

#include <stdint.h>

struct floor {
    /* Does it once and returns the nanoseconds that it took.  Ends the program when it fails. */
    double (*once)(void *state);
    const char *what;
    void *state;
};

double floor_now_ns(void);
/* Prints `what` and the errno `error` (positive), and ends the program. */
_Noreturn void floor_fail(const char *what, int error);
/* Answers lines until there are no more; returns the exit status. */
int floor_serve(const struct floor *floors, unsigned count);

/* What the words of the command line mean; each returns the exit status. */
int floor_attach(int argc, char **argv);
int floor_call(int argc, char **argv);
int floor_create(int argc, char **argv);
int floor_hash(int argc, char **argv);

#endif
