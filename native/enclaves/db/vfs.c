/* SPDX-License-Identifier: Apache-2.0 */
#include "vfs.h"

#include "file.h"
#include "files.h"
#include "lock.h"

#define SETUP_PATIENCE 500u /* rounds of 10 ms that another slot may take to open a database for the first time */
#define SUFFIX "-wal"

static int sleep(sqlite3_vfs *vfs, int microseconds)
{
    const uint32_t *arena = (const void *)TM_ARENA(enclave_base(), header()->size);

    (void)vfs;
    if (ocall_possible())
        ocall_wait(TM_OCALL_WAIT, TM_ARENA_WORDS - 1, __atomic_load_n(&arena[TM_ARENA_WORDS - 1], __ATOMIC_RELAXED),
                   (uint64_t)microseconds * 1000);
    return microseconds;
}

static void log_name(const char *name, char log[DB_NAME_MAX + 8])
{
    size_t length = strlen(name);

    memcpy(log, name, length);
    memcpy(log + length, SUFFIX, sizeof(SUFFIX));
}

/* The first connection of this life: key, sizes.  One slot at a time. */
static int set_up(struct file *file, bool create)
{
    struct database *database = file->records.database;
    struct record_file log = {database, FILE_WAL, 0};
    char name[DB_NAME_MAX + 8];
    int64_t count = 0;
    int status;

    for (uint32_t rounds = 0; !database_hold(database, HOLDS_SETUP, HOLDS_SETUP); rounds++) {
        if (rounds == SETUP_PATIENCE)
            return SQLITE_BUSY;
        sleep(NULL, 10000);
    }
    status = 0;
    if (!database->ready) {
        log_name(database->name, name);
        status = record_open_database(&file->records, name, create);
        if (!status) {
            status = tm_file_open(name, TM_FILE_READ_ONLY, &log.handle);
            if (!status) {
                count = records_counted(&log);
                tm_file_close(log.handle);
            }
            status = status == -TM_ENOENT ? 0 : count < 0 ? (int)count : status;
        }
        if (!status) {
            database->files[FILE_WAL].records = (uint64_t)count;
            database->ready = 1;
        }
    }
    database_drop(database, HOLDS_SETUP);
    return file_code(status, SQLITE_CANTOPEN);
}

/*
 * The database of that name, held open.  Whoever sets it up, deletes it or gives it another name has to be done: and from
 * here on nobody begins to.
 */
static int come_in(const char *name, struct database **result)
{
    for (uint32_t rounds = 0; rounds < SETUP_PATIENCE; rounds++) {
        struct database *database;

        if (database_find(name, &database))
            return SQLITE_NOMEM;
        /* A slot's locks are its own whatever connection took them: one database is open in it once. */
        if (database_holds(database) & HOLDS_OPEN)
            return SQLITE_CANTOPEN;
        database_hold(database, HOLDS_OPEN, 0);
        for (; database_held(database, HOLDS_SETUP) && rounds < SETUP_PATIENCE; rounds++)
            sleep(NULL, 10000);
        if (rounds < SETUP_PATIENCE && database_is(database, name)) {
            *result = database;
            return SQLITE_OK;
        }
        database_drop(database, ~0ull);
    }
    return SQLITE_BUSY;
}

static int vfs_open(sqlite3_vfs *vfs, sqlite3_filename name, sqlite3_file *base, int flags, int *out)
{
    struct file *file = file_of(base);
    bool main = flags & SQLITE_OPEN_MAIN_DB, create = flags & SQLITE_OPEN_CREATE;
    struct database *database;
    char plain[DB_NAME_MAX + 8] = {0};
    size_t length;
    int status, code;

    (void)vfs;
    memset(file, 0, sizeof(*file));
    if (!name || !(flags & (SQLITE_OPEN_MAIN_DB | SQLITE_OPEN_WAL)))
        return SQLITE_CANTOPEN;
    length = strlen(name) - (main ? 0 : sizeof(SUFFIX) - 1);
    if (length > DB_NAME_MAX)
        return SQLITE_CANTOPEN;
    memcpy(plain, name, length);
    code = main ? come_in(plain, &database) : database_find(plain, &database) ? SQLITE_NOMEM : SQLITE_OK;
    if (code)
        return code;
    file->records = (struct record_file){database, main ? FILE_MAIN : FILE_WAL, 0};
    /* A file that was there is not made again: it was taken away. */
    if (main && database->ready)
        create = false;
    status = tm_file_open(name, flags & SQLITE_OPEN_READONLY ? TM_FILE_READ_ONLY : create ? TM_FILE_CREATE : 0,
                          &file->records.handle);
    if (status == -TM_ENOENT && database->ready && main)
        status = RECORD_TAMPERED;
    code = file_code(status, SQLITE_CANTOPEN);
    if (!code && main && !database->ready) {
        code = set_up(file, create);
        if (code)
            tm_file_close(file->records.handle);
    }
    if (code) {
        if (main)
            database_drop(database, ~0ull);
        return code;
    }
    if (!main && connection_self())
        connection_self()->log = file;
    base->pMethods = &file_methods;
    if (out)
        *out = flags;
    return SQLITE_OK;
}

static int vfs_delete(sqlite3_vfs *vfs, const char *name, int sync)
{
    (void)vfs;
    (void)name;
    (void)sync;
    return SQLITE_IOERR_DELETE; /* SQLite deletes journals, and a log; ours stay */
}

/* Is there a log?  There never is a rollback journal. */
static int vfs_access(sqlite3_vfs *vfs, const char *name, int flags, int *out)
{
    struct database *database;
    char plain[DB_NAME_MAX + 8] = {0};
    size_t length = strlen(name), suffix = sizeof(SUFFIX) - 1;

    (void)vfs;
    (void)flags;
    *out = 0;
    if (length <= suffix || length > DB_NAME_MAX + suffix || strcmp(name + length - suffix, SUFFIX))
        return SQLITE_OK;
    memcpy(plain, name, length - suffix);
    if (database_find(plain, &database))
        return SQLITE_NOMEM;
    *out = database->files[FILE_WAL].records != 0;
    return SQLITE_OK;
}

static int full_name(sqlite3_vfs *vfs, const char *name, int room, char *out)
{
    size_t length = strlen(name);

    (void)vfs;
    if (length >= (size_t)room)
        return SQLITE_CANTOPEN;
    memcpy(out, name, length + 1);
    return SQLITE_OK;
}

static int randomness(sqlite3_vfs *vfs, int length, char *out)
{
    (void)vfs;
    tm_random(out, (size_t)length);
    return length;
}

/* Milliseconds since noon in Greenwich on 24 November 4714 B.C. */
static int now(sqlite3_vfs *vfs, sqlite3_int64 *out)
{
    (void)vfs;
    *out = 210866760000000ll + (sqlite3_int64)(tm_time() / 1000000);
    return SQLITE_OK;
}

static int last_error(sqlite3_vfs *vfs, int room, char *out)
{
    (void)vfs;
    if (room)
        *out = 0;
    return 0;
}

static sqlite3_vfs vfs = {
    .iVersion = 2,
    .szOsFile = sizeof(struct file),
    .mxPathname = DB_NAME_MAX + 16,
    .zName = "teemate",
    .xOpen = vfs_open,
    .xDelete = vfs_delete,
    .xAccess = vfs_access,
    .xFullPathname = full_name,
    .xRandomness = randomness,
    .xSleep = sleep,
    .xGetLastError = last_error,
    .xCurrentTimeInt64 = now,
};

int sqlite3_os_init(void)
{
    return sqlite3_vfs_register(&vfs, 1);
}

int sqlite3_os_end(void)
{
    return SQLITE_OK;
}

/* What is known goes first: a death in between leaves a database that is opened as one of an earlier life. */
int vfs_delete_database(const char *name)
{
    struct database *database;
    char log[DB_NAME_MAX + 8];
    int status;

    if (database_find(name, &database))
        return SQLITE_NOMEM;
    if (database_holds(database) & HOLDS_OPEN || !database_hold(database, HOLDS_SETUP, HOLDS_SETUP | HOLDS_OPEN))
        return SQLITE_BUSY;
    if (!database_is(database, name)) {
        database_drop(database, HOLDS_SETUP);
        return SQLITE_BUSY; /* somebody has deleted it just now, and the struct is another's */
    }
    database_wipe(database);
    cache_drop((uint64_t)database);
    log_name(name, log);
    status = tm_file_delete(name);
    if (!status)
        status = tm_file_delete(log);
    database_drop(database, HOLDS_SETUP);
    return status == 0 || status == -TM_ENOENT ? SQLITE_OK : file_code(status, SQLITE_IOERR_DELETE);
}
