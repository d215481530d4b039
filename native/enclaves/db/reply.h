/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A reply under construction, in memory of the connection: a result's head tells of the rows that
 * follow it, and what lies outside is written once.
 */
#ifndef DB_REPLY_H
#define DB_REPLY_H

#include "connection.h"

struct reply {
    uint8_t *start;
    size_t length, room; /* `room`: what is allocated */
    size_t most;         /* what the caller has room for; DB_REPLY_MIN bytes of it are for an error */
};

/* Room for `length` bytes more, at the end; NULL: no memory. */
uint8_t *reply_add(struct reply *reply, size_t length);
void reply_close(struct reply *reply);
/* A struct db_error about what the connection's last call said; `code` as in db.h. */
void reply_error(struct reply *reply, struct connection *connection, int code, int offset, uint32_t set);

enum reply_row { REPLY_ADDED, REPLY_FULL, REPLY_NO_MEMORY };
/* The statement's present row; *needed is its size. */
enum reply_row reply_row(struct reply *reply, sqlite3_stmt *stmt, size_t *needed);
/* Names and types of its columns: false when there is no memory. */
bool reply_columns(struct reply *reply, sqlite3_stmt *stmt);

#endif
