/* SPDX-License-Identifier: Apache-2.0 */
#include "vfs.h"

#include "file.h"
#include "files.h"
#include "head.h"
#include "lock.h"
#include "root.h"

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

/* An empty database, its maker's, in WAL mode, as SQLite would make it; it never has a rollback journal. */
static int make(struct record_file *file, const char *log)
{
    static const uint8_t head[] = {
        'S', 'Q', 'L', 'i', 't', 'e', ' ', 'f', 'o', 'r', 'm', 'a', 't', ' ', '3', 0,
        0x10, 0, 2, 2, 0, 64, 32, 32, /* page size, WAL, nothing reserved, fractions */
        0, 0, 0, 1, 0, 0, 0, 1,       /* change counter, pages */
    };
    uint8_t *page = sqlite3_malloc(PAGE_SIZE);
    int status = page ? head_begin(file, log) : RECORD_MEMORY;

    if (!status) {
        memset(page, 0, PAGE_SIZE);
        memcpy(page, head, sizeof(head));
        page[95] = 1; /* version-valid-for: the change counter */
        page[96] = (uint8_t)(SQLITE_VERSION_NUMBER >> 24);
        page[97] = (uint8_t)(SQLITE_VERSION_NUMBER >> 16);
        page[98] = (uint8_t)(SQLITE_VERSION_NUMBER >> 8);
        page[99] = (uint8_t)SQLITE_VERSION_NUMBER;
        page[100] = 13; /* a leaf of a table, with no cells */
        page[105] = 0x10;
        status = records_write(file, 0, page, 1);
    }
    if (!status)
        status = head_finish(file);
    sqlite3_free(page);
    return status;
}

/* The first connection of this life: key, rights, sizes. */
static int learn(struct record_file *file, bool create)
{
    struct database *database = file->database;
    struct record_file log = {.database = database, .kind = FILE_WAL};
    char name[DB_NAME_MAX + 8];
    int64_t frames = 0;
    bool logged;
    int status = head_read(file);

    log_name(database->name, name);
    if (status == -TM_ENOENT && create)
        status = make(file, name);
    if (status)
        return status;
    status = tm_file_open(name, TM_FILE_READ_ONLY, &log.handle);
    logged = !status;
    if (logged)
        frames = records_counted(&log);
    if (frames < 0 || status == -TM_ENOENT)
        status = (int)frames;
    if (!status) {
        database->files[FILE_WAL].records = (uint64_t)frames;
        status = root_read(file, logged ? &log : NULL);
    }
    if (logged)
        tm_file_close(log.handle);
    return status;
}

/* One slot at a time. */
static int set_up(struct file *file, bool create)
{
    struct database *database = file->records.database;
    int status = 0;

    for (uint32_t rounds = 0; !database_hold(database, HOLDS_SETUP, HOLDS_SETUP); rounds++) {
        if (rounds == SETUP_PATIENCE)
            return SQLITE_BUSY;
        sleep(NULL, 10000);
    }
    if (!database->ready) {
        status = learn(&file->records, create);
        if (!status)
            database->ready = 1;
    }
    database_drop(database, HOLDS_SETUP);
    return file_code(status, SQLITE_CANTOPEN);
}

/* Its key is known: it was opened in this life of the enclave, or the running slot is just making it. */
static bool is_set_up(const struct database *database)
{
    return database->ready || database_holds(database) & HOLDS_SETUP;
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

/*
 * May the caller have it?  Who may read only gets a file that the SDK does not write to, and SQLite is told that it is
 * one, whatever the caller has asked for.
 */
static int admit(struct file *file, const char *name, int *flags)
{
    struct connection *connection = connection_self();
    uint64_t head = file->records.database->head; /* first: rights that change meanwhile are looked at with the next call */
    enum db_access access = head_access(file->records.database);
    int status = 0;

    if (access == DB_ACCESS_NONE)
        return file_code(RECORD_DENIED, SQLITE_CANTOPEN);
    connection->granted = access;
    connection->database = file->records.database;
    connection->head = head;
    if (access == DB_ACCESS_READ && *flags & SQLITE_OPEN_READWRITE) {
        *flags = (*flags & ~(SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE)) | SQLITE_OPEN_READONLY;
        tm_file_close(file->records.handle);
        status = tm_file_open(name, TM_FILE_READ_ONLY, &file->records.handle);
    }
    file->readonly = *flags & SQLITE_OPEN_READONLY;
    return file_code(status, SQLITE_CANTOPEN);
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
    if (main && !head_admits(plain, DB_ACCESS_READ))
        return file_code(RECORD_DENIED, SQLITE_CANTOPEN);
    code = main ? come_in(plain, &database) : database_find(plain, &database) ? SQLITE_NOMEM : SQLITE_OK;
    if (code)
        return code;
    file->records = (struct record_file){.database = database, .kind = main ? FILE_MAIN : FILE_WAL};
    /* A file that was there is not made again: it was taken away. */
    if (main && is_set_up(database))
        create = false;
    status = tm_file_open(name, flags & SQLITE_OPEN_READONLY ? TM_FILE_READ_ONLY : create ? TM_FILE_CREATE : 0,
                          &file->records.handle);
    if (status == -TM_ENOENT && database->ready && main)
        status = RECORD_TAMPERED;
    code = file_code(status, SQLITE_CANTOPEN);
    if (!code && main) {
        if (!is_set_up(database))
            code = set_up(file, create);
        if (!code)
            code = admit(file, name, &flags);
        if (code)
            tm_file_close(file->records.handle);
    }
    if (code) {
        if (main)
            database_drop(database, ~HOLDS_SETUP);
        return code;
    }
    if (!main) {
        file->readonly = file_of(sqlite3_database_file_object(name))->readonly;
        /* Of what only reads the client gets a descriptor that only reads, where it gets one. */
        if (file->readonly && tm_file_lends()) {
            tm_file_close(file->records.handle);
            status = tm_file_open(name, TM_FILE_READ_ONLY, &file->records.handle);
            if (status)
                return file_code(status, SQLITE_CANTOPEN);
        }
        connection_self()->log = file;
    }
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

void vfs_log_name(const char *name, char log[DB_NAME_MAX + 8])
{
    log_name(name, log);
}
