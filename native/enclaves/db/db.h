/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The database's ECALLs, as its callers see them: SQLite in the enclave, one connection
 * per slot.  The mirror for Python is teemate.db.
 *
 * All integers are little endian, nothing is padded.  A status that is not 0 is the SDK's
 * (enum tm_status): the call was not understood, or not done at all.  What SQLite has to say
 * comes back as a result.
 *
 *   db_open       struct db_open, name                   -> struct db_opened
 *   db_run        struct db_run, operations              -> results
 *   db_direct     nothing; db_opened said `files`        -> nothing: the client has their descriptors
 *   db_close      nothing                                -> nothing; what is open is rolled back
 *   db_delete     name of a database that nobody has open; from a slot with a connection
 *                                                        -> nothing, or struct db_error with DB_FAILED
 *   db_interrupt  struct db_interrupt                    -> nothing
 *   db_statistics nothing                                -> struct db_statistics
 *   db_cache      nothing; without a connection too      -> struct db_cache
 *   db_list       struct db_list                         -> struct db_listed, struct db_listing of each database
 *   db_describe   nothing: the database that is open     -> struct db_description, rights
 *   db_grant      struct db_right                        -> nothing, or struct db_error with DB_FAILED
 *   db_limit      struct db_limit                        -> nothing, or struct db_error with DB_FAILED
 *   db_copy       struct db_copy, name                   -> struct db_copying
 *   db_pages      struct db_pages, pages                 -> struct db_copying, pages
 *   db_copied     struct db_copied                       -> nothing, or struct db_error with DB_FAILED
 *
 * A slot whose holder is gone, however, is as one that said db_close: its transaction
 * is rolled back and its locks are free when the slot is repaired.
 *
 * ROWS AND PARAMETERS of n values: n types, one byte each (enum db_type); n fields of 8 bytes: the
 * integer, the double, the length of the text or blob in bytes, 0 for NULL; then the
 * bytes of texts (UTF-8) and blobs, one after the other.
 */
#ifndef TEEMATE_DB_H
#define TEEMATE_DB_H

#include <stddef.h>
#include <stdint.h>

#define DB_VERSION 1u
#define DB_NAME_MAX 48u

enum db_type { DB_NULL = 0, DB_INTEGER = 1, DB_REAL = 2, DB_TEXT = 3, DB_BLOB = 4 };

enum db_open_flags {
    DB_OPEN_READONLY = 1, /* nothing can be written; the database has to be there */
    DB_OPEN_CREATE = 2,   /* make it if it is not there */
    DB_OPEN_MEMORY = 4,   /* of this slot alone, in EPC; no name */
    DB_OPEN_UNCACHED = 8, /* read what the host has, not what the enclave still knows of it: to check the files */
};

/*
 * Followed by the name: 1 to DB_NAME_MAX of A-Z a-z 0-9, from the second on also . _ and -, not ending
 * in -wal, -root or -journal.  A slot has one connection: TM_E_STATE when it is open already.  0 takes the default.
 */
struct db_open {
    uint32_t version; /* DB_VERSION */
    uint32_t flags;
    uint32_t busy_ms;      /* how long to wait for another connection's lock; 0: not at all */
    uint32_t cursors;      /* most at a time; default and most DB_CURSORS_MAX */
    uint64_t memory;       /* bytes that the connection may take of the enclave's heap, its page cache included */
    uint32_t statement_ms; /* how long one operation may take; 0: no limit.  Counted by the enclave's clock: a quarter of a second coarse, and standing still in a private enclave while nobody else calls */
    uint32_t name_length;
};
_Static_assert(sizeof(struct db_open) == 32, "db_open");

#define DB_CURSORS_MAX 256u
#define DB_MEMORY_DEFAULT (8u << 20)
#define DB_MEMORY_MIN (1u << 20)

/* A failed open has a struct db_error in its place: the status of the ECALL is then DB_FAILED. */
struct db_opened {
    uint64_t connection; /* for db_interrupt */
    uint32_t slot;
    uint32_t sqlite_version; /* 3054000 */
    uint32_t access; /* enum db_access: how it is open, which may be less than what was asked for */
    uint32_t files;  /* how many descriptors the client has to have before it goes on (db_direct) */
};
_Static_assert(sizeof(struct db_opened) == 24, "db_opened");

#define DB_FAILED 1 /* status */

/*
 * Where the policy has io = "client" the client reads and writes the database's files itself: NAME and, when `files` is 2,
 * NAME-wal.  The broker gives it their descriptors (files.open) for as long as the database is open in the slot; ones that
 * only read when that is all that it may, or wants.  Until db_direct it gets DB_E_FILES for whatever it asks.
 */

/* ---- db_run ------------------------------------------------------------------ */

/*
 * Operations are done in their order; the first that fails is the last that has a result (kind
 * DB_ERROR).  There may be fewer results than operations without an error: then the reply was full,
 * and the rest was not begun.
 */
struct db_run {
    uint32_t count;    /* of operations */
    uint32_t reserved; /* 0 */
    uint64_t interrupt; /* 0, or where in the caller's memory a uint32_t lies that is looked at while a statement runs: SQLITE_INTERRUPT once it is not 0, DB_E_TIME when it is DB_STOP_LATE */
};
#define DB_STOP_LATE 2u
_Static_assert(sizeof(struct db_run) == 16, "db_run");

enum db_kind {
    DB_EXECUTE = 1, /* one statement; results DB_ROWS */
    DB_FETCH = 2,   /* more rows of `cursor`; result DB_ROWS */
    DB_END = 3,     /* forget `cursor`; no error when it is gone; result DB_ROWS with nothing in it */
    DB_SCRIPT = 4,  /* statements without parameters, rows are dropped; result DB_ROWS */
};

enum db_execute_flags {
    DB_NAMED = 1,    /* parameters are given by name, see below */
    DB_DESCRIBE = 2, /* columns are wanted in the result; DB_FETCH has this flag too */
    DB_ONCE = 4,     /* do not keep the statement prepared */
};

enum db_begin { DB_BEGIN_NONE = 0, DB_BEGIN_DEFERRED = 1, DB_BEGIN_IMMEDIATE = 2, DB_BEGIN_EXCLUSIVE = 3 };

/*
 * Followed by the text of SQL (UTF-8, no NUL), then `sets` sets of `parameters` values.  With
 * DB_NAMED there come before the sets, once, `parameters` names: uint16_t length and the name without its
 * ':', '@' or '$'; a statement's parameter that has no value is an error, a name that it does not
 * have is not.  Without: as many values as the statement has parameters.
 *
 * A statement that returns rows wants one set (or none when it has no parameters).  Others are done
 * once for each set; with no sets and no parameters once.  0 sets but parameters in the statement: an error.
 */
struct db_operation {
    uint8_t kind;
    uint8_t flags;
    uint8_t begin; /* DB_EXECUTE: begin a transaction before an INSERT, UPDATE, DELETE or REPLACE when none is open */
    uint8_t reserved; /* 0 */
    uint16_t parameters;
    uint16_t reserved2; /* 0 */
    uint32_t sets;
    uint32_t rows;   /* at most so many in this result; 0: the cursor is opened (or left) without fetching */
    uint32_t cursor; /* FETCH, END */
    uint32_t text;   /* bytes of SQL */
    uint32_t length; /* bytes of names and sets */
};
_Static_assert(sizeof(struct db_operation) == 28, "db_operation");

enum db_result_kind { DB_ROWS = 1, DB_ERROR = 2 };

enum db_result_flags {
    DB_MORE = 1,        /* there may be more rows: `cursor` is open until DB_END, or the DB_FETCH that has no DB_MORE */
    DB_TRANSACTION = 2, /* a transaction is open now */
    DB_READS = 4,       /* the statement writes nothing */
    DB_CHANGES = 8,     /* it was an INSERT, UPDATE, DELETE or REPLACE: `changes` counts */
};

/*
 * Followed by the columns when they were wanted (uint16_t length and name, uint16_t length and declared type, each;
 * a length of 65535: none), then the rows.
 */
struct db_rows {
    uint8_t kind; /* DB_ROWS */
    uint8_t flags;
    uint16_t columns; /* 0: the statement returns no rows */
    uint32_t count;   /* of rows here */
    uint32_t cursor;  /* 0 without DB_MORE */
    uint32_t described; /* bytes of the columns' names and types */
    uint32_t length;  /* bytes of the rows */
    uint32_t reserved;
    int64_t changes;  /* rows that all sets together have changed */
    int64_t last_rowid; /* of the connection */
};
_Static_assert(sizeof(struct db_rows) == 40, "db_rows");

/* Followed by the message, UTF-8. */
struct db_error {
    uint8_t kind; /* DB_ERROR */
    uint8_t flags; /* DB_TRANSACTION */
    uint16_t reserved;
    int32_t code;     /* SQLite's extended result code, or a negative enum db_own_code */
    int32_t offset;   /* in the text of SQL, or -1 */
    uint32_t set;     /* which set of parameters */
    uint32_t needed;  /* DB_E_ROOM: bytes that the reply should have room for */
    uint32_t length;  /* of the message */
};
_Static_assert(sizeof(struct db_error) == 24, "db_error");

enum db_own_code {
    DB_E_TAMPERED = -1,   /* a file is not what the enclave wrote: changed, swapped, or an older one */
    DB_E_PARAMETERS = -2, /* too many or too few for the statement */
    DB_E_STATEMENTS = -3, /* more than one statement, where one is wanted */
    DB_E_CURSOR = -4,     /* no such cursor: it was ended */
    DB_E_CURSORS = -5,    /* more open at once than the connection may have */
    DB_E_ROOM = -6,       /* not even one row fits: fetch again from a reply with `needed` bytes; `set` is the cursor */
    DB_E_TIME = -7,       /* the statement took longer than statement_ms */
    DB_E_REQUEST = -8,    /* the operation is none: a length or number in it cannot be */
    DB_E_STORAGE = -9,    /* the enclave has no storage: databases in memory only */
    DB_E_DENIED = -10,    /* the caller has no right to it: its owner has granted none, or to read only */
    DB_E_EXISTS = -11,    /* there is a database of that name */
    DB_E_RIGHTS = -12,    /* it has as many grants as there may be */
    DB_E_COPYING = -13,   /* a copy is under way on this connection, or none is */
    DB_E_SIZE = -14,      /* the database is as large as its owner lets it be (db_limit) */
    DB_E_SPACE = -15,     /* the enclave's files take all that its policy gives them, or the host's disk is full */
    DB_E_HEAP = -16,      /* the connection may take more, but the enclave's heap is full */
    DB_E_FORMAT = -17,    /* an earlier build of the enclave has made the database, in a format that this one does not read */
    DB_E_FILES = -18,     /* the client has not said that it has the files' descriptors (db_direct) */
};

/* Bytes that the reply needs whatever happens: smaller ones are TM_E_SPACE. */
#define DB_REPLY_MIN 1024u

/* ---- the rest ------------------------------------------------------------------ */

/*
 * From any slot of the same identity: the db_run that it is in ends with SQLITE_INTERRUPT, later ones do not.
 * TM_E_STATE: it is closed.
 */
struct db_interrupt {
    uint32_t slot;
    uint32_t reserved; /* 0 */
    uint64_t connection;
};
_Static_assert(sizeof(struct db_interrupt) == 16, "db_interrupt");

struct db_statistics {
    uint64_t memory_now, memory_most, memory_limit; /* bytes of this connection */
    uint64_t cursors, statements;                   /* open cursors, statements that are kept prepared */
    uint64_t heap_free_largest;                     /* of the enclave, bytes */
    uint64_t cache_hits, cache_misses;              /* of this connection's page cache */
};
_Static_assert(sizeof(struct db_statistics) == 64, "db_statistics");

/* Of the cache of pages that all connections share (cache.h). */
struct db_cache {
    uint64_t limit, size; /* bytes of the enclave's heap: that it may take, that it has taken */
    uint64_t hits, fills; /* pages that were found in it, and that were put there, since the enclave began */
};
_Static_assert(sizeof(struct db_cache) == 32, "db_cache");

/* ---- rights ----------------------------------------------------------------- */

/*
 * A database is its maker's, by uid, and the owner's alone until others are granted something.  Rights lie in the
 * file's sealed head; they go by the uid and the first gid that the slot was bound with (struct tm_identity).
 */
enum db_access { DB_ACCESS_NONE = 0, DB_ACCESS_READ = 1, DB_ACCESS_WRITE = 2, DB_ACCESS_OWNER = 3 };
enum db_grantee { DB_GRANT_UID = 1, DB_GRANT_GID = 2 };

#define DB_RIGHTS_MAX 128u

/* db_grant: DB_ACCESS_READ, DB_ACCESS_WRITE, or DB_ACCESS_NONE to take it back.  The owner's to ask. */
struct db_right {
    uint32_t id;
    uint8_t grantee; /* enum db_grantee */
    uint8_t access;  /* enum db_access */
    uint16_t reserved; /* 0 */
};
_Static_assert(sizeof(struct db_right) == 8, "db_right");

/* Followed by `count` struct db_right, which only the owner is told: others have 0 here. */
struct db_description {
    uint32_t owner;  /* uid */
    uint32_t access; /* enum db_access: the caller's */
    uint32_t count;
    uint32_t reserved;
    uint64_t pages;  /* of DB_PAGE bytes, those in the log not counted */
    uint64_t pages_most; /* that it may have; 0: no limit of its own */
};
_Static_assert(sizeof(struct db_description) == 32, "db_description");

/* From a slot with a connection: the databases that the caller may use, some of them at a time. */
struct db_list {
    uint64_t from; /* 0, then what db_listed said */
};
struct db_listed {
    uint64_t next; /* 0: those were all */
};
struct db_listing {
    uint32_t owner;
    uint32_t access; /* enum db_access: the caller's */
    char name[56];   /* zero padded */
};
_Static_assert(sizeof(struct db_listing) == 64, "db_listing");

/* How large the database may become, whoever writes to it; what is larger stays so.  The owner's to say. */
struct db_limit {
    uint64_t pages; /* of DB_PAGE bytes; 0: no limit of its own */
};
_Static_assert(sizeof(struct db_limit) == 8, "db_limit");

/* ---- copies ------------------------------------------------------------------ */

/*
 * A database goes in, out, or into another one of this enclave, page by page, from a slot with a connection.  While a copy
 * is under way the connection does nothing else (DB_E_COPYING).
 *
 *   DB_COPY_OUT   pages of the open database, as it was when db_copy was called: the owner's to ask
 *   DB_COPY_TO    the same into the new database `name`, sealed; the owner's to ask
 *   DB_COPY_IN    `pages` pages from outside make the new database `name`, whatever is open here
 *
 * Pages are those of a file of SQLite that nobody writes to: in order, the first one's head says that there is no log.
 * A new database is there, its caller's, when db_copied has returned, and not before: until then its name is taken, and whoever
 * opens it waits.  What is no sound database (PRAGMA integrity_check) does not become one.
 */
#define DB_PAGE 4096u
#define DB_PAGES_MAX 64u /* in one db_pages */

enum db_copy_kind { DB_COPY_OUT = 1, DB_COPY_TO = 2, DB_COPY_IN = 3 };

struct db_copy {
    uint32_t kind; /* enum db_copy_kind */
    uint32_t name_length; /* 0 with DB_COPY_OUT */
    uint64_t pages; /* DB_COPY_IN; else 0 */
};
_Static_assert(sizeof(struct db_copy) == 16, "db_copy");

/* Followed by DB_COPY_IN's pages. */
struct db_pages {
    uint32_t count; /* 1 to DB_PAGES_MAX; no more than are left */
    uint32_t reserved; /* 0 */
};
_Static_assert(sizeof(struct db_pages) == 8, "db_pages");

/* Followed by DB_COPY_OUT's pages. */
struct db_copying {
    uint64_t done, pages; /* pages so far, and in all */
};
_Static_assert(sizeof(struct db_copying) == 16, "db_copying");

struct db_copied {
    uint32_t keep; /* 1: all pages are there; 0: give it up, nothing is left of it */
    uint32_t reserved; /* 0 */
    uint64_t interrupt; /* as in struct db_run */
};
_Static_assert(sizeof(struct db_copied) == 16, "db_copied");

#endif
