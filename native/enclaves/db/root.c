/* SPDX-License-Identifier: Apache-2.0 */
#include "root.h"

#include "file.h"
#include "files.h"

#define NONCE 12u
#define TAG 16u
#define HEAD_ROOM 4096u
#define CHUNK_ROOM (TAGS_IN_CHUNK * sizeof(uint64_t) + NONCE + TAG)
/* SQLite's wal-index (walformat.html): frames that there are, and those that the checkpoint copies or has copied. */
#define INDEX_FRAMES 4
#define INDEX_COPIED 32

struct root_head {
    uint64_t number;
    struct root root;
};
#define SEALED (NONCE + sizeof(struct root_head) + TAG)

struct root_binding {
    uint8_t label[8];
    uint8_t id[ROOT_ID];
    uint64_t place; /* of a head; a chunk's number */
};

static uint64_t chunk_place(uint64_t number, uint64_t chunk)
{
    return 2 * HEAD_ROOM + (2 * chunk + number % 2) * CHUNK_ROOM;
}

static uint64_t chunks_of(uint64_t pages)
{
    return (pages + TAGS_IN_CHUNK - 1) / TAGS_IN_CHUNK;
}

static uint32_t chunk_size(uint64_t pages, uint64_t chunk)
{
    uint64_t left = pages - chunk * TAGS_IN_CHUNK;

    return (uint32_t)((left < TAGS_IN_CHUNK ? left : TAGS_IN_CHUNK) * sizeof(uint64_t));
}

static struct root_binding chunk_binding(const struct root *root, uint64_t chunk)
{
    struct root_binding binding = {.label = "tmdb tag", .place = chunk};

    memcpy(binding.id, root->id, ROOT_ID);
    return binding;
}

static struct root_binding head_binding(uint64_t place)
{
    return (struct root_binding){.label = "tmdbroot", .place = place};
}

static void root_name(const char *name, char root[DB_NAME_MAX + 8])
{
    size_t length = strlen(name);

    memcpy(root, name, length);
    memcpy(root + length, ROOT_SUFFIX, sizeof(ROOT_SUFFIX));
}

static int open_file(const struct database *database, unsigned flags, uint32_t *handle)
{
    char name[DB_NAME_MAX + 8];

    root_name(database->name, name);
    return tm_file_open(name, flags, handle);
}

int root_delete(const char *name)
{
    char root[DB_NAME_MAX + 8];

    root_name(name, root);
    return tm_file_delete(root);
}

/* ---- writing ------------------------------------------------------------------------ */

static int write_sealed(const struct database *database, uint32_t handle, uint64_t place,
                        const struct root_binding *binding, const void *data, uint32_t size, uint8_t *room)
{
    int64_t done;

    tm_random(room, NONCE);
    tm_aead_seal(database->key, room, binding, sizeof(*binding), data, size, room + NONCE, room + NONCE + size);
    done = tm_file_write(handle, place, room, size + NONCE + TAG);
    return done < 0 ? (int)done : 0;
}

static int write_chunks(struct database *database, uint32_t handle, const struct root_head *head)
{
    int largest = (int)chunk_size(head->root.pages, 0);
    uint64_t *tags = sqlite3_malloc(largest);
    uint8_t *room = sqlite3_malloc(largest + (int)(NONCE + TAG));
    int status = tags && room ? 0 : RECORD_MEMORY;

    for (uint64_t chunk = 0; !status && chunk < chunks_of(head->root.pages); chunk++) {
        uint32_t size = chunk_size(head->root.pages, chunk);
        struct root_binding binding = chunk_binding(&head->root, chunk);

        for (uint32_t i = 0; i < size / sizeof(uint64_t); i++) {
            uint64_t tag = known_tag(database, FILE_MAIN, chunk * TAGS_IN_CHUNK + i);

            tags[i] = tag ? tag : KNOWN_NOTHING; /* it was never written */
        }
        status = write_sealed(database, handle, chunk_place(head->number, chunk), &binding, tags, size, room);
    }
    sqlite3_free(tags);
    sqlite3_free(room);
    return status;
}

/* Into the place that nobody reads, then the number: whoever dies leaves the old one or the new one. */
static void adopt(struct database *database, const struct root_head *head)
{
    database->roots[head->number % 2] = head->root;
    database->root = head->number;
}

static int write_root(struct record_file *file, const struct record_file *log, uint64_t frames)
{
    struct database *database = file->database;
    struct root_head head = {.number = database->root + 1};
    struct root_binding binding = head_binding(head.number % 2);
    int64_t pages = records_known(file);
    uint8_t room[SEALED];
    uint32_t handle;
    int status = pages < 0 ? (int)pages : log ? record_log_root(log, head.root.base, &head.root.log) : 0;

    if (status)
        return status;
    head.root.pages = (uint64_t)pages;
    head.root.head = database->head;
    tm_random(head.root.id, ROOT_ID);
    head.root.frames = frames;
    if (log && frames)
        status = record_frame_tag(log, frames, &head.root.last);
    if (!status)
        status = open_file(database, TM_FILE_CREATE, &handle);
    if (status)
        return status;
    status = write_chunks(database, handle, &head);
    if (!status)
        status = write_sealed(database, handle, head.number % 2 * HEAD_ROOM, &binding, &head, sizeof(head), room);
#ifndef DB_TEST_NO_SYNC
    if (!status)
        status = tm_file_sync(handle);
#endif
    tm_file_close(handle);
    if (!status)
        adopt(database, &head);
    return status;
}

int root_write(struct record_file *file)
{
    return write_root(file, NULL, 0);
}

int root_after_checkpoint(struct record_file *file)
{
    const volatile uint32_t *index = file->database->regions[0];
    const struct file *log = connection_self() ? connection_self()->log : NULL;

    return log && index ? write_root(file, &log->records, index[INDEX_COPIED]) : RECORD_TAMPERED;
}

/* ---- reading -------------------------------------------------------------------------- */

/* 0; RECORD_TAMPERED when it is not what was written, or not whole; a negative tm_errno. */
static int read_sealed(const struct database *database, uint32_t handle, uint64_t place,
                       const struct root_binding *binding, void *data, uint32_t size, uint8_t *room)
{
    int64_t got = tm_file_read(handle, place, room, size + NONCE + TAG);

    if (got < 0)
        return (int)got;
    if (got < size + NONCE + TAG || tm_aead_open(database->key, room, binding, sizeof(*binding), room + NONCE, size,
                                                 data, room + NONCE + size))
        return RECORD_TAMPERED;
    return 0;
}

static int read_chunks(struct database *database, uint32_t handle, const struct root_head *head)
{
    int largest = (int)chunk_size(head->root.pages, 0);
    uint64_t *tags = sqlite3_malloc(largest);
    uint8_t *room = sqlite3_malloc(largest + (int)(NONCE + TAG));
    int status = tags && room ? 0 : RECORD_MEMORY;

    for (uint64_t chunk = 0; !status && chunk < chunks_of(head->root.pages); chunk++) {
        uint32_t size = chunk_size(head->root.pages, chunk);
        struct root_binding binding = chunk_binding(&head->root, chunk);

        status = read_sealed(database, handle, chunk_place(head->number, chunk), &binding, tags, size, room);
        if (!status && known_reserve(database, FILE_MAIN, chunk * TAGS_IN_CHUNK))
            status = RECORD_MEMORY;
        for (uint32_t i = 0; !status && i < size / sizeof(uint64_t); i++)
            known_set(database, FILE_MAIN, chunk * TAGS_IN_CHUNK + i, tags[i]);
    }
    sqlite3_free(tags);
    sqlite3_free(room);
    return status;
}

static int find_root(struct database *database, uint32_t handle)
{
    struct root_head heads[2];
    int status[2];

    for (uint64_t place = 0; place < 2; place++) {
        struct root_binding binding = head_binding(place);
        uint8_t room[SEALED];

        status[place] = read_sealed(database, handle, place * HEAD_ROOM, &binding, &heads[place], sizeof(*heads), room);
        if (!status[place] && heads[place].number % 2 != place)
            status[place] = RECORD_TAMPERED;
        if (status[place] && status[place] != RECORD_TAMPERED)
            return status[place];
    }
    /* The newer one, or when power was cut while that was written, the one before. */
    for (uint32_t tries = 0; tries < 2; tries++) {
        uint32_t place = status[1] || (!status[0] && heads[0].number > heads[1].number) ? 0 : 1;

        if (status[place])
            break;
        status[place] = read_chunks(database, handle, &heads[place]);
        if (!status[place])
            adopt(database, &heads[place]);
        if (status[place] != RECORD_TAMPERED)
            return status[place];
    }
    return RECORD_TAMPERED;
}

int root_read(struct record_file *file, struct record_file *log)
{
    struct database *database = file->database;
    const struct root *root;
    uint8_t bound[ROOT_ID];
    uint64_t tag;
    uint32_t handle;
    int status = open_file(database, TM_FILE_READ_ONLY, &handle);

    if (status)
        return status == -TM_ENOENT ? RECORD_TAMPERED : status;
    status = find_root(database, handle);
    tm_file_close(handle);
    if (status)
        return status;
    root = database_root(database);
#ifndef DB_TEST_NO_FRESHNESS
    if (root->head > database->head)
        return RECORD_TAMPERED; /* the host has brought back an older head, and with it older rights */
#endif
    database->files[FILE_MAIN].records = root->pages;
    database->frames_needed = 0;
    /* A log that is not right is judged when it is read. */
    if (log && !record_log_root(log, bound, &tag) && !memcmp(bound, root->base, ROOT_ID)) {
        if (tag != root->log)
            return RECORD_TAMPERED;
        database->frames_needed = root->frames;
        if (root->frames && known_reserve(database, FILE_WAL, root->frames))
            return RECORD_MEMORY;
        if (root->frames)
            known_set(database, FILE_WAL, root->frames, root->last);
        if (database->files[FILE_WAL].records < 1 + root->frames)
            database->files[FILE_WAL].records = 1 + root->frames;
    }
    return 0;
}

bool root_has_log(struct database *database)
{
    const volatile uint32_t *index = database->regions[0];

#ifdef DB_TEST_NO_FRESHNESS
    return true;
#endif
    if (database->frames_needed && (!index || index[INDEX_FRAMES] < database->frames_needed))
        return false;
    database->frames_needed = 0;
    return true;
}
