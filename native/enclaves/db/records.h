/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A database's files as the host has them: records of authenticated ciphertext, AES-128-GCM.
 *
 *   main file   4096 bytes: the head (head.h); then per page of 4096 bytes nonce 12 | ciphertext 4096 | tag 16
 *   -wal        the same of the log's head of 32 bytes; then per frame of 24 + 4096 bytes; each followed by 8 bytes:
 *               the number of the database's head (head.h) when it was written
 *
 * Every record is bound to the database (its key is its own), the file, the record's number and that of the head.  Nonces
 * are random: a key is good for 2^32 writes (NIST SP 800-38D, 8.3), which is 16 TiB.
 *
 * Which of them belong together is in the root (root.h): what the host can do and is not found is to bring back an
 * earlier state of the whole database when this life of the enclave has not used it yet.
 */
#ifndef DB_RECORDS_H
#define DB_RECORDS_H

#include "cache.h"
#include "shared.h"

#define PAGE_SIZE 4096u
#define FRAME_HEAD 24u
#define FRAME_SIZE (FRAME_HEAD + PAGE_SIZE)
#define LOG_HEAD 32u
#define HEAD_SIZE 4096u
#define RECORD_EXTRA 28u
#define LOG_EXTRA (RECORD_EXTRA + 8u)

/* A failure of the host's, as SQLite's code; what is not what the enclave wrote. */
enum record_status { RECORD_OK = 0, RECORD_END = 1, RECORD_TAMPERED = -1001, RECORD_MEMORY = -1002, RECORD_TORN = -1003,
                     RECORD_DENIED = -1004, RECORD_FORMAT = -1005 };

struct record_file {
    struct database *database;
    enum file_kind kind;
    uint32_t handle;
    uint64_t next; /* what is read next if it is read in order */
};

uint32_t record_size(enum file_kind kind, uint64_t record);
/* The same in the file. */
uint32_t record_room(enum file_kind kind, uint64_t record);
/* How many the host's file has room for; or a negative tm_errno. */
int64_t records_counted(const struct record_file *file);
/* How many there are, as this life knows: the host is asked only after a cut that nobody heard of any more. */
int64_t records_known(const struct record_file *file);
/*
 * RECORD_OK, RECORD_END when there is none, RECORD_TAMPERED, a negative tm_errno.  RECORD_TORN: as RECORD_TAMPERED,
 * but nothing was known of it: a checkpoint that power cut short leaves such pages, and the log has them.
 */
int record_read(struct record_file *file, uint64_t record, uint8_t *data);
/* A part of it, when it is in the cache and nothing newer may be in the file. */
bool record_cached(const struct record_file *file, uint64_t record, uint32_t offset, uint32_t length, void *data);
/* `count` records of one size, one after the other: at most BATCH. */
int records_write(struct record_file *file, uint64_t first, const uint8_t *data, uint32_t count);
int records_cut(struct record_file *file, uint64_t count);
/*
 * Look what became of the writes that were not acknowledged: for who may write to the file from now on.  A negative
 * tm_errno, RECORD_MEMORY: there may be some left.
 */
int records_settle(struct record_file *file);
/*
 * The root under which the log was begun, and the short tag of its head: 0, RECORD_END when it has none, RECORD_TAMPERED,
 * a negative tm_errno.
 */
int record_log_root(const struct record_file *log, uint8_t bound[ROOT_ID], uint64_t *tag);
/* The short tag that a frame of the log has in the file: 0, RECORD_TAMPERED, RECORD_MEMORY, a negative tm_errno. */
int record_frame_tag(const struct record_file *log, uint64_t record, uint64_t *tag);

#endif
