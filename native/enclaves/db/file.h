/* SPDX-License-Identifier: Apache-2.0 */
/* A database's file as SQLite reads, writes and locks it. */
#ifndef DB_FILE_H
#define DB_FILE_H

#include "records.h"
#include "root.h"
#include "sqlite3.h"

/*
 * One open file.  What is written to the log is gathered until a transaction's last frame, which says so in
 * its head, or a sync: it is then one request to the host.  SQLite writes head and page of a frame
 * one after the other; `half`: the last frame has its head only.
 */
struct file {
    sqlite3_file base;
    struct record_file records;
    bool readonly; /* its user may read only: the database, and so its log */
    uint8_t *batch; /* BATCH frames */
    uint64_t batch_first; /* record */
    uint32_t batch_count;
    bool half;
    uint64_t last_read; /* record */
};

static inline struct file *file_of(sqlite3_file *base)
{
    return (struct file *)base;
}

/* What the host or the records say, for SQLite: `otherwise` when it has no code of its own. */
int file_code(int status, int otherwise);
extern const sqlite3_io_methods file_methods;

/* ---- batch.c: what is gathered of the log ------------------------------------- */

/* Write what was gathered; SQLite's code, as of the others. */
int batch_flush(struct file *log);
/* `length` bytes of a frame, at `offset` in it. */
int batch_write(struct file *log, uint64_t record, const void *data, uint32_t length, uint32_t offset);
/*
 * Nobody writes to the log any more.  What was gathered and not written then is of a transaction that was rolled back,
 * and its place in the log is the next writer's, of whatever slot.
 */
void batch_forget(void);

#endif
