/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the slots share of a database: key, locks, wal-index, and what is known of its files.
 * One struct database for each name that there is a database of, for as long as the enclave lives: where there is
 * none and nobody is at it, another name takes the struct over.
 *
 * LOCKS.  A slot's word says what the slot holds; only the slot changes it, and the SDK's reset of the slot,
 * so locks are gone with their holder.  Who wants one first says so in its word, then looks at the others',
 * and takes it back if there is one in the way: so of two at most one succeeds.
 *
 * FRESHNESS.  Of every record that was read or written in this life of the enclave 64 bits of its tag are
 * kept, and nothing else is believed for it.  A write says beforehand what it will write (struct pending):
 * until it is acknowledged both are right; when its slot is gone, until whoever may write to the file next has looked
 * (records_settle()).
 */
#ifndef DB_SHARED_H
#define DB_SHARED_H

#include "connection.h"

#define REGION_SIZE 32768u /* SQLite's WALINDEX_PGSZ */
#define REGIONS_MOST 256u
#define TAGS_IN_CHUNK 4096u
#define CHUNKS_MOST 512u /* 2^21 records, 8 GiB */
#define BATCH 15u         /* records in one write: 64 KiB */
/* Known of a record that is nothing until it is written again: no record's tag, but for one in 2^64. */
#define KNOWN_NOTHING UINT64_MAX

enum file_kind { FILE_MAIN = 0, FILE_WAL = 1, FILE_KINDS = 2 };

/* Bits of a slot's word.  The wal-index has 8 locks, shared and exclusive. */
#define HOLDS_SHARED(first, count) ((((1ull << (count)) - 1) << (first)))
#define HOLDS_EXCLUSIVE(first, count) ((((1ull << (count)) - 1) << ((first) + 8)))
#define HOLDS_FILE_SHARED (1ull << 16)
#define HOLDS_FILE_RESERVED (1ull << 17)
#define HOLDS_FILE_PENDING (1ull << 18)
#define HOLDS_FILE_EXCLUSIVE (1ull << 19)
#define HOLDS_FILE (HOLDS_FILE_SHARED | HOLDS_FILE_RESERVED | HOLDS_FILE_PENDING | HOLDS_FILE_EXCLUSIVE)
#define HOLDS_SETUP (1ull << 20)
#define HOLDS_OPEN (1ull << 21)

struct pending {
    uint64_t first;
    _Atomic uint64_t count; /* written last, taken away last */
    uint64_t tags[BATCH];
};

struct known_file {
    _Atomic uint64_t records; /* that the file has */
    _Atomic uint64_t cut;     /* records and 1 of a cut that may have been done or not; 0: none */
    uint64_t *tags[CHUNKS_MOST]; /* 0: nothing is known */
};

/* Who may use a database, and how large it may be (head.h). */
struct rights {
    uint32_t owner, count;
    uint64_t pages_most; /* 0: as many as there is room for */
    struct db_right list[DB_RIGHTS_MAX];
};

/* What the last checkpoint has left (root.h). */
#define ROOT_ID 16
struct root {
    uint8_t id[ROOT_ID];
    uint8_t base[ROOT_ID]; /* the root under which the log that it was made from was begun */
    uint64_t log;          /* short tag of that log's head: there may be others, of a state that was brought back */
    uint64_t frames;       /* of that log */
    uint64_t last;         /* short tag of the last of them; 0: there are none */
    uint64_t pages;
    uint64_t head;         /* number of the database's head: an older one does not go with it */
};

struct database {
    struct database *next;
    union {
        char name[DB_NAME_MAX + 8];
        uint64_t name_words[(DB_NAME_MAX + 8) / 8];
    };
    struct tm_mutex mutex; /* for what is added: chunks of tags, regions */
    _Atomic uint32_t ready; /* the key is there */
    uint8_t key[16];
    _Atomic uint64_t head;   /* number of the head that counts */
    struct rights rights[2]; /* of it, at its number modulo 2; the other one's is about to be written */
    _Atomic uint64_t words[SLOTS_MOST];
    void *regions[REGIONS_MOST];
    _Atomic uint64_t root;  /* number of the root that counts; 0: there is none yet */
    struct root roots[2];   /* of it, at its number modulo 2; the other one's is about to be written */
    _Atomic uint64_t frames_needed; /* that the log must turn out to have before pages are used with it */
    struct known_file files[FILE_KINDS];
    struct pending pending[FILE_KINDS][SLOTS_MOST];
    _Atomic uint64_t writing[FILE_KINDS][SLOTS_MOST / 64]; /* a bit per slot: set before its pending has something, and until it has nothing */
};

/*
 * Find it, or make it: 0, TM_E_NOMEM, TM_E_BUSY.  It is the name's for certain only while the slot holds something of it:
 * who holds nothing yet has to compare the name when it does (database_is()).
 */
int database_find(const char *name, struct database **database);
bool database_is(const struct database *database, const char *name);
/* The one of that name, and nothing is made for it: NULL when there is none. */
struct database *database_known(const char *name);
/* Nothing is known of it any more, and its wal-index is empty: for who holds HOLDS_SETUP, with nobody else in it. */
void database_wipe(struct database *database);
const struct root *database_root(const struct database *database);
/* Everything that the slot held, of all databases. */
void databases_forget(uint32_t slot);

/*
 * Let the running slot hold `bits` beside what it holds: false when another slot holds one of `against`.
 */
bool database_hold(struct database *database, uint64_t bits, uint64_t against);
void database_drop(struct database *database, uint64_t bits);
uint64_t database_holds(const struct database *database);
/* Does another slot hold one of them? */
bool database_held(const struct database *database, uint64_t bits);

/* Region `index` of the wal-index; NULL when there is none and `make` is false.  0, TM_E_NOMEM, TM_E_BUSY. */
int database_region(struct database *database, uint32_t index, bool make, void **region);

/* Make room for what is known of `record`: 0, TM_E_NOMEM, TM_E_BUSY. */
int known_reserve(struct database *database, enum file_kind kind, uint64_t record);
/* May a record with this tag have been read? */
bool known_is_right(struct database *database, enum file_kind kind, uint64_t record, uint64_t tag);
/* What is known of it, 0: nothing. */
uint64_t known_tag(struct database *database, enum file_kind kind, uint64_t record);
/* Is that tag what is known, and nothing else right beside it?  Then whatever has it need not be looked for in the file. */
bool known_is_settled(struct database *database, enum file_kind kind, uint64_t record, uint64_t tag);
/* The running slot begins to write: what is right meanwhile is its pending, with everybody's. */
void known_writing(struct database *database, enum file_kind kind);
/* A slot's write is over, and what it came to is known.  SQLite's locks let one slot at a time write, and settle. */
void known_written(struct database *database, enum file_kind kind, uint32_t slot);
/* Is there a write that is not over?  For who may write: then it is one whose slot is gone, or was told of a failure. */
bool known_is_left_open(const struct database *database, enum file_kind kind, uint32_t *slot);
/* Nothing is known of it, or it was never written in this life. */
bool known_is_unknown(struct database *database, enum file_kind kind, uint64_t record);
/* Where nothing is known of it yet: false when something else is by now. */
bool known_first(struct database *database, enum file_kind kind, uint64_t record, uint64_t tag);
void known_set(struct database *database, enum file_kind kind, uint64_t record, uint64_t tag);
/* Records from `count` on are gone. */
void known_cut(struct database *database, enum file_kind kind, uint64_t count);

#endif
