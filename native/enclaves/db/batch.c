/* SPDX-License-Identifier: Apache-2.0 */
/* What a transaction writes to the log goes to the host in batches. */
#include "file.h"

#include "files.h"
#include "head.h"

#define INDEX_PAGES 5 /* SQLite's wal-index (walformat.html): pages of the database after the last commit */

static uint8_t *frame_at(const struct file *file, uint32_t index)
{
    return file->batch + index * (size_t)FRAME_SIZE;
}

int batch_flush(struct file *file)
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
    return file_code(status, SQLITE_IOERR_WRITE);
}

void batch_forget(void)
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
    return file_code(status == RECORD_END ? -TM_EIO : status, SQLITE_IOERR_WRITE);
}

/* The head of a transaction's last frame says how many pages the database has then; of the others, 0. */
static bool may_commit(const struct file *file, const uint8_t *head)
{
    struct database *database = file->records.database;
    const volatile uint32_t *index = database->regions[0];
    uint64_t now = index && index[INDEX_PAGES] ? index[INDEX_PAGES] : database->files[FILE_MAIN].records;
    uint32_t pages;

    memcpy(&pages, head + 4, sizeof(pages));
    return head_has_room(database, __builtin_bswap32(pages), now);
}

int batch_write(struct file *file, uint64_t record, const void *data, uint32_t length, uint32_t offset)
{
    bool next = file->batch_count && record == file->batch_first + file->batch_count;
    uint64_t place = record - file->batch_first;
    uint8_t *frame;
    int code;

    if (!offset && length == FRAME_HEAD && !may_commit(file, data))
        return SQLITE_FULL; /* it is rolled back, and what was gathered of it forgotten */
    /* What was written before in this transaction is written again: to the batch, or where it is. */
    if (file->batch_count && place < file->batch_count && !(file->half && place == file->batch_count - 1)) {
        memcpy(frame_at(file, (uint32_t)place) + offset, data, length);
        return SQLITE_OK;
    }
    if (!offset && length == FRAME_HEAD && record != file->last_read) {
        if (file->half || (file->batch_count && (!next || file->batch_count == BATCH))) {
            code = batch_flush(file);
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
        return last ? batch_flush(file) : SQLITE_OK; /* pages of the database after this commit; 0: more frames follow */
    }
    code = batch_flush(file);
    return code ? code : rewrite(file, record, data, length, offset);
}
