/* SPDX-License-Identifier: Apache-2.0 */
/* A slot's connection: the database that is open in it, its statements and cursors, its limits. */
#ifndef DB_CONNECTION_H
#define DB_CONNECTION_H

#include "db.h"
#include "local.h"
#include "sqlite3.h"

#define STATEMENTS_KEPT 32u

/* A prepared statement; kept for the next time the same text comes, unless a cursor has it. */
struct statement {
    sqlite3_stmt *stmt;
    uint64_t used; /* when, counted in uses */
    uint32_t length;
    uint32_t hash;
    uint32_t cursor; /* 0: idle */
};

/* A statement that has more rows.  Its next row is there already when `row` is set. */
struct cursor {
    struct statement *statement;
    uint32_t number; /* 0: free */
    bool row;
    bool changes; /* INSERT, UPDATE, DELETE or REPLACE, with RETURNING */
    bool once;    /* its statement is not kept */
};

struct file; /* file.h */

struct copy; /* copy.c */
struct database;

struct connection {
    sqlite3 *db;
    struct file *log; /* the -wal of its database, while it is open */
    struct database *database; /* that is open; NULL: one in memory */
    enum db_access granted;    /* what the caller may do with it */
    bool readonly;             /* the caller asked for no more than to read */
    uint64_t head;             /* of the database's heads, the one that was looked at */
    bool indirect;             /* the client has to take the files' descriptors first (db_direct) */
    struct copy *copy;         /* that is under way */
    uint64_t number; /* of all connections of the enclave */
    uint64_t uses;
    uint64_t statement_ns;
    uint32_t cursor_limit, cursors_open, last_cursor;
    struct cursor *cursors; /* cursor_limit of them */
    struct statement kept[STATEMENTS_KEPT];
    /* What ends the statement that runs. */
    const volatile uint32_t *interrupt; /* in the caller's memory, or NULL */
    uint64_t deadline;
    bool late;     /* it was the deadline */
    bool tampered;   /* a file of it is not what the enclave wrote */
    bool no_storage; /* the enclave has none */
    bool uncached;   /* what it reads is what the host has now */
    bool denied;     /* the caller may not have the database */
    bool older;      /* an earlier build has made it, and this one cannot read it */
    bool no_space;   /* the host had no room for what it would write */
    bool limited;    /* the database's owner has said how large it may be */
    bool setting;    /* what a pragma sets just now is ours to set */
    const char *said; /* what is wrong with it, where SQLite has only a code; or NULL */
};

static inline struct connection *connection_self(void)
{
    struct local *local = local_self();

    return local ? local->connection : NULL;
}

/* The statement for the text: an idle one, or a new one.  SQLite's code; *tail is what follows it. */
int connection_prepare(struct connection *self, const char *text, uint32_t length, struct statement **statement,
                       const char **tail);
/* It is idle again, and kept or not. */
void connection_release(struct connection *self, struct statement *statement, bool keep);
struct cursor *connection_cursor(struct connection *self, uint32_t number);
/* NULL when there are as many as there may be. */
struct cursor *connection_add_cursor(struct connection *self, struct statement *statement);
void connection_end_cursor(struct connection *self, struct cursor *cursor);
/* 1 to DB_NAME_MAX of what may be in a name; not one that SQLite's own files would have. */
bool connection_name_is_right(const char *name, uint32_t length);
/* SQLite's limits and hooks, for a database of this connection. */
int connection_set_up(struct connection *self, sqlite3 *db);
/* May the caller still have what was opened?  0, DB_E_DENIED, DB_E_COPYING, DB_E_FILES: nothing is done for it any more, or just now. */
int connection_allowed(struct connection *self);
/* From now on a statement runs for a caller. */
void connection_begin(struct connection *self, const volatile uint32_t *interrupt);

/* The slots' connections, for who interrupts one from another slot. */
struct running {
    _Atomic uint64_t number; /* 0: none */
    _Atomic uint64_t stop;   /* number of the connection whose statement is to end */
    uint8_t principal[32];
};
#define SLOTS_MOST 128u /* more stacks an image does not have (client/image/layout.py, MAX_SEGMENTS) */
extern struct running running[SLOTS_MOST];

#endif
