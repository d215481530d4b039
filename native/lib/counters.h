/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Counting calls in the page that the broker reads, where there is one.
 *
 * Nobody but this process and the broker has the page.  Without a viewer there is none, and a
 * call costs one load more; with one it costs two looks at the clock and a few stores, and no
 * system call.  What is in it is this process's own claim: nothing is decided by it.
 */
#ifndef TEEMATE_COUNTERS_H
#define TEEMATE_COUNTERS_H

#include <stdint.h>

#include "slot.h"

/* A step of a call: from here until counters_leave(), a thread is in it. */
struct counters_step {
    struct teemate_counters *line; /* NULL: nobody looks */
    uint64_t entered;
};

struct counters_step counters_enter(struct teemate_slot *slot);
/* `finished`: the call is over with this step, and not only paused. */
void counters_leave(struct counters_step step, bool finished);

#endif
