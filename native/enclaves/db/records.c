/* SPDX-License-Identifier: Apache-2.0 */
#include "records.h"

#include "files.h"

#define NONCE 12u
#define TAG 16u
/* A record that another slot writes just now may be read half: it is read again, so often. */
#define READS 64u
#define LARGEST (FRAME_SIZE + LOG_EXTRA)

struct binding {
    uint8_t label[8];
    uint64_t kind;
    uint64_t record;
    uint64_t head;         /* of a record of the log: the database's, by number, when it was written */
    uint8_t root[ROOT_ID]; /* of the log's head: under which the log was begun (root.h) */
};

static struct binding binding_of(const struct record_file *file, uint64_t record)
{
    return (struct binding){.label = "tmdb 3", .kind = file->kind, .record = record};
}

static bool is_log_head(const struct record_file *file, uint64_t record)
{
    return file->kind == FILE_WAL && !record;
}

uint32_t record_size(enum file_kind kind, uint64_t record)
{
    return kind == FILE_MAIN ? PAGE_SIZE : record ? FRAME_SIZE : LOG_HEAD;
}

uint32_t record_room(enum file_kind kind, uint64_t record)
{
    return record_size(kind, record) + (kind == FILE_MAIN ? RECORD_EXTRA : LOG_EXTRA);
}

static uint64_t place_of(enum file_kind kind, uint64_t record)
{
    if (kind == FILE_MAIN)
        return HEAD_SIZE + record * (PAGE_SIZE + RECORD_EXTRA);
    return record ? LOG_HEAD + LOG_EXTRA + (record - 1) * (uint64_t)(FRAME_SIZE + LOG_EXTRA) : 0;
}

int64_t records_counted(const struct record_file *file)
{
    int64_t size = tm_file_size(file->handle);
    uint64_t first = file->kind == FILE_MAIN ? HEAD_SIZE : LOG_HEAD + LOG_EXTRA;

    if (size < 0)
        return size;
    if ((uint64_t)size < first)
        return 0;
    if (file->kind == FILE_MAIN)
        return (int64_t)(((uint64_t)size - first) / (PAGE_SIZE + RECORD_EXTRA));
    return 1 + (int64_t)(((uint64_t)size - first) / (FRAME_SIZE + LOG_EXTRA));
}

int64_t records_known(const struct record_file *file)
{
    const struct known_file *known = &file->database->files[file->kind];
    uint64_t cut = known->cut, records = known->records;
    int64_t counted;

    if (!cut || records < cut)
        return (int64_t)records;
    counted = records_counted(file);
    if (counted < 0)
        return counted;
    return (uint64_t)counted < cut ? (int64_t)cut - 1 : (int64_t)records;
}

/* Before the file is changed: did the last cut, whose slot died or was told of a failure, come about? */
static int settle_cut(struct record_file *file)
{
    struct known_file *known = &file->database->files[file->kind];
    int64_t records = known->cut ? records_known(file) : 0;

    if (records < 0)
        return (int)records;
    if (known->cut && (uint64_t)records < known->cut)
        known_cut(file->database, file->kind, known->cut - 1);
    known->cut = 0;
    return 0;
}

static uint64_t short_tag(const uint8_t *tag)
{
    uint64_t value;

    memcpy(&value, tag, sizeof(value));
    return value ? value : 1;
}

/* ---- what a power cut leaves ------------------------------------------------------ */

/* As it stands beside a record of the log; 0 of a page. */
static uint64_t head_of(const struct record_file *file, uint64_t record, const uint8_t *raw)
{
    uint64_t head = 0;

    if (file->kind == FILE_WAL)
        memcpy(&head, raw + record_size(file->kind, record) + RECORD_EXTRA, sizeof(head));
    return head;
}

/* `binding` without the head, which the record itself tells. */
static bool open_bound(const struct record_file *file, const struct binding *binding, const uint8_t *raw, uint8_t *data)
{
    uint32_t size = record_size(file->kind, binding->record);
    struct binding whole = *binding;

    whole.head = head_of(file, binding->record, raw);
#ifdef DB_TEST_NO_SEALING
    memcpy(data, raw + NONCE, size);
    return true;
#endif
    return !tm_aead_open(file->database->key, raw, &whole, sizeof(whole), raw + NONCE, size, data, raw + NONCE + size);
}

/*
 * Was it written when rights were known that are not in the head that was found?  Then that is an older one, which the
 * host has brought back: a head is on the disk before anything is written under it.
 */
static bool is_of_a_later_head(const struct record_file *file, uint64_t record, const uint8_t *raw)
{
#ifdef DB_TEST_NO_FRESHNESS
    return false;
#endif
    return head_of(file, record, raw) > file->database->head;
}

/* The log's head: of the log that was begun under the present root, or of that which the root was made from. */
static bool open_log_head(const struct record_file *log, const uint8_t *raw, uint8_t *data, uint8_t bound[ROOT_ID])
{
    struct root root = *database_root(log->database);
    struct binding binding = binding_of(log, 0);

    memcpy(binding.root, root.id, ROOT_ID);
    if (!open_bound(log, &binding, raw, data)) {
        memcpy(binding.root, root.base, ROOT_ID);
        if (!open_bound(log, &binding, raw, data))
            return false;
    }
    memcpy(bound, binding.root, ROOT_ID);
    return true;
}

static bool open_record(const struct record_file *file, uint64_t record, const uint8_t *raw, uint8_t *data)
{
    struct binding binding = binding_of(file, record);

    if (is_log_head(file, record))
        return open_log_head(file, raw, data, binding.root);
    return open_bound(file, &binding, raw, data);
}

int record_log_root(const struct record_file *log, uint8_t bound[ROOT_ID], uint64_t *tag)
{
    uint8_t raw[LOG_HEAD + LOG_EXTRA], head[LOG_HEAD];
    int64_t got = tm_file_read(log->handle, 0, raw, sizeof(raw));

    if (got < (int64_t)sizeof(raw))
        return got < 0 ? (int)got : RECORD_END;
    *tag = short_tag(raw + NONCE + LOG_HEAD);
    if (!known_is_right(log->database, FILE_WAL, 0, *tag) || !open_log_head(log, raw, head, bound))
        return RECORD_TAMPERED;
    return 0;
}

int record_frame_tag(const struct record_file *log, uint64_t record, uint64_t *tag)
{
    uint8_t raw[LARGEST], *frame = sqlite3_malloc(FRAME_SIZE);
    int64_t got = frame ? tm_file_read(log->handle, place_of(FILE_WAL, record), raw, sizeof(raw)) : RECORD_MEMORY;
    bool right = got == (int64_t)sizeof(raw) && open_record(log, record, raw, frame);

    sqlite3_free(frame);
    if (!right)
        return got < 0 ? (int)got : RECORD_TAMPERED;
    *tag = short_tag(raw + NONCE + FRAME_SIZE);
    return known_is_right(log->database, FILE_WAL, record, *tag) ? 0 : RECORD_TAMPERED;
}

/* A frame of the log, of the same life of the log as `salt`: neither judged for freshness nor kept. */
static bool peek_frame(const struct record_file *file, uint64_t record, const uint8_t salt[8], uint8_t *frame)
{
    uint8_t raw[LARGEST];
    int64_t got = tm_file_read(file->handle, place_of(FILE_WAL, record), raw, sizeof(raw));

    return got == (int64_t)sizeof(raw) && open_record(file, record, raw, frame) && !memcmp(frame + 8, salt, 8);
}

static uint32_t big_endian(const uint8_t *bytes)
{
    uint32_t value;

    memcpy(&value, bytes, sizeof(value));
    return __builtin_bswap32(value);
}

/* SQLite's checksum of the log (wal.c, walChecksumBytes) goes on from one frame to the next. */
static void add_checksum(uint32_t sum[2], const uint8_t *data, uint32_t length)
{
    for (uint32_t i = 0; i < length; i += 8) {
        uint32_t words[2];

        memcpy(words, data + i, sizeof(words));
        sum[0] += words[0] + sum[1];
        sum[1] += words[1] + sum[0];
    }
}

static bool follows(const uint32_t before[2], const uint8_t *frame)
{
    uint32_t sum[2] = {before[0], before[1]};

    add_checksum(sum, frame, 8);
    add_checksum(sum, frame + FRAME_HEAD, PAGE_SIZE);
    return sum[0] == big_endian(frame + 16) && sum[1] == big_endian(frame + 20);
}

/*
 * A frame of the log is not right, and nothing is known of it in this life.  When power failed before its
 * transaction was synced it may be torn, and the log ends before it, as for SQLite.  But a transaction
 * begins when the last one is synced: when a later one was committed and yet another one follows, this
 * one was whole, and somebody has changed it since.
 */
static bool log_goes_on(struct record_file *file, uint64_t record)
{
    uint64_t count = file->database->files[FILE_WAL].records;
    uint8_t head[LOG_HEAD], *frame = sqlite3_malloc(FRAME_SIZE);
    uint32_t sum[2];
    bool commit = false, found = false;

    if (record <= file->database->frames_needed) {
        sqlite3_free(frame);
        return true; /* it was whole when pages were copied from it */
    }
    if (!frame || record_read(file, 0, head)) {
        sqlite3_free(frame);
        return true;
    }
    while (!found && ++record < count) {
        if (!peek_frame(file, record, head + 16, frame)) {
            commit = false;
            continue;
        }
        found = commit && follows(sum, frame);
        commit = big_endian(frame + 4) != 0;
        sum[0] = big_endian(frame + 16);
        sum[1] = big_endian(frame + 20);
    }
    sqlite3_free(frame);
    return found;
}

/* The log's head is not kept: it is read as seldom as it is short. */
static bool is_kept(const struct record_file *file, uint64_t record)
{
    return file->kind == FILE_MAIN || record;
}

static struct cache_key key_of(const struct record_file *file, uint64_t record, uint64_t tag)
{
    return (struct cache_key){(uint64_t)file->database, record << 1 | file->kind, tag};
}

bool record_cached(const struct record_file *file, uint64_t record, uint32_t offset, uint32_t length, void *data)
{
    const struct connection *connection = connection_self();
    uint64_t tag = is_kept(file, record) ? known_tag(file->database, file->kind, record) : 0;
    struct cache_key key = key_of(file, record, tag);

    if (!tag || (connection && connection->uncached) || !cache_get(&key, offset, length, data))
        return false;
#ifdef DB_TEST_NO_FRESHNESS
    return true;
#endif
    /* It was right when it was copied if it still is. */
    return known_is_settled(file->database, file->kind, record, tag);
}

static void keep(const struct record_file *file, uint64_t record, uint64_t tag, const uint8_t *data)
{
    struct cache_key key = key_of(file, record, tag);

    if (is_kept(file, record))
        cache_put(&key, data, record_size(file->kind, record));
}

static bool is_zero(const uint8_t *data, uint32_t length)
{
    while (length && !*data)
        data++, length--;
    return !length;
}

/* Pages in between may have been read before. */
#define SKIPPED 4u

/*
 * Pages are read in order: with one request of the host's for this one and what follows, into the cache alone.
 * Nothing is judged here.  What is not right, or not right any more, is read again by itself when it is asked for.
 */
static void read_ahead(struct record_file *file, uint64_t first)
{
    const struct known_file *known = &file->database->files[file->kind];
    uint32_t step = PAGE_SIZE + RECORD_EXTRA;
    uint64_t records = known->records, count = records > first ? records - first : 0;
    uint8_t data[PAGE_SIZE], *raw = sqlite3_malloc((int)(BATCH * step));
    int64_t got;

    if (!raw)
        return;
    count = count < BATCH ? count : BATCH;
    got = tm_file_read(file->handle, place_of(file->kind, first), raw, count * step);
    count = got < 0 ? 0 : (uint64_t)got / step;
    for (uint64_t i = 0; i < count; i++) {
        const uint8_t *at = raw + i * step;
        uint64_t record = first + i, tag = short_tag(at + NONCE + PAGE_SIZE), right;
        struct cache_key key = key_of(file, record, tag);

        right = known_tag(file->database, file->kind, record);
        if ((right && right != tag) || cache_get(&key, 0, 0, data) || !open_record(file, record, at, data))
            continue;
        if (!right && (known_reserve(file->database, file->kind, record) ||
                       !known_first(file->database, file->kind, record, tag)))
            continue;
        keep(file, record, tag, data);
    }
    sqlite3_free(raw);
    file->next = first + (count ? count : 1);
}

/* Is this page what is read next, or almost?  Then it is in the cache now, with the following ones. */
static bool was_ahead(struct record_file *file, uint64_t record)
{
    const struct connection *connection = connection_self();
    bool in_order = file->kind == FILE_MAIN && file->next && record - file->next < SKIPPED;

    file->next = record + 1;
    if (!in_order || (connection && connection->uncached))
        return false;
    read_ahead(file, record);
    return true;
}

int record_read(struct record_file *file, uint64_t record, uint8_t *data)
{
    const struct known_file *known = &file->database->files[file->kind];
    uint32_t size = record_size(file->kind, record), room = record_room(file->kind, record);
    bool unknown, zeros = false;
    uint8_t raw[LARGEST];

    /* What is behind the last page is of another state, or of a checkpoint that was cut short. */
    if (file->kind == FILE_MAIN && record >= known->records)
        return RECORD_END;
    if (file->kind == FILE_WAL && known_tag(file->database, file->kind, record) == KNOWN_NOTHING) {
        memset(data, 0, size);
        return RECORD_OK; /* no frame, as below: nobody was told that it was written */
    }
    if (record_cached(file, record, 0, size, data))
        return RECORD_OK;
    if (was_ahead(file, record) && record_cached(file, record, 0, size, data))
        return RECORD_OK;
    for (uint32_t reads = 0; reads < READS; reads++) {
        int64_t got = tm_file_read(file->handle, place_of(file->kind, record), raw, room);
        uint64_t tag;

        if (got < 0)
            return (int)got;
        if (got < room) {
            if (record >= known->records || (known->cut && record >= known->cut - 1))
                return RECORD_END;
            continue;
        }
        zeros = is_zero(raw, room);
        if (!open_record(file, record, raw, data))
            continue;
        if (is_of_a_later_head(file, record, raw))
            return RECORD_TAMPERED;
        tag = short_tag(raw + NONCE + size);
        if (!known_is_right(file->database, file->kind, record, tag))
            continue;
        if (known_is_unknown(file->database, file->kind, record)) {
            if (known_reserve(file->database, file->kind, record))
                return RECORD_MEMORY;
            /* Somebody may have written it since it was read. */
            if (!known_first(file->database, file->kind, record, tag))
                continue;
        }
        keep(file, record, tag, data);
        return RECORD_OK;
    }
    unknown = known_is_unknown(file->database, file->kind, record);
    if (file->kind == FILE_WAL && unknown && (record ? !log_goes_on(file, record) : zeros)) {
        memset(data, 0, size);
        return RECORD_OK; /* no frame: for SQLite its checksum is wrong, and the log ends here */
    }
    return file->kind == FILE_MAIN && unknown ? RECORD_TORN : RECORD_TAMPERED;
}

/*
 * One record of a write that was not acknowledged: its slot is gone, or was told of a failure.  It is not done any more
 * (files.h), so what is in the file now is what counts: the new one, the old one, or, when whoever wrote it died too,
 * neither.  Then it is nothing until it is written again, whatever the host brings.
 */
static int settle_record(struct record_file *file, uint64_t record, uint64_t written, uint8_t *data)
{
    uint32_t size = record_size(file->kind, record), room = record_room(file->kind, record);
    uint8_t raw[LARGEST];
    int64_t got = tm_file_read(file->handle, place_of(file->kind, record), raw, room);

    if (got < 0)
        return (int)got;
    if (got < room)
        return 0; /* the file ends before it, as it did */
    if (!open_record(file, record, raw, data))
        known_set(file->database, file->kind, record, KNOWN_NOTHING);
    else if (short_tag(raw + NONCE + size) == written)
        known_set(file->database, file->kind, record, written);
    return 0;
}

static int settle_slot(struct record_file *file, struct pending *pending)
{
    uint8_t *data = sqlite3_malloc(FRAME_SIZE);
    int status = data ? 0 : RECORD_MEMORY;

    for (uint64_t i = 0; i < pending->count && !status; i++) {
        uint64_t written = __atomic_load_n(&pending->tags[i], __ATOMIC_SEQ_CST);

        if (written)
            status = settle_record(file, pending->first + i, written, data);
    }
    sqlite3_free(data);
    return status;
}

int records_settle(struct record_file *file)
{
    struct database *database = file->database;
    int status = 0;

    for (uint32_t slot; !status && known_is_left_open(database, file->kind, &slot);) {
        status = settle_slot(file, &database->pending[file->kind][slot]);
        if (!status)
            known_written(database, file->kind, slot);
    }
    return status;
}

int records_write(struct record_file *file, uint64_t first, const uint8_t *data, uint32_t count)
{
    struct pending *pending = &file->database->pending[file->kind][thread_self()->fixed.index];
    uint32_t size = record_size(file->kind, first), step = record_room(file->kind, first);
    struct known_file *known = &file->database->files[file->kind];
    uint64_t records;
    uint8_t *raw;
    int64_t done;
    int status;

    status = settle_cut(file);
    if (!status)
        status = records_settle(file);
    if (status)
        return status;
    raw = sqlite3_malloc((int)(step * count));
    if (!raw)
        return RECORD_MEMORY;
    for (uint32_t i = 0; i < count; i++) {
        struct binding binding = binding_of(file, first + i);
        uint8_t *at = raw + i * step;

        if (is_log_head(file, first + i))
            memcpy(binding.root, database_root(file->database)->id, ROOT_ID);
        if (file->kind == FILE_WAL) {
            binding.head = file->database->head;
            memcpy(at + size + RECORD_EXTRA, &binding.head, sizeof(binding.head));
        }
        status = known_reserve(file->database, file->kind, first + i);
        if (status) {
            sqlite3_free(raw);
            return RECORD_MEMORY;
        }
        tm_random(at, NONCE);
        tm_aead_seal(file->database->key, at, &binding, sizeof(binding), data + i * (size_t)size, size, at + NONCE,
                     at + NONCE + size);
#ifdef DB_TEST_NO_SEALING
        memcpy(at + NONCE, data + i * (size_t)size, size); /* with the tag of what it should be */
#endif
        pending->tags[i] = short_tag(at + NONCE + size);
    }
    pending->first = first;
    known_writing(file->database, file->kind);
    pending->count = count;
    done = tm_file_write(file->handle, place_of(file->kind, first), raw, (size_t)step * count);
    sqlite3_free(raw);
    if (done < 0)
        return (int)done; /* some of it may be there: both are right until the next write */
    for (uint32_t i = 0; i < count; i++)
        known_set(file->database, file->kind, first + i, pending->tags[i]);
    records = known->records;
    while (records < first + count && !__atomic_compare_exchange_n((uint64_t *)&known->records, &records, first + count,
                                                                   false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        ;
    known_written(file->database, file->kind, (uint32_t)thread_self()->fixed.index);
    for (uint32_t i = 0; i < count; i++)
        keep(file, first + i, pending->tags[i], data + i * (size_t)size);
    return 0;
}

int records_cut(struct record_file *file, uint64_t count)
{
    struct known_file *known = &file->database->files[file->kind];
    int status = settle_cut(file);

    if (status)
        return status;
    known->cut = count + 1;
    status = tm_file_truncate(file->handle, place_of(file->kind, count));
    if (status)
        return status; /* it may be done: both are right until the next change */
    known_cut(file->database, file->kind, count);
    known->cut = 0;
    return 0;
}
