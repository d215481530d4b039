/* SPDX-License-Identifier: Apache-2.0 */
#include "vfs.h"

#include "files.h"
#include "lock.h"
#include "records.h"

#define SETUP_PATIENCE 500u /* rounds of 10 ms that another slot may take to open a database for the first time */
#define SUFFIX "-wal"
#define WRITER 0 /* of the wal-index's locks: SQLite's WAL_WRITE_LOCK */

/*
 * One open file.  What is written to the log is gathered until a transaction's last frame, which says so in
 * its head, or a sync: it is then one request to the host.  SQLite writes head and page of a frame
 * one after the other; `half`: the last frame has its head only.
 */
struct file {
    sqlite3_file base;
    struct record_file records;
    bool open;
    uint8_t *batch; /* BATCH frames */
    uint64_t batch_first; /* record */
    uint32_t batch_count;
    bool half;
    uint64_t last_read; /* record */
};

static struct file *of(sqlite3_file *base)
{
    return (struct file *)base;
}

/* What the host or the records say, for SQLite. */
static int code_of(int status, int otherwise)
{
    struct connection *connection = connection_self();

    switch (status) {
    case RECORD_OK:
        return SQLITE_OK;
    case RECORD_TORN:
    case RECORD_TAMPERED:
        if (connection)
            connection->tampered = true;
        return SQLITE_IOERR_DATA;
    case RECORD_MEMORY:
        return SQLITE_IOERR_NOMEM;
    case -TM_ENOSPC:
    case -TM_EDQUOT:
    case -TM_EFBIG:
        return SQLITE_FULL;
    case -TM_ENOSYS:
    case -TM_ESTALE:
        if (connection)
            connection->no_storage = true;
        return otherwise;
    default:
        return otherwise;
    }
}

/* ---- the log's batch --------------------------------------------------------------- */

static uint8_t *frame_at(const struct file *file, uint32_t index)
{
    return file->batch + index * (size_t)FRAME_SIZE;
}

static int flush(struct file *file)
{
    int status = 0;

    if (!file->batch_count)
        return SQLITE_OK;
    if (file->half) {
        uint8_t *last = frame_at(file, file->batch_count - 1), head[FRAME_HEAD];

        memcpy(head, last, sizeof(head));
        status = record_read(&file->records, file->batch_first + file->batch_count - 1, last);
        if (status == RECORD_END)
            memset(last, 0, FRAME_SIZE);
        memcpy(last, head, sizeof(head));
        status = status == RECORD_END ? 0 : status;
    }
    if (!status)
        status = records_write(&file->records, file->batch_first, file->batch, file->batch_count);
    file->batch_count = 0;
    file->half = false;
    return code_of(status, SQLITE_IOERR_WRITE);
}

/*
 * Nobody writes to the log any more.  What was gathered and not written then is of a transaction that was rolled back,
 * and its place in the log is the next writer's, of whatever slot.
 */
static void forget_batch(void)
{
    struct connection *connection = connection_self();

    if (!connection || !connection->log)
        return;
    connection->log->batch_count = 0;
    connection->log->half = false;
}

static int rewrite(struct file *file, uint64_t record, const void *data, uint32_t length, uint32_t offset)
{
    uint8_t *frame = sqlite3_malloc(FRAME_SIZE);
    int status;

    if (!frame)
        return SQLITE_IOERR_NOMEM;
    status = record_read(&file->records, record, frame);
    memcpy(frame + offset, data, length);
    if (!status)
        status = records_write(&file->records, record, frame, 1);
    sqlite3_free(frame);
    return code_of(status == RECORD_END ? -TM_EIO : status, SQLITE_IOERR_WRITE);
}

static int write_frame(struct file *file, uint64_t record, const void *data, uint32_t length, uint32_t offset)
{
    bool next = file->batch_count && record == file->batch_first + file->batch_count;
    uint64_t place = record - file->batch_first;
    uint8_t *frame;
    int code;

    /* What was written before in this transaction is written again: to the batch, or where it is. */
    if (file->batch_count && place < file->batch_count && !(file->half && place == file->batch_count - 1)) {
        memcpy(frame_at(file, (uint32_t)place) + offset, data, length);
        return SQLITE_OK;
    }
    if (!offset && length == FRAME_HEAD && record != file->last_read) {
        if (file->half || (file->batch_count && (!next || file->batch_count == BATCH))) {
            code = flush(file);
            if (code)
                return code;
        }
        if (!file->batch && !(file->batch = sqlite3_malloc(BATCH * FRAME_SIZE)))
            return SQLITE_IOERR_NOMEM;
        if (!file->batch_count)
            file->batch_first = record;
        memcpy(frame_at(file, file->batch_count++), data, length);
        file->half = true;
        return SQLITE_OK;
    }
    if (file->half && place == file->batch_count - 1 && offset == FRAME_HEAD && length == PAGE_SIZE) {
        uint32_t last;

        frame = frame_at(file, file->batch_count - 1);
        memcpy(frame + offset, data, length);
        file->half = false;
        memcpy(&last, frame + 4, sizeof(last));
        return last ? flush(file) : SQLITE_OK; /* pages of the database after this commit; 0: more frames follow */
    }
    code = flush(file);
    return code ? code : rewrite(file, record, data, length, offset);
}

/* ---- reading and writing -------------------------------------------------------------- */

static int file_close(sqlite3_file *base)
{
    struct file *file = of(base);
    int code = flush(file);

    sqlite3_free(file->batch);
    if (file->records.kind == FILE_MAIN)
        database_drop(file->records.database, ~0ull);
    else if (connection_self())
        connection_self()->log = NULL;
    tm_file_close(file->records.handle);
    base->pMethods = NULL;
    return code;
}

/* Record, offset in it: of a place in the file as SQLite sees it. */
static uint64_t locate(const struct file *file, uint64_t offset, uint32_t *inside)
{
    if (file->records.kind == FILE_MAIN) {
        *inside = (uint32_t)(offset % PAGE_SIZE);
        return offset / PAGE_SIZE;
    }
    if (offset < LOG_HEAD) {
        *inside = (uint32_t)offset;
        return 0;
    }
    *inside = (uint32_t)((offset - LOG_HEAD) % FRAME_SIZE);
    return 1 + (offset - LOG_HEAD) / FRAME_SIZE;
}

static int file_read(sqlite3_file *base, void *data, int length, sqlite3_int64 offset)
{
    struct file *file = of(base);
    uint8_t *room, *out = data;
    uint32_t inside;
    uint64_t record = locate(file, (uint64_t)offset, &inside);
    uint32_t size = record_size(file->records.kind, record);
    int status;

    if (length < 0 || inside + (uint32_t)length > size)
        return SQLITE_IOERR_READ;
    if (file->batch_count && record - file->batch_first < file->batch_count) {
        status = flush(file);
        if (status)
            return status;
    }
    room = (uint32_t)length == size ? out : sqlite3_malloc((int)size);
    if (!room)
        return SQLITE_IOERR_NOMEM;
    status = record_read(&file->records, record, room);
    /* Before SQLite looks into the log it reads of the first page what is never right without the log. */
    if (status == RECORD_TORN && !record && (uint32_t)length < size &&
        file->records.database->files[FILE_WAL].records > 1) {
        memset(room, 0, size);
        status = 0;
    }
    if (!status) {
        if (room != out)
            memcpy(out, room + inside, (size_t)length);
        file->last_read = (uint32_t)length == size ? record : 0;
    } else {
        memset(out, 0, (size_t)length);
    }
    if (room != out)
        sqlite3_free(room);
    return status == RECORD_END ? SQLITE_IOERR_SHORT_READ : code_of(status, SQLITE_IOERR_READ);
}

static int file_write(sqlite3_file *base, const void *data, int length, sqlite3_int64 offset)
{
    struct file *file = of(base);
    uint32_t inside;
    uint64_t record = locate(file, (uint64_t)offset, &inside);
    uint32_t size = record_size(file->records.kind, record);
    int code;

    if (length < 0 || inside + (uint32_t)length > size)
        return SQLITE_IOERR_WRITE;
    if ((uint32_t)length == size) {
        code = flush(file);
        return code ? code : code_of(records_write(&file->records, record, data, 1), SQLITE_IOERR_WRITE);
    }
    if (file->records.kind == FILE_MAIN || !record)
        return SQLITE_IOERR_WRITE;
    code = write_frame(file, record, data, (uint32_t)length, inside);
    file->last_read = 0;
    return code;
}

static int file_truncate(sqlite3_file *base, sqlite3_int64 size)
{
    struct file *file = of(base);
    uint32_t inside;
    uint64_t count = locate(file, (uint64_t)size, &inside) + (size && file->records.kind == FILE_WAL && size < LOG_HEAD);
    int code = flush(file);

    return code ? code : code_of(records_cut(&file->records, size ? count : 0), SQLITE_IOERR_TRUNCATE);
}

static int file_sync(sqlite3_file *base, int flags)
{
    struct file *file = of(base);
    int code = flush(file);

    (void)flags;
#ifdef DB_TEST_NO_SYNC
    return code;
#endif
    return code ? code : code_of(tm_file_sync(file->records.handle), SQLITE_IOERR_FSYNC);
}

static int file_size(sqlite3_file *base, sqlite3_int64 *size)
{
    struct file *file = of(base);
    int64_t known = records_known(&file->records);
    uint64_t records = (uint64_t)known;

    if (known < 0)
        return code_of((int)known, SQLITE_IOERR_FSTAT);
    if (file->batch_count && records < file->batch_first + file->batch_count)
        records = file->batch_first + file->batch_count;
    if (file->records.kind == FILE_MAIN)
        *size = (sqlite3_int64)(records * PAGE_SIZE);
    else
        *size = records ? (sqlite3_int64)(LOG_HEAD + (records - 1) * FRAME_SIZE) : 0;
    return SQLITE_OK;
}

/* ---- locks ------------------------------------------------------------------------------ */

static int file_lock(sqlite3_file *base, int level)
{
    struct database *database = of(base)->records.database;
    uint64_t writers = HOLDS_FILE_RESERVED | HOLDS_FILE_PENDING | HOLDS_FILE_EXCLUSIVE;

    switch (level) {
    case SQLITE_LOCK_SHARED:
        if (database_holds(database) & HOLDS_FILE)
            return SQLITE_OK;
        return database_hold(database, HOLDS_FILE_SHARED, HOLDS_FILE_PENDING | HOLDS_FILE_EXCLUSIVE) ? SQLITE_OK
                                                                                                    : SQLITE_BUSY;
    case SQLITE_LOCK_RESERVED:
        return database_hold(database, HOLDS_FILE_RESERVED, writers) ? SQLITE_OK : SQLITE_BUSY;
    case SQLITE_LOCK_EXCLUSIVE:
        if (!database_hold(database, HOLDS_FILE_PENDING, writers))
            return SQLITE_BUSY;
        return database_hold(database, HOLDS_FILE_EXCLUSIVE, HOLDS_FILE) ? SQLITE_OK : SQLITE_BUSY;
    default:
        return SQLITE_OK;
    }
}

static int file_unlock(sqlite3_file *base, int level)
{
    struct database *database = of(base)->records.database;

    database_drop(database, level == SQLITE_LOCK_SHARED ? HOLDS_FILE & ~HOLDS_FILE_SHARED : HOLDS_FILE);
    return SQLITE_OK;
}

static int file_reserved(sqlite3_file *base, int *held)
{
    struct database *database = of(base)->records.database;
    uint64_t writers = HOLDS_FILE_RESERVED | HOLDS_FILE_PENDING | HOLDS_FILE_EXCLUSIVE;

    *held = (database_holds(database) & writers) || database_held(database, writers);
    return SQLITE_OK;
}

static int shm_map(sqlite3_file *base, int index, int size, int make, void volatile **region)
{
    void *place;
    int status;

    if (size != REGION_SIZE || index < 0)
        return SQLITE_IOERR_SHMSIZE;
    status = database_region(of(base)->records.database, (uint32_t)index, make, &place);
    *region = place;
    return status ? SQLITE_NOMEM : SQLITE_OK;
}

static int shm_lock(sqlite3_file *base, int first, int count, int flags)
{
    struct database *database = of(base)->records.database;
    uint64_t shared = HOLDS_SHARED(first, count), exclusive = HOLDS_EXCLUSIVE(first, count);

    if (flags & SQLITE_SHM_UNLOCK) {
        if (!(flags & SQLITE_SHM_SHARED) && first == WRITER)
            forget_batch();
        database_drop(database, flags & SQLITE_SHM_SHARED ? shared : exclusive);
        return SQLITE_OK;
    }
    if (flags & SQLITE_SHM_SHARED)
        return database_hold(database, shared, exclusive) ? SQLITE_OK : SQLITE_BUSY;
    return database_hold(database, exclusive, shared | exclusive) ? SQLITE_OK : SQLITE_BUSY;
}

static void shm_barrier(sqlite3_file *base)
{
    (void)base;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static int shm_unmap(sqlite3_file *base, int remove)
{
    (void)remove; /* the log and its index outlive all connections */
    database_drop(of(base)->records.database, HOLDS_SHARED(0, 16));
    return SQLITE_OK;
}

/* ---- the rest ------------------------------------------------------------------------------ */

/* What is fixed: the log and its index are shared by all slots, and records have the size of pages. */
static int pragma(char **argument)
{
    if (!sqlite3_stricmp(argument[1], "journal_mode")) {
        argument[0] = sqlite3_mprintf("wal");
        return SQLITE_OK;
    }
    if (!sqlite3_stricmp(argument[1], "locking_mode")) {
        argument[0] = sqlite3_mprintf("normal");
        return SQLITE_OK;
    }
    /* The least that "a commit that returned survives" needs, and what log_goes_on() relies on (records.c). */
    if (argument[2] && !sqlite3_stricmp(argument[1], "synchronous"))
        return SQLITE_OK;
    return argument[2] && !sqlite3_stricmp(argument[1], "page_size") ? SQLITE_OK : SQLITE_NOTFOUND;
}

static int file_control(sqlite3_file *base, int op, void *argument)
{
    (void)base;
    switch (op) {
    case SQLITE_FCNTL_PERSIST_WAL:
        *(int *)argument = 1;
        return SQLITE_OK;
    case SQLITE_FCNTL_PRAGMA:
        return pragma(argument);
    default:
        return SQLITE_NOTFOUND;
    }
}

static int sector_size(sqlite3_file *base)
{
    (void)base;
    return PAGE_SIZE;
}

/* A record of the log that is torn is not right, and was not committed; it has nothing of other frames. */
static int characteristics(sqlite3_file *base)
{
    (void)base;
    return SQLITE_IOCAP_POWERSAFE_OVERWRITE;
}

static const sqlite3_io_methods methods = {
    .iVersion = 2,
    .xClose = file_close,
    .xRead = file_read,
    .xWrite = file_write,
    .xTruncate = file_truncate,
    .xSync = file_sync,
    .xFileSize = file_size,
    .xLock = file_lock,
    .xUnlock = file_unlock,
    .xCheckReservedLock = file_reserved,
    .xFileControl = file_control,
    .xSectorSize = sector_size,
    .xDeviceCharacteristics = characteristics,
    .xShmMap = shm_map,
    .xShmLock = shm_lock,
    .xShmBarrier = shm_barrier,
    .xShmUnmap = shm_unmap,
};

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
    return code_of(status, SQLITE_CANTOPEN);
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
    struct file *file = of(base);
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
    code = code_of(status, SQLITE_CANTOPEN);
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
    base->pMethods = &methods;
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
    log_name(name, log);
    status = tm_file_delete(name);
    if (!status)
        status = tm_file_delete(log);
    database_drop(database, HOLDS_SETUP);
    return status == 0 || status == -TM_ENOENT ? SQLITE_OK : code_of(status, SQLITE_IOERR_DELETE);
}
