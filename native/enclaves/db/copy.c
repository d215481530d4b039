/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A new database is written behind SQLite's back: records into its file, and the head last, so that until then there is
 * none, whenever this is cut short.  The source is a snapshot: a transaction that reads, for as long as the copy takes.
 */
#include "copy.h"

#include "file.h"
#include "files.h"
#include "head.h"
#include "manage.h"
#include "pages.h"
#include "reply.h"
#include "vfs.h"

#define RECORDS_MOST ((uint64_t)TAGS_IN_CHUNK * CHUNKS_MOST)
_Static_assert(DB_PAGE == PAGE_SIZE, "pages are records");

struct copy {
    enum db_copy_kind kind;
    uint64_t done, pages;
    struct record_file to; /* no database: DB_COPY_OUT */
    bool made;             /* it is a database now */
    bool reading;          /* the transaction that is open is the copy's */
    char said[160];
};

/* ---- beginning ------------------------------------------------------------------ */

/* The name of a new database is ours, with an empty file. */
static int begin_new(struct copy *copy, const char *name)
{
    struct database *database;
    char log[DB_NAME_MAX + 8];
    struct rights rights;
    int code, status = head_rights_of(name, &rights);

    if (!status || status == RECORD_FORMAT)
        return DB_E_EXISTS;
    code = manage_claim(name, &database);
    if (code)
        return code;
    vfs_log_name(name, log);
    status = database->ready ? 0 : tm_file_open(name, TM_FILE_CREATE, &copy->to.handle);
    copy->to.database = database;
    copy->to.kind = FILE_MAIN;
    if (!database->ready && !status) {
        status = head_read(&copy->to);
        if (status == -TM_ENOENT) {
            status = head_begin(&copy->to, log);
            if (!status)
                return SQLITE_OK;
        }
        tm_file_close(copy->to.handle);
    }
    copy->to.database = NULL;
    database_drop(database, HOLDS_SETUP);
    return status ? file_code(status, SQLITE_CANTOPEN) : DB_E_EXISTS;
}

/* The snapshot: what is committed now. */
static int begin_reading(struct connection *self, struct copy *copy)
{
    int code;

    if (!self->database || !sqlite3_get_autocommit(self->db))
        return DB_E_REQUEST;
    if (head_access(self->database) != DB_ACCESS_OWNER)
        return DB_E_DENIED;
    copy->reading = true;
    code = sqlite3_exec(self->db, "BEGIN; SELECT 1 FROM sqlite_schema LIMIT 1", NULL, NULL, NULL);
    copy->pages = code ? 0 : pages_count(self->db);
    return code;
}

static int begin(struct connection *self, const struct db_copy *request, const char *name)
{
    struct copy *copy = sqlite3_malloc(sizeof(*copy));
    int code = SQLITE_OK;

    if (!copy)
        return SQLITE_NOMEM;
    memset(copy, 0, sizeof(*copy));
    copy->kind = request->kind;
    copy->pages = request->pages;
    self->copy = copy;
    if (copy->kind == DB_COPY_IN)
        code = copy->pages > RECORDS_MOST ? SQLITE_FULL : SQLITE_OK;
    else
        code = begin_reading(self, copy);
    if (!code && copy->kind != DB_COPY_OUT)
        code = begin_new(copy, name);
    return code;
}

void copy_end(struct connection *self)
{
    struct copy *copy = self->copy;
    char log[DB_NAME_MAX + 8];

    if (!copy)
        return;
    self->copy = NULL;
    self->said = NULL;
    if (copy->reading && !sqlite3_get_autocommit(self->db))
        sqlite3_exec(self->db, "COMMIT", NULL, NULL, NULL);
    if (copy->to.database) {
        tm_file_close(copy->to.handle);
        if (!copy->made) {
            vfs_log_name(copy->to.database->name, log);
            tm_file_delete(copy->to.database->name);
            tm_file_delete(log);
            root_delete(copy->to.database->name);
            database_wipe(copy->to.database);
            cache_drop((uint64_t)copy->to.database);
        }
        database_drop(copy->to.database, HOLDS_SETUP);
    }
    sqlite3_free(copy);
}

/* An answer that is a struct db_error, the copy's end. */
static int fail(struct tm_request *rq, struct connection *self, int code)
{
    struct reply reply = {0};
    int status;

    tm_reply_reset(rq);
    reply_error(&reply, self, code, -1, 0);
    status = tm_reply(rq, reply.start, reply.length);
    reply_close(&reply);
    if (code != DB_E_COPYING)
        copy_end(self);
    return status ? status : DB_FAILED;
}

TM_ECALL(db_copy)
{
    struct connection *self = connection_self();
    struct db_copying answer = {0};
    struct db_copy request;
    char name[DB_NAME_MAX + 1] = {0};
    int code;

    if (rq->in_len < sizeof(request))
        return TM_E_ARGUMENT;
    memcpy(&request, rq->in, sizeof(request));
    if (request.kind < DB_COPY_OUT || request.kind > DB_COPY_IN ||
        request.name_length != rq->in_len - sizeof(request) || (request.kind == DB_COPY_IN) != (request.pages != 0))
        return TM_E_ARGUMENT;
    if (request.kind == DB_COPY_OUT
            ? request.name_length != 0
            : !connection_name_is_right((const char *)rq->in + sizeof(request), request.name_length))
        return TM_E_ARGUMENT;
    memcpy(name, rq->in + sizeof(request), request.name_length);
    if (!self)
        return TM_E_STATE;
    code = connection_allowed(self);
    if (!code)
        code = begin(self, &request, name);
    if (code)
        return fail(rq, self, code);
    answer.pages = self->copy->pages;
    return tm_reply(rq, &answer, sizeof(answer));
}

/* ---- pages ---------------------------------------------------------------------- */

/* Whether the first page begins a database with pages like ours; from now on one with a log, or with none. */
static int change_first(uint8_t *page, uint8_t mode)
{
    static const char magic[] = "SQLite format 3";

    if (memcmp(page, magic, sizeof(magic)) || page[16] != DB_PAGE >> 8 || page[17] || page[20] || page[18] > 2 ||
        page[19] > 2)
        return SQLITE_NOTADB;
    page[18] = page[19] = mode;
    return SQLITE_OK;
}

static int pages_out(struct tm_request *rq, struct connection *self, struct copy *copy, uint32_t count, uint8_t *page)
{
    for (uint32_t i = 0; i < count; i++) {
        int code = pages_read(self->db, (uint32_t)copy->done + 1, page, DB_PAGE);

        if (!code && !copy->done)
            code = change_first(page, 1);
        if (code)
            return code;
        if (tm_reply(rq, page, DB_PAGE))
            return DB_E_REQUEST;
        copy->done++;
    }
    return SQLITE_OK;
}

/* A batch of records at a time, from `pages` or from the open database into `room`. */
static int pages_in(struct connection *self, struct copy *copy, const uint8_t *pages, uint32_t count, uint8_t *room)
{
    while (count) {
        uint32_t some = count < BATCH ? count : BATCH;
        int code = SQLITE_OK;

        for (uint32_t i = 0; i < some && !code; i++) {
            uint8_t *page = room + (size_t)i * DB_PAGE;

            if (pages)
                memcpy(page, pages + (size_t)i * DB_PAGE, DB_PAGE);
            else
                code = pages_read(self->db, (uint32_t)copy->done + i + 1, page, DB_PAGE);
            if (!code && !copy->done && !i)
                code = change_first(page, 2);
        }
        if (!code)
            code = file_code(records_write(&copy->to, copy->done, room, some), SQLITE_IOERR_WRITE);
        if (code)
            return code;
        copy->done += some;
        count -= some;
        pages = pages ? pages + (size_t)some * DB_PAGE : NULL;
    }
    return SQLITE_OK;
}

TM_ECALL(db_pages)
{
    struct connection *self = connection_self();
    struct copy *copy = self ? self->copy : NULL;
    struct db_copying answer;
    struct db_pages request;
    const uint8_t *pages = NULL;
    uint8_t *room;
    int code;

    if (rq->in_len < sizeof(request))
        return TM_E_ARGUMENT;
    memcpy(&request, rq->in, sizeof(request));
    if (request.reserved || !request.count || request.count > DB_PAGES_MAX)
        return TM_E_ARGUMENT;
    if (!self)
        return TM_E_STATE;
    if (!copy)
        return fail(rq, self, DB_E_COPYING);
    if (rq->in_len != sizeof(request) + (copy->kind == DB_COPY_IN ? (size_t)request.count * DB_PAGE : 0) ||
        request.count > copy->pages - copy->done)
        return TM_E_ARGUMENT;
    if (copy->kind == DB_COPY_IN)
        pages = rq->in + sizeof(request);
    answer = (struct db_copying){.done = copy->done + request.count, .pages = copy->pages};
    rq->out_len = sizeof(answer) + (copy->kind == DB_COPY_OUT ? (uint64_t)request.count * DB_PAGE : 0);
    if (rq->out_len > rq->out_cap)
        return TM_E_SPACE;
    tm_reply_reset(rq);
    room = sqlite3_malloc((int)(BATCH * DB_PAGE));
    code = room ? tm_reply(rq, &answer, sizeof(answer)) : SQLITE_NOMEM;
    if (!code)
        code = copy->kind == DB_COPY_OUT ? pages_out(rq, self, copy, request.count, room)
                                         : pages_in(self, copy, pages, request.count, room);
    sqlite3_free(room);
    return code ? fail(rq, self, code) : 0;
}

/* ---- ending ---------------------------------------------------------------------- */

static int first_row(void *argument, int columns, char **values, char **names)
{
    struct copy *copy = argument;

    (void)names;
    if (columns && values[0] && strcmp(values[0], "ok"))
        sqlite3_snprintf(sizeof(copy->said), copy->said, "the database is damaged: %s", values[0]);
    return 0;
}

/*
 * What came from outside is opened as a database, for us alone.  The connection's own may be one of files too: what it
 * knows of that is put aside.
 */
static int check(struct connection *self, struct copy *copy)
{
    struct connection own = *self;
    sqlite3 *db = NULL;
    int code = sqlite3_open_v2(copy->to.database->name, &db, SQLITE_OPEN_READWRITE, NULL);

    if (!code)
        code = connection_set_up(self, db);
    if (!code)
        code = sqlite3_exec(db, "PRAGMA integrity_check(1)", first_row, copy, NULL);
    sqlite3_close_v2(db);
    self->log = own.log;
    self->database = own.database;
    self->granted = own.granted;
    self->head = own.head;
    if (!copy->said[0])
        return code;
    self->said = copy->said;
    return SQLITE_CORRUPT;
}

TM_ECALL(db_copied)
{
    struct connection *self = connection_self();
    struct db_copied request;
    struct copy *copy;
    int code = SQLITE_OK, status;

    if (rq->in_len != sizeof(request))
        return TM_E_ARGUMENT;
    memcpy(&request, rq->in, sizeof(request));
    if (request.keep > 1 || request.reserved || request.interrupt & 3 ||
        (request.interrupt && !tm_is_outside((const void *)request.interrupt, sizeof(uint32_t))))
        return TM_E_ARGUMENT;
    if (!self)
        return TM_E_STATE;
    copy = self->copy;
    if (!copy || (request.keep && copy->done != copy->pages))
        return fail(rq, self, DB_E_COPYING);
    if (request.keep && copy->to.database) {
        running[tm_caller().slot].stop = 0; /* that was for a statement, which it ended or came too late for */
        connection_begin(self, (const volatile uint32_t *)request.interrupt);
        if (copy->kind == DB_COPY_IN)
            code = check(self, copy);
        self->interrupt = NULL;
        if (!code) {
            status = head_finish(&copy->to);
            code = file_code(status, SQLITE_IOERR_WRITE);
        }
        if (code)
            return fail(rq, self, code);
        copy->to.database->ready = 1;
        copy->made = true;
    }
    copy_end(self);
    return 0;
}
