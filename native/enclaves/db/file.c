/* SPDX-License-Identifier: Apache-2.0 */
#include "file.h"

#include "files.h"

/* Of the wal-index's locks: SQLite's WAL_WRITE_LOCK, and WAL_CKPT_LOCK. */
#define WRITER 0
#define CHECKPOINTER 1

int file_code(int status, int otherwise)
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
    case RECORD_DENIED:
        if (connection)
            connection->denied = true;
        return SQLITE_CANTOPEN;
    case RECORD_FORMAT:
        if (connection)
            connection->older = true;
        return SQLITE_CANTOPEN;
    case -TM_ENOSPC:
    case -TM_EDQUOT:
    case -TM_EFBIG:
        if (connection)
            connection->no_space = true;
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

/* ---- reading and writing -------------------------------------------------------------- */

static int file_close(sqlite3_file *base)
{
    struct file *file = file_of(base);
    int code = batch_flush(file);

    sqlite3_free(file->batch);
    if (file->records.kind == FILE_MAIN) {
        database_drop(file->records.database, ~HOLDS_SETUP); /* that is a copy's, which goes on */
        if (connection_self())
            connection_self()->database = NULL;
    } else if (connection_self()) {
        connection_self()->log = NULL;
    }
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
    struct file *file = file_of(base);
    uint8_t *room, *out = data;
    uint32_t inside;
    uint64_t record = locate(file, (uint64_t)offset, &inside);
    uint32_t size = record_size(file->records.kind, record);
    int status;

    if (length < 0 || inside + (uint32_t)length > size)
        return SQLITE_IOERR_READ;
    if (file->batch_count && record - file->batch_first < file->batch_count) {
        status = batch_flush(file);
        if (status)
            return status;
    }
    if ((uint32_t)length < size && record_cached(&file->records, record, inside, (uint32_t)length, out)) {
        file->last_read = 0;
        return SQLITE_OK;
    }
    room = (uint32_t)length == size ? out : sqlite3_malloc((int)size);
    if (!room)
        return SQLITE_IOERR_NOMEM;
    status = record_read(&file->records, record, room);
    if (!status && file->records.kind == FILE_MAIN && (uint32_t)length == size && !root_has_log(file->records.database))
        status = RECORD_TAMPERED;
    /* Before SQLite looks into the log it reads of the first page what is never right without the log. */
    if ((status == RECORD_TORN || status == RECORD_TAMPERED) && !record && (uint32_t)length < size &&
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
    return status == RECORD_END ? SQLITE_IOERR_SHORT_READ : file_code(status, SQLITE_IOERR_READ);
}

static int file_write(sqlite3_file *base, const void *data, int length, sqlite3_int64 offset)
{
    struct file *file = file_of(base);
    uint32_t inside;
    uint64_t record = locate(file, (uint64_t)offset, &inside);
    uint32_t size = record_size(file->records.kind, record);
    int code;

    if (file->readonly)
        return SQLITE_READONLY;
    if (length < 0 || inside + (uint32_t)length > size)
        return SQLITE_IOERR_WRITE;
    if (file->records.kind == FILE_MAIN && !root_has_log(file->records.database))
        return file_code(RECORD_TAMPERED, SQLITE_IOERR_WRITE);
    if ((uint32_t)length == size) {
        code = batch_flush(file);
        return code ? code : file_code(records_write(&file->records, record, data, 1), SQLITE_IOERR_WRITE);
    }
    if (file->records.kind == FILE_MAIN || !record)
        return SQLITE_IOERR_WRITE;
    code = batch_write(file, record, data, (uint32_t)length, inside);
    file->last_read = 0;
    return code;
}

static int file_truncate(sqlite3_file *base, sqlite3_int64 size)
{
    struct file *file = file_of(base);
    uint32_t inside;
    uint64_t count = locate(file, (uint64_t)size, &inside) + (size && file->records.kind == FILE_WAL && size < LOG_HEAD);
    int code = file->readonly ? SQLITE_READONLY : batch_flush(file);

    return code ? code : file_code(records_cut(&file->records, size ? count : 0), SQLITE_IOERR_TRUNCATE);
}

static int file_sync(sqlite3_file *base, int flags)
{
    struct file *file = file_of(base);
    int code = batch_flush(file);

    int status = 0;

    (void)flags;
    if (code)
        return code;
#ifndef DB_TEST_NO_SYNC
    status = tm_file_sync(file->records.handle);
#endif
    /* SQLite syncs the main file when a checkpoint has copied what it copies, and before it says so. */
    if (!status && file->records.kind == FILE_MAIN)
        status = root_after_checkpoint(&file->records);
    return file_code(status, SQLITE_IOERR_FSYNC);
}

static int file_size(sqlite3_file *base, sqlite3_int64 *size)
{
    struct file *file = file_of(base);
    int64_t known = records_known(&file->records);
    uint64_t records = (uint64_t)known;

    if (known < 0)
        return file_code((int)known, SQLITE_IOERR_FSTAT);
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
    struct database *database = file_of(base)->records.database;
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
    struct database *database = file_of(base)->records.database;

    database_drop(database, level == SQLITE_LOCK_SHARED ? HOLDS_FILE & ~HOLDS_FILE_SHARED : HOLDS_FILE);
    return SQLITE_OK;
}

static int file_reserved(sqlite3_file *base, int *held)
{
    struct database *database = file_of(base)->records.database;
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
    status = database_region(file_of(base)->records.database, (uint32_t)index, make, &place);
    *region = place;
    return status ? SQLITE_NOMEM : SQLITE_OK;
}

/*
 * Who may write from now on, or read the log anew, sees first what became of what those before it have left open.  A
 * record that is torn would be taken for tampering else.
 */
static int settle(struct file *file, int first, int count)
{
    struct file *log = connection_self() ? connection_self()->log : NULL;
    int status = 0;

#ifdef DB_TEST_NO_SETTLE
    return SQLITE_OK;
#endif
    if (first == WRITER && log && log->records.database == file->records.database)
        status = records_settle(&log->records);
    if (!status && first <= CHECKPOINTER && first + count > CHECKPOINTER)
        status = records_settle(&file->records);
    return file_code(status, SQLITE_IOERR_LOCK);
}

static int shm_lock(sqlite3_file *base, int first, int count, int flags)
{
    struct database *database = file_of(base)->records.database;
    uint64_t shared = HOLDS_SHARED(first, count), exclusive = HOLDS_EXCLUSIVE(first, count);
    int code;

    if (flags & SQLITE_SHM_UNLOCK) {
        if (!(flags & SQLITE_SHM_SHARED) && first == WRITER)
            batch_forget();
        database_drop(database, flags & SQLITE_SHM_SHARED ? shared : exclusive);
        return SQLITE_OK;
    }
    if (flags & SQLITE_SHM_SHARED)
        return database_hold(database, shared, exclusive) ? SQLITE_OK : SQLITE_BUSY;
    if (!database_hold(database, exclusive, shared | exclusive))
        return SQLITE_BUSY;
    code = settle(file_of(base), first, count);
    if (code)
        database_drop(database, exclusive);
    return code;
}

static void shm_barrier(sqlite3_file *base)
{
    (void)base;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static int shm_unmap(sqlite3_file *base, int remove)
{
    (void)remove; /* the log and its index outlive all connections */
    database_drop(file_of(base)->records.database, HOLDS_SHARED(0, 16));
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
    /* Where the owner has said how large it may be, that is how large it may be. */
    if (argument[2] && !sqlite3_stricmp(argument[1], "max_page_count") && connection_self() &&
        connection_self()->limited && !connection_self()->setting)
        return SQLITE_OK;
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

const sqlite3_io_methods file_methods = {
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
