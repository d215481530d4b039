/* SPDX-License-Identifier: Apache-2.0 */
#include "head.h"

#include "files.h"
#include "root.h"

struct head {
    uint8_t key[16];
    uint64_t number;
    struct rights rights;
};
#define PLACE 2048u
#define SEALED (sizeof(struct head) + TM_SEAL_OVERHEAD)
_Static_assert(SEALED <= PLACE && 2 * PLACE == HEAD_SIZE, "two heads before the pages");

/*
 * Of all of a database's files; one digit.  1: no rights in the head (what is sealed has another length, so it is not
 * recognised).  2: the log and the root do not tell the head's number.
 */
#ifndef DB_FORMAT
#define DB_FORMAT 3u
#endif
#define DB_FORMAT_KNOWN 2u /* the oldest with a head like this */

static void bind(const char *name, uint32_t format, uint8_t text[80])
{
    static const char label[] = "teemate database ";

    memset(text, 0, 80);
    memcpy(text, label, sizeof(label));
    text[sizeof(label) - 1] = (uint8_t)('0' + format);
    memcpy(text + 24, name, strlen(name));
}

/* In which format is it sealed?  0: in none. */
static uint32_t open_head(const char *name, const uint8_t *sealed, struct head *head)
{
    uint8_t binding[80];

    for (uint32_t format = DB_FORMAT; format >= DB_FORMAT_KNOWN; format--) {
        bind(name, format, binding);
        if (!tm_unseal(binding, sizeof(binding), sealed, SEALED, head))
            return format;
    }
    return 0;
}

static int write(struct record_file *file, uint64_t number, const struct rights *rights)
{
    struct database *database = file->database;
    uint8_t binding[80], sealed[SEALED];
    struct head head = {.number = number, .rights = *rights};
    int64_t done;
    int status;

    memcpy(head.key, database->key, sizeof(head.key));
    bind(database->name, DB_FORMAT, binding);
    status = tm_seal(SGX_KEYPOLICY_MRSIGNER, binding, sizeof(binding), &head, sizeof(head), sealed);
    tm_wipe(&head, sizeof(head));
    if (status)
        return RECORD_MEMORY;
    done = tm_file_write(file->handle, number % 2 * PLACE, sealed, sizeof(sealed));
    return done < 0 ? (int)done : tm_file_sync(file->handle);
}

/* Into the place that nobody reads, then the number: readers have the old rights or the new ones. */
static void adopt(struct database *database, uint64_t number, const struct rights *rights)
{
    database->rights[number % 2] = *rights;
    database->head = number;
}

/* The head that counts, as the file has it; to be wiped. */
static int find(uint32_t handle, const char *name, struct head *best)
{
    static const uint8_t nothing[SEALED];
    uint8_t sealed[SEALED];
    uint32_t found = 0;
    bool made = false;
    struct head head;

    for (uint64_t place = 0; place < 2; place++) {
        uint32_t format;
        int64_t got;

        memset(sealed, 0, sizeof(sealed));
        got = tm_file_read(handle, place * PLACE, sealed, sizeof(sealed));
        if (got < 0)
            return (int)got;
        if (!memcmp(sealed, nothing, sizeof(sealed)))
            continue;
        made = made || !place; /* which is written last when a database is made */
        format = open_head(name, sealed, &head);
        if (!format || head.number % 2 != place)
            continue;
        if (format > found || (format == found && head.number > best->number)) {
            *best = head;
            found = format;
        }
    }
    tm_wipe(&head, sizeof(head));
    if (found)
        return found == DB_FORMAT ? 0 : RECORD_FORMAT;
    return made ? RECORD_TAMPERED : -TM_ENOENT;
}

int head_read(struct record_file *file)
{
    struct database *database = file->database;
    struct head head = {.number = 0};
    int status = find(file->handle, database->name, &head);

    if (!status || status == RECORD_FORMAT) {
        memcpy(database->key, head.key, sizeof(head.key));
        adopt(database, head.number, &head.rights);
    }
    tm_wipe(&head, sizeof(head));
    return status;
}

int head_begin(struct record_file *file, const char *log)
{
    struct rights rights = {.owner = tm_caller().identity.uid};
    int status = tm_file_delete(log);

    if (!status || status == -TM_ENOENT)
        status = tm_file_truncate(file->handle, 0);
    if (status)
        return status;
    cache_drop((uint64_t)file->database);
    database_wipe(file->database); /* what an earlier making that was cut short had written */
    tm_random(file->database->key, sizeof(file->database->key));
    adopt(file->database, 0, &rights);
    return 0;
}

int head_finish(struct record_file *file)
{
    struct rights rights = file->database->rights[0];
    int status = tm_file_sync(file->handle);

    if (!status)
        status = root_write(file);
    if (!status)
        status = write(file, 1, &rights);
    if (!status)
        status = write(file, 0, &rights);
    if (!status)
        adopt(file->database, 1, &rights);
    return status;
}

int head_change(struct record_file *file, const struct rights *rights)
{
    uint64_t number = file->database->head + 1;
    int status = write(file, number, rights);

    if (!status)
        adopt(file->database, number, rights);
    return status;
}

void head_rights(const struct database *database, struct rights *rights)
{
    uint64_t number;

    do {
        number = database->head;
        *rights = database->rights[number % 2];
    } while (database->head != number);
}

bool head_has_room(const struct database *database, uint64_t pages, uint64_t now)
{
    uint64_t number, most;

    do {
        number = database->head;
        most = __atomic_load_n(&database->rights[number % 2].pages_most, __ATOMIC_SEQ_CST);
    } while (database->head != number);
    return !most || pages <= most || pages <= now;
}

enum db_access rights_access(const struct rights *rights)
{
    struct tm_identity identity = tm_caller().identity;
    enum db_access access = DB_ACCESS_NONE;

#ifdef DB_TEST_NO_RIGHTS
    /* Test build: everybody is the owner. */
    return DB_ACCESS_OWNER;
#endif
    if (rights->owner == identity.uid)
        return DB_ACCESS_OWNER;
    for (uint32_t i = 0; i < rights->count && i < DB_RIGHTS_MAX; i++) {
        const struct db_right *right = &rights->list[i];
        uint32_t id = right->grantee == DB_GRANT_UID ? identity.uid : identity.gid;

        if (right->id == id && right->access > access)
            access = right->access;
    }
    return access;
}

enum db_access head_access(const struct database *database)
{
    struct rights rights;

    head_rights(database, &rights);
    return rights_access(&rights);
}

int head_rights_of(const char *name, struct rights *rights)
{
    const struct database *database = database_known(name);
    struct head head = {.number = 0};
    uint32_t handle;
    int status;

    if (database && database->ready) {
        head_rights(database, rights);
        /* Meanwhile it may have been deleted, and be another name's. */
        if (database->ready && database_is(database, name))
            return 0;
    }
    status = tm_file_open(name, TM_FILE_READ_ONLY, &handle);
    if (status)
        return status;
    status = find(handle, name, &head);
    tm_file_close(handle);
    *rights = head.rights;
    tm_wipe(&head, sizeof(head));
    return status;
}

bool head_admits(const char *name, enum db_access access)
{
    struct rights rights;
    int status;

#ifdef DB_TEST_ADMIT_LATE
    /* Test build: rights are looked at when the database is held. */
    return true;
#endif
    status = head_rights_of(name, &rights);
    return (status && status != RECORD_FORMAT) || rights_access(&rights) >= access;
}
