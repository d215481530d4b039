/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SQLite in this process, on an ordinary file, with the durability that the enclave's has (WAL, synchronous=FULL) and
 * statements prepared once.  The library is the host's own, found when this runs: building needs none.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "database.h"

#define OPEN_FLAGS 0x6 /* SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE */
#define ROW 100
#define DONE 101
#define STATIC ((void (*)(void *))0)

struct library {
    int (*open_v2)(const char *, void **, int, const char *);
    int (*close)(void *);
    int (*exec)(void *, const char *, void *, void *, void *);
    int (*busy_timeout)(void *, int);
    int (*prepare_v2)(void *, const char *, int, void **, const char **);
    int (*finalize)(void *);
    int (*bind_int64)(void *, int, int64_t);
    int (*bind_text)(void *, int, const char *, int, void (*)(void *));
    int (*step)(void *);
    int (*reset)(void *);
    const void *(*column_text)(void *, int);
    int (*column_bytes)(void *, int);
    const char *(*errmsg)(void *);
};

struct plain {
    struct library sqlite;
    const char *file;
    void *db;
    void *statements[DATABASE_STATEMENTS];
    char row[DATABASE_VALUE]; /* what was read is copied here */
};

static void *symbol(void *library, const char *name)
{
    void *found = dlsym(library, name);

    if (found == NULL) {
        fprintf(stderr, "teemate-database: %s\n", dlerror());
        exit(1);
    }
    return found;
}

static void must(struct plain *plain, int code, int wanted)
{
    if (code == wanted)
        return;
    fprintf(stderr, "teemate-database: %s: %d: %s\n", plain->file, code,
            plain->db != NULL ? plain->sqlite.errmsg(plain->db) : "");
    exit(1);
}

static void *plain_prepare(int argc, char **argv)
{
    struct plain *plain = calloc(1, sizeof(*plain));
    void *library;

    if (argc != 2 || plain == NULL)
        return NULL;
    library = dlopen(argv[0], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        fprintf(stderr, "teemate-database: %s\n", dlerror());
        exit(1);
    }
#define FIND(name) *(void **)&plain->sqlite.name = symbol(library, "sqlite3_" #name)
    FIND(open_v2);
    FIND(close);
    FIND(exec);
    FIND(busy_timeout);
    FIND(prepare_v2);
    FIND(finalize);
    FIND(bind_int64);
    FIND(bind_text);
    FIND(step);
    FIND(reset);
    FIND(column_text);
    FIND(column_bytes);
    FIND(errmsg);
#undef FIND
    plain->file = argv[1];
    return plain;
}

static void plain_script(void *state, const char *sql)
{
    struct plain *plain = state;

    must(plain, plain->sqlite.exec(plain->db, sql, NULL, NULL, NULL), 0);
}

static void plain_open(void *state)
{
    struct plain *plain = state;

    must(plain, plain->sqlite.open_v2(plain->file, &plain->db, OPEN_FLAGS, NULL), 0);
    plain->sqlite.busy_timeout(plain->db, 60000);
    plain_script(plain, "PRAGMA synchronous=FULL");
}

static void plain_close(void *state)
{
    struct plain *plain = state;

    for (unsigned i = 0; i < DATABASE_STATEMENTS; i++)
        plain->sqlite.finalize(plain->statements[i]);
    memset(plain->statements, 0, sizeof(plain->statements));
    must(plain, plain->sqlite.close(plain->db), 0);
    plain->db = NULL;
}

static void *statement(struct plain *plain, enum database_statement which)
{
    if (plain->statements[which] == NULL)
        must(plain, plain->sqlite.prepare_v2(plain->db, database_sql[which], -1, &plain->statements[which], NULL), 0);
    return plain->statements[which];
}

static uint64_t plain_read(void *state, enum database_statement which, const int64_t *keys, unsigned count)
{
    struct plain *plain = state;
    void *stmt = statement(plain, which);
    int column = which == DATABASE_SPAN, code;
    uint64_t rows = 0;

    for (unsigned i = 0; i < count; i++) {
        plain->sqlite.bind_int64(stmt, 1, keys[i]);
        if (which == DATABASE_SPAN)
            plain->sqlite.bind_int64(stmt, 2, keys[i] + (int64_t)DATABASE_RANGE - 1);
        while ((code = plain->sqlite.step(stmt)) == ROW) {
            const void *text = plain->sqlite.column_text(stmt, column);
            size_t length = (size_t)plain->sqlite.column_bytes(stmt, column);

            memcpy(plain->row, text, length < sizeof(plain->row) ? length : sizeof(plain->row));
            rows++;
        }
        must(plain, code, DONE);
        must(plain, plain->sqlite.reset(stmt), 0);
    }
    return rows;
}

static void plain_insert(void *state, const char *text, unsigned count)
{
    struct plain *plain = state;
    void *stmt = statement(plain, DATABASE_INSERT);

    plain_script(plain, "BEGIN IMMEDIATE");
    for (unsigned i = 0; i < count; i++) {
        plain->sqlite.bind_text(stmt, 1, text, (int)DATABASE_VALUE, STATIC);
        must(plain, plain->sqlite.step(stmt), DONE);
        must(plain, plain->sqlite.reset(stmt), 0);
    }
    plain_script(plain, "COMMIT");
}

const struct database_way database_plain = {
    plain_prepare, plain_open, plain_close, plain_script, plain_read, plain_insert,
};
