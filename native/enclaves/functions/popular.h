/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which functions start often: the last POPULAR_STARTS times that one was invoked through a slot that had not run it,
 * of all owners.  A function is popular when it was started POPULAR_LEAST times at least, and by an eighth of the
 * starts, in the last POPULAR_AGE.  What cannot be made ready takes no place among them from what can.
 */
#ifndef FUNCTIONS_POPULAR_H
#define FUNCTIONS_POPULAR_H

#include "tmsdk.h"

#define POPULAR_STARTS 32u
#define POPULAR_LEAST 2u
#define POPULAR_PART 8u
#define POPULAR_AGE 60000000000ull /* ns of the host's clock */
#define POPULAR_MAX 4u

/* One more start of the function at `place` (registry.c); under the registry's lock. */
void popular_note(struct tm_txn *txn, uint64_t place);
/* The places of those that start most often first, and how many, of those that are wanted; without any lock. */
unsigned popular_now(bool (*is_wanted)(uint64_t place), uint64_t places[POPULAR_MAX]);

#endif
