/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The head of a database's file: its key, who may use it, and how large it may be.
 *
 * There are two places for it, of 2048 bytes each; head number n lies in place n modulo 2, so that a change which power cuts
 * short leaves the last one.  Of two that are right the higher number counts.  A new database gets number 1 first, and
 * number 0 when that is on the disk: power that is cut meanwhile leaves place 0 empty, which is no database unless number 1
 * is whole, or number 1.  Heads are sealed under the database's name.  In one life of the enclave its memory says what the
 * rights are.  Across lives what was written after a change of the rights, in the log and in the root, has the new head's
 * number, and is not believed with an older one: an older head comes back with an earlier state of the whole database only.
 */
#ifndef DB_HEAD_H
#define DB_HEAD_H

#include "records.h"

/*
 * What the file has: key and rights into the database.  0; -TM_ENOENT: its making was cut short, or never began;
 * RECORD_FORMAT: an earlier build has written it, but key and rights are known; RECORD_TAMPERED; another negative tm_errno.
 */
int head_read(struct record_file *file);

/*
 * An empty file with a new key, which is no database before head_finish().  A log is another database's of that name.
 * For who holds HOLDS_SETUP, while nobody has it open.
 */
int head_begin(struct record_file *file, const char *log);
/* All its pages are written: from here on it is the caller's database. */
int head_finish(struct record_file *file);

/* Other rights from now on: for who holds HOLDS_SETUP.  0, a negative tm_errno. */
int head_change(struct record_file *file, const struct rights *rights);

/* What the running slot's identity may do with it, as it is open now or about to be. */
enum db_access head_access(const struct database *database);
/*
 * The rights of the database of that name, whether somebody has opened it in this life or not: nothing of it is held, and
 * nothing is remembered.  0, RECORD_FORMAT; -TM_ENOENT: there is none; RECORD_TAMPERED; another negative tm_errno.
 */
int head_rights_of(const char *name, struct rights *rights);
/*
 * False when it is certain that the running slot's identity may not do that with it.  To be asked before anything of the
 * database is held: whoever holds something is waited for, however long its process stands still.
 */
bool head_admits(const char *name, enum db_access access);
enum db_access rights_access(const struct rights *rights);
/* May a transaction leave it with so many pages, when it has `now`?  What is too large already need not shrink. */
bool head_has_room(const struct database *database, uint64_t pages, uint64_t now);
/* A consistent copy of the rights. */
void head_rights(const struct database *database, struct rights *rights);

#endif
