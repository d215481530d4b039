/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Words (floor.h):
 *   make         the tables, with ROWS rows
 *   open         from nothing to the answer of the first query, and all of it ended again
 *   loaded       the same, with everything read once before the query: what is kept in memory is there then
 *   hold         come in and stay, for the following ones
 *   fill         read everything once
 *   point        one read of one row: the mean of a hundred, one after the other
 *   batch        the same, with a hundred reads in one call where there is such a thing
 *   range        a hundred rows by one statement
 *   insert       a transaction with one insert
 *   inserts      a transaction with a hundred
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "database.h"
#include "floor.h"

const char *const database_sql[DATABASE_STATEMENTS] = {
    [DATABASE_POINT] = "SELECT v FROM t WHERE id = ?",
    [DATABASE_SPAN] = "SELECT id, v FROM t WHERE id BETWEEN ? AND ?",
    [DATABASE_INSERT] = "INSERT INTO u(v) VALUES (?)",
};

struct bench {
    const struct database_way *way;
    void *state;
    uint64_t rows, dice;
};

static int64_t any_row(struct bench *bench)
{
    bench->dice ^= bench->dice << 13; /* xorshift64 (Marsaglia 2003) */
    bench->dice ^= bench->dice >> 7;
    bench->dice ^= bench->dice << 17;
    return 1 + (int64_t)(bench->dice % (bench->rows - DATABASE_RANGE));
}

static void expect(uint64_t rows, uint64_t wanted)
{
    if (rows == wanted)
        return;
    fprintf(stderr, "teemate-database: %" PRIu64 " rows came instead of %" PRIu64 "\n", rows, wanted);
    exit(1);
}

static void first_query(struct bench *bench)
{
    int64_t key = any_row(bench);

    expect(bench->way->read(bench->state, DATABASE_POINT, &key, 1), 1);
}

static double make_once(void *state)
{
    static const char *const tables = "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
                                      "CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT);"
                                      "CREATE TABLE u(id INTEGER PRIMARY KEY, v TEXT);";
    struct bench *bench = state;
    double start = floor_now_ns();
    char sql[512];

    bench->way->open(bench->state);
    bench->way->script(bench->state, tables);
    snprintf(sql, sizeof(sql),
             "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT %" PRIu64 ")"
             "INSERT INTO t SELECT i, printf('%%0%ud', i) FROM n; PRAGMA wal_checkpoint(TRUNCATE)",
             bench->rows, DATABASE_VALUE);
    bench->way->script(bench->state, sql);
    bench->way->close(bench->state);
    return floor_now_ns() - start;
}

static double open_once(void *state)
{
    struct bench *bench = state;
    double start = floor_now_ns(), end;

    bench->way->open(bench->state);
    first_query(bench);
    end = floor_now_ns();
    bench->way->close(bench->state);
    return end - start;
}

static double loaded_once(void *state)
{
    struct bench *bench = state;
    double start = floor_now_ns(), end;

    bench->way->open(bench->state);
    bench->way->script(bench->state, DATABASE_SUM);
    first_query(bench);
    end = floor_now_ns();
    bench->way->close(bench->state);
    return end - start;
}

static double hold_once(void *state)
{
    struct bench *bench = state;
    double start = floor_now_ns();

    bench->way->open(bench->state);
    first_query(bench);
    return floor_now_ns() - start;
}

static double fill_once(void *state)
{
    struct bench *bench = state;
    double start = floor_now_ns();

    bench->way->script(bench->state, DATABASE_SUM);
    return floor_now_ns() - start;
}

static double point_once(void *state)
{
    struct bench *bench = state;
    int64_t keys[DATABASE_BATCH];
    double start;

    for (unsigned i = 0; i < DATABASE_BATCH; i++)
        keys[i] = any_row(bench);
    start = floor_now_ns();
    for (unsigned i = 0; i < DATABASE_BATCH; i++)
        expect(bench->way->read(bench->state, DATABASE_POINT, &keys[i], 1), 1);
    return (floor_now_ns() - start) / DATABASE_BATCH;
}

static double batch_once(void *state)
{
    struct bench *bench = state;
    int64_t keys[DATABASE_BATCH];
    double start;

    for (unsigned i = 0; i < DATABASE_BATCH; i++)
        keys[i] = any_row(bench);
    start = floor_now_ns();
    expect(bench->way->read(bench->state, DATABASE_POINT, keys, DATABASE_BATCH), DATABASE_BATCH);
    return (floor_now_ns() - start) / DATABASE_BATCH;
}

static double range_once(void *state)
{
    struct bench *bench = state;
    int64_t key = any_row(bench);
    double start = floor_now_ns();

    expect(bench->way->read(bench->state, DATABASE_SPAN, &key, 1), DATABASE_RANGE);
    return floor_now_ns() - start;
}

static double insert_some(struct bench *bench, unsigned count)
{
    char text[DATABASE_VALUE + 1];
    double start;

    snprintf(text, sizeof(text), "%0*" PRId64, (int)DATABASE_VALUE, any_row(bench));
    start = floor_now_ns();
    bench->way->insert(bench->state, text, count);
    return floor_now_ns() - start;
}

static double insert_once(void *state)
{
    return insert_some(state, 1);
}

static double inserts_once(void *state)
{
    return insert_some(state, DATABASE_BATCH);
}

int main(int argc, char **argv)
{
    struct bench bench = {.dice = (uint64_t)getpid() * 0x9e3779b97f4a7c15ull | 1};
    const struct floor words[] = {
        {make_once, "make", &bench},     {open_once, "open", &bench},     {loaded_once, "loaded", &bench},
        {hold_once, "hold", &bench},     {fill_once, "fill", &bench},     {point_once, "point", &bench},
        {batch_once, "batch", &bench},   {range_once, "range", &bench},   {insert_once, "insert", &bench},
        {inserts_once, "inserts", &bench},
    };

    if (argc > 3) {
        bench.rows = strtoull(argv[1], NULL, 0);
        if (strcmp(argv[2], "shared") == 0)
            bench.way = &database_shared;
        else if (strcmp(argv[2], "private") == 0)
            bench.way = &database_private;
        else if (strcmp(argv[2], "plain") == 0)
            bench.way = &database_plain;
    }
    if (bench.way != NULL)
        bench.state = bench.way->prepare(argc - 3, argv + 3);
    if (bench.state == NULL || bench.rows <= DATABASE_RANGE) {
        fprintf(stderr, "usage: teemate-database ROWS shared SOCKET ENCLAVE NAME\n"
                        "       teemate-database ROWS private IMAGE SIGSTRUCT sim|sgx FOLDER NAME\n"
                        "       teemate-database ROWS plain LIBSQLITE3 FILE\n");
        return 2;
    }
    return floor_serve(words, sizeof(words) / sizeof(*words));
}
