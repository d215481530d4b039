/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One table, the same statements, three ways to reach it: what `teemate bench db` compares.
 *
 *   teemate-database ROWS shared SOCKET ENCLAVE NAME
 *   teemate-database ROWS private IMAGE.sgxs IMAGE.sig sim|sgx FOLDER NAME
 *   teemate-database ROWS plain LIBSQLITE3.so FILE
 */
#ifndef TEEMATE_BENCH_DATABASE_H
#define TEEMATE_BENCH_DATABASE_H

#include <stddef.h>
#include <stdint.h>

#define DATABASE_VALUE 200u /* bytes of a row's text */
#define DATABASE_RANGE 100u /* rows of a range */
#define DATABASE_BATCH 100u /* reads of one call, inserts of one transaction */

enum database_statement { DATABASE_POINT, DATABASE_SPAN, DATABASE_INSERT, DATABASE_STATEMENTS };
/* Parameters: a row's number; the first and the last; a text. */
extern const char *const database_sql[DATABASE_STATEMENTS];
#define DATABASE_SUM "SELECT sum(length(v)) FROM t"

struct database_way {
    /* Remember the words of the command line: the state, or NULL when they are not right. */
    void *(*prepare)(int argc, char **argv);
    /* From nothing to an open database, and back. */
    void (*open)(void *state);
    void (*close)(void *state);
    /* Statements without parameters; what they return is dropped. */
    void (*script)(void *state, const char *sql);
    /* `count` statements of that kind, in one go if that can be said; returns how many rows came. */
    uint64_t (*read)(void *state, enum database_statement statement, const int64_t *keys, unsigned count);
    /* One transaction of `count` inserts, on the disk when this returns. */
    void (*insert)(void *state, const char *text, unsigned count);
};

extern const struct database_way database_shared, database_private, database_plain;

#endif
