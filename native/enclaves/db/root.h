/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the enclave's next life may believe of a database's main file: the tags of all its pages, as the last checkpoint
 * left them.
 *
 *   -root   two heads, each in 4096 bytes of its own, sealed with the database's key: number, id, what log it was made
 *           from, how many pages, the number of the file's head (head.h); then the tags, in chunks of 4096, of each head in turn.  Root n has head and chunks
 *           n modulo 2; the other place has the last one until n is whole.  Chunks are sealed under the root's id.
 *
 * A checkpoint writes pages, syncs them, then writes and syncs a root; only then may the log be begun anew, and
 * its head is bound to that root.  So wherever power is cut, one of two holds:
 *
 *   - the log was begun under the root that is there.  The main file is what the root says, and the log has what
 *     was committed since, from its beginning.
 *   - the root was made from the log that is there, or from an earlier part of it.  Pages that are not as
 *     the root says are in the log, which has at least as many frames as the root was made from.  The last of these
 *     is known by its tag: a log that went another way from a state that was brought back has another there, and
 *     SQLite's checksum, which goes on from frame to frame, holds it to those before it.
 *
 * Anything else was put together by the host of states that never were together.  What it can still bring
 * back is one earlier state of the whole database, or one without the last transactions of the log.
 */
#ifndef DB_ROOT_H
#define DB_ROOT_H

#include "records.h"

/* The name's file beside the main one. */
#define ROOT_SUFFIX "-root"

/*
 * Write a root for the pages as they are known now, which are synced.  0, RECORD_TAMPERED, RECORD_MEMORY, a negative
 * tm_errno.  Of a database that is just made: for who holds HOLDS_SETUP.
 */
int root_write(struct record_file *file);
/* The same for who holds the checkpoint's lock: pages were copied from the log of its connection. */
int root_after_checkpoint(struct record_file *file);

/*
 * Take over what the file's root says, in the database's first use in this life: RECORD_TAMPERED when there is none.
 * `log`: NULL when there is none.
 */
int root_read(struct record_file *file, struct record_file *log);

/* Of a database that is deleted: 0, -TM_ENOENT, another negative tm_errno. */
int root_delete(const char *name);

/*
 * False while the log that SQLite found is shorter than what the root was made from: no page of the main file may be used
 * with it.
 */
bool root_has_log(struct database *database);

#endif
