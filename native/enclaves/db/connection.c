/* SPDX-License-Identifier: Apache-2.0 */
#include "connection.h"

#include "cache.h"
#include "copy.h"
#include "file.h"
#include "files.h"
#include "head.h"
#include "reply.h"

/* How many of SQLite's instructions pass between two looks at what may end a statement: some 20 microseconds. */
#define PROGRESS_STEPS 2000
#define PAGES_MOST (TAGS_IN_CHUNK * CHUNKS_MOST) /* of which account is kept */

struct running running[SLOTS_MOST];
static _Atomic uint64_t last_number;

int tm_on_start(void)
{
    return slot_count() > SLOTS_MOST ? TM_E_ARGUMENT : local_prepare();
}

/* Its holder is gone, and with it what it held; its memory is the SDK's to free. */
void tm_on_slot_reset(uint32_t slot)
{
    running[slot].number = 0;
    cache_slot_reset(slot);
#ifndef DB_TEST_KEEP_LOCKS
    databases_forget(slot);
#endif
}

/* ---- what ends a statement --------------------------------------------------- */

static int progress(void *argument)
{
    struct connection *self = argument;
    struct running *mark = &running[tm_caller().slot];
    uint32_t word;

    if (self->deadline && tm_time() > self->deadline) {
        self->late = true;
        return 1;
    }
    if (self->interrupt && (word = *self->interrupt)) {
        self->late = word == DB_STOP_LATE;
        return 1;
    }
    return mark->stop == self->number;
}

void connection_begin(struct connection *self, const volatile uint32_t *interrupt)
{
    uint64_t now = tm_time();

    self->interrupt = interrupt;
    self->late = self->no_space = false;
    self->deadline = self->statement_ns && now ? now + self->statement_ns : 0;
}

/*
 * One connection is one database: who was given this one does not reach others by ATTACH or VACUUM INTO.
 * VACUUM itself attaches '', in memory.  A name that is no literal is not known yet when this is asked.
 */
static int authorize(void *argument, int action, const char *first, const char *second, const char *name,
                     const char *trigger)
{
    (void)argument;
    (void)second;
    (void)name;
    (void)trigger;
    if (action == SQLITE_ATTACH && (!first || (*first && strcmp(first, ":memory:"))))
        return SQLITE_DENY;
    return SQLITE_OK;
}

/* ---- statements and cursors ---------------------------------------------------- */

static uint32_t hash_of(const char *text, uint32_t length)
{
    uint32_t hash = 2166136261u; /* FNV-1a */

    for (uint32_t i = 0; i < length; i++)
        hash = (hash ^ (uint8_t)text[i]) * 16777619u;
    return hash;
}

static void forget(struct statement *statement)
{
    sqlite3_finalize(statement->stmt);
    memset(statement, 0, sizeof(*statement));
}

int connection_prepare(struct connection *self, const char *text, uint32_t length, struct statement **statement,
                       const char **tail)
{
    uint32_t hash = hash_of(text, length);
    struct statement *oldest = NULL;
    int code;

    *tail = text + length;
    for (uint32_t i = 0; i < STATEMENTS_KEPT; i++) {
        struct statement *kept = &self->kept[i];

        if (kept->cursor)
            continue;
        if (kept->stmt && kept->hash == hash && kept->length == length &&
            !memcmp(sqlite3_sql(kept->stmt), text, length)) {
            *statement = kept;
            kept->used = ++self->uses;
            return SQLITE_OK;
        }
        if (!oldest || kept->used < oldest->used)
            oldest = kept;
    }
    /* All are cursors': then this one is not kept, and lies by itself. */
    if (!oldest) {
        oldest = sqlite3_malloc(sizeof(*oldest));
        if (!oldest)
            return SQLITE_NOMEM;
        memset(oldest, 0, sizeof(*oldest));
    } else {
        forget(oldest);
    }
    code = sqlite3_prepare_v3(self->db, text, (int)length, SQLITE_PREPARE_PERSISTENT, &oldest->stmt, tail);
    oldest->used = ++self->uses;
    oldest->hash = hash;
    oldest->length = length;
    *statement = oldest;
    if (code || !oldest->stmt || *tail != text + length)
        oldest->length = UINT32_MAX; /* found by no text */
    return code;
}

void connection_release(struct connection *self, struct statement *statement, bool keep)
{
    bool apart = statement < self->kept || statement >= self->kept + STATEMENTS_KEPT;

    statement->cursor = 0;
    if (statement->stmt) {
        sqlite3_reset(statement->stmt);
        sqlite3_clear_bindings(statement->stmt);
    }
    if (!keep || apart || statement->length == UINT32_MAX)
        forget(statement);
    if (apart)
        sqlite3_free(statement);
}

struct cursor *connection_cursor(struct connection *self, uint32_t number)
{
    for (uint32_t i = 0; number && i < self->cursor_limit; i++)
        if (self->cursors[i].number == number)
            return &self->cursors[i];
    return NULL;
}

struct cursor *connection_add_cursor(struct connection *self, struct statement *statement)
{
    for (uint32_t i = 0; i < self->cursor_limit; i++) {
        struct cursor *cursor = &self->cursors[i];

        if (cursor->number)
            continue;
        if (!++self->last_cursor)
            self->last_cursor = 1;
        cursor->number = self->last_cursor;
        cursor->statement = statement;
        statement->cursor = cursor->number;
        self->cursors_open++;
        return cursor;
    }
    return NULL;
}

void connection_end_cursor(struct connection *self, struct cursor *cursor)
{
    struct statement *statement = cursor->statement;
    bool keep = !cursor->once;

    memset(cursor, 0, sizeof(*cursor));
    self->cursors_open--;
    connection_release(self, statement, keep);
}

/* ---- opening and closing --------------------------------------------------------- */

static void close(struct connection *self)
{
    running[tm_caller().slot].number = 0;
    copy_end(self);
    for (uint32_t i = 0; self->cursors && i < self->cursor_limit; i++)
        if (self->cursors[i].number)
            connection_end_cursor(self, &self->cursors[i]);
    for (uint32_t i = 0; i < STATEMENTS_KEPT; i++)
        forget(&self->kept[i]);
    sqlite3_close_v2(self->db);
    local_close();
}

bool connection_name_is_right(const char *name, uint32_t length)
{
    static const char *const taken[] = {"-wal", "-root", "-journal"};

    if (!length || length > DB_NAME_MAX)
        return false;
    for (uint32_t i = 0; i < length; i++) {
        char c = name[i];
        bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');

        if (!plain && (!i || (c != '.' && c != '_' && c != '-')))
            return false;
    }
    for (size_t i = 0; i < sizeof(taken) / sizeof(*taken); i++) {
        size_t end = strlen(taken[i]);

        if (length >= end && !memcmp(name + length - end, taken[i], end))
            return false;
    }
    return true;
}

int connection_set_up(struct connection *self, sqlite3 *db)
{
    int on = 1;
    char pragma[64];

    sqlite3_extended_result_codes(db, 1);
    sqlite3_progress_handler(db, PROGRESS_STEPS, progress, self);
    sqlite3_set_authorizer(db, authorize, self);
    sqlite3_db_config(db, SQLITE_DBCONFIG_DEFENSIVE, 1, &on);
    sqlite3_db_config(db, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, &on);
    /* A few pages of its own, for what a statement goes through again and again: the others are in the shared cache. */
    sqlite3_snprintf(sizeof(pragma), pragma, "PRAGMA cache_size=-%d", (int)(local_self()->memory.limit >> 15));
    return sqlite3_exec(db, pragma, NULL, NULL, NULL);
}

/*
 * What the owner says of the size; SQLite has it per connection.  A statement that would be too large ends early by this;
 * what holds whoever writes to it, whatever they have prepared, is that no larger commit goes into the log (batch.c).
 */
static int limit_size(struct connection *self)
{
    struct rights rights;
    char pragma[64];
    int code;

    head_rights(self->database, &rights);
    self->limited = rights.pages_most != 0;
    sqlite3_snprintf(sizeof(pragma), pragma, "PRAGMA max_page_count=%lld",
                     (long long)(rights.pages_most ? rights.pages_most : PAGES_MOST));
    self->setting = true;
    code = sqlite3_exec(self->db, pragma, NULL, NULL, NULL);
    self->setting = false;
    return code;
}

int connection_allowed(struct connection *self)
{
    uint64_t head;

    if (self->indirect)
        return DB_E_FILES;
    if (self->copy)
        return DB_E_COPYING;
    if (!self->database || (head = self->database->head) == self->head)
        return 0;
    if (head_access(self->database) >= (self->readonly ? DB_ACCESS_READ : self->granted)) {
        if (!limit_size(self)) /* else it is set with the next call */
            self->head = head;
        return 0;
    }
    /* It was taken back, and with it what is not committed. */
    if (!sqlite3_get_autocommit(self->db))
        sqlite3_exec(self->db, "ROLLBACK", NULL, NULL, NULL);
    return DB_E_DENIED;
}

static int open(struct connection *self, const struct db_open *request, const char *name)
{
    bool memory = request->flags & DB_OPEN_MEMORY;
    int flags = request->flags & DB_OPEN_READONLY ? SQLITE_OPEN_READONLY : SQLITE_OPEN_READWRITE;
    int code;

    if (request->flags & DB_OPEN_CREATE)
        flags |= SQLITE_OPEN_CREATE;
    if (memory)
        flags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_MEMORY;
    code = sqlite3_open_v2(memory ? ":memory:" : name, &self->db, flags, NULL);
    if (!code)
        code = connection_set_up(self, self->db);
    if (!code)
        sqlite3_busy_timeout(self->db, request->busy_ms < 86400000 ? (int)request->busy_ms : 86400000);
    self->readonly = request->flags & DB_OPEN_READONLY;
    if (memory)
        self->granted = DB_ACCESS_OWNER;
    /* Opening reads nothing: whether it is a database, and ours, is seen here. */
    if (!code && !memory)
        code = sqlite3_exec(self->db, "SELECT 1 FROM sqlite_schema LIMIT 1", NULL, NULL, NULL);
    if (!code && !memory)
        code = limit_size(self);
    return code;
}

/* ---- files that the client reads and writes itself --------------------------------- */

/* Of the database that is open: how many; both while it has a log. */
static uint32_t own_files(struct connection *self, struct file *files[2])
{
    sqlite3_file *base = NULL;

    if (!self->database || sqlite3_file_control(self->db, "main", SQLITE_FCNTL_FILE_POINTER, &base) || !base)
        return 0;
    files[0] = file_of(base);
    files[1] = self->log;
    return self->log ? 2 : 1;
}

/*
 * Until the client has them it does nothing: what the warden writes for one client and what another writes itself have
 * no order when the first has died.  What the warden goes on writing is in nobody's way: heads, roots (root.h), and files
 * that no database is in yet.
 */
static int lend_files(struct connection *self, uint32_t *count)
{
    struct file *files[2];
    int status = 0;

    *count = tm_file_lends() ? own_files(self, files) : 0;
    for (uint32_t i = 0; i < *count && !status; i++)
        status = tm_file_lend(files[i]->records.handle);
    self->indirect = *count != 0;
    return file_code(status, SQLITE_CANTOPEN);
}

TM_ECALL(db_direct)
{
    struct connection *self = connection_self();
    struct file *files[2];
    uint32_t count = self ? own_files(self, files) : 0;

    if (!self || !self->indirect)
        return TM_E_STATE;
    for (uint32_t i = 0; i < count; i++)
        if (tm_file_direct(files[i]->records.handle))
            return TM_E_STATE;
    self->indirect = false;
    return 0;
}

TM_ECALL(db_open)
{
    struct tm_caller caller = tm_caller();
    struct db_opened opened;
    struct connection *self;
    struct db_open request;
    char name[DB_NAME_MAX + 1] = {0};
    uint32_t files = 0;
    int status;

    if (rq->in_len < sizeof(request))
        return TM_E_ARGUMENT;
    memcpy(&request, rq->in, sizeof(request));
    if (request.version != DB_VERSION || request.flags > 15 || request.name_length != rq->in_len - sizeof(request) ||
        (request.flags & DB_OPEN_READONLY && request.flags & (DB_OPEN_CREATE | DB_OPEN_MEMORY)) ||
        request.cursors > DB_CURSORS_MAX || (request.memory && request.memory < DB_MEMORY_MIN))
        return TM_E_ARGUMENT;
    if (request.flags & DB_OPEN_MEMORY ? request.name_length != 0
                                       : !connection_name_is_right((const char *)rq->in + sizeof(request), request.name_length))
        return TM_E_ARGUMENT;
    memcpy(name, rq->in + sizeof(request), request.name_length);
    if (tm_reply_room(rq) < DB_REPLY_MIN) {
        rq->out_len = DB_REPLY_MIN;
        return TM_E_SPACE;
    }
    if (local_self())
        return TM_E_STATE;
    status = local_open(request.memory ? request.memory : DB_MEMORY_DEFAULT);
    if (status)
        return status;
    self = sqlite3_malloc(sizeof(*self));
    if (!self) {
        local_close();
        return TM_E_NOMEM;
    }
    memset(self, 0, sizeof(*self));
    local_self()->connection = self;
    self->cursor_limit = request.cursors ? request.cursors : DB_CURSORS_MAX;
    self->cursors = sqlite3_malloc((int)(self->cursor_limit * sizeof(*self->cursors)));
    self->statement_ns = request.statement_ms * 1000000ull;
    self->uncached = request.flags & DB_OPEN_UNCACHED;
    self->number = ++last_number;
    status = SQLITE_NOMEM;
    if (self->cursors) {
        memset(self->cursors, 0, self->cursor_limit * sizeof(*self->cursors));
        status = open(self, &request, name);
        if (!status)
            status = lend_files(self, &files);
    }
    if (status) {
        struct reply reply = {0};

        reply_error(&reply, self, status, -1, 0);
        status = tm_reply(rq, reply.start, reply.length);
        reply_close(&reply);
        close(self);
        return status ? status : DB_FAILED;
    }
    memcpy(running[caller.slot].principal, caller.identity.principal, sizeof(running->principal));
    running[caller.slot].number = self->number;
    opened = (struct db_opened){.connection = self->number,
                                .slot = caller.slot,
                                .sqlite_version = SQLITE_VERSION_NUMBER,
                                .access = self->readonly ? DB_ACCESS_READ : self->granted,
                                .files = files};
    return tm_reply(rq, &opened, sizeof(opened));
}

TM_ECALL(db_close)
{
    if (connection_self())
        close(connection_self());
    return 0;
}

TM_ECALL(db_interrupt)
{
    struct tm_caller caller = tm_caller();
    struct db_interrupt request;
    struct running *mark;

    if (rq->in_len != sizeof(request))
        return TM_E_ARGUMENT;
    memcpy(&request, rq->in, sizeof(request));
    if (request.reserved || request.slot >= slot_count() || !request.connection)
        return TM_E_ARGUMENT;
    mark = &running[request.slot];
    if (mark->number != request.connection ||
        memcmp(mark->principal, caller.identity.principal, sizeof(mark->principal)))
        return TM_E_STATE;
    mark->stop = request.connection;
    return 0;
}

TM_ECALL(db_statistics)
{
    struct connection *self = connection_self();
    struct db_statistics answer = {0};
    struct tm_heap_stats heap = {0};
    int now = 0, most = 0;

    if (!self)
        return TM_E_STATE;
    answer.memory_now = local_self()->memory.used;
    answer.memory_most = local_self()->memory.most;
    answer.memory_limit = local_self()->memory.limit;
    answer.cursors = self->cursors_open;
    for (uint32_t i = 0; i < STATEMENTS_KEPT; i++)
        answer.statements += self->kept[i].stmt != NULL;
    if (!tm_heap_check(&heap))
        answer.heap_free_largest = heap.largest_free;
    sqlite3_db_status(self->db, SQLITE_DBSTATUS_CACHE_HIT, &now, &most, 0);
    answer.cache_hits = (uint64_t)now;
    sqlite3_db_status(self->db, SQLITE_DBSTATUS_CACHE_MISS, &now, &most, 0);
    answer.cache_misses = (uint64_t)now;
    return tm_reply(rq, &answer, sizeof(answer));
}

TM_ECALL(db_cache)
{
    struct cache_statistics cache;
    struct db_cache answer;

    cache_statistics(&cache);
    answer = (struct db_cache){.limit = cache.limit, .size = cache.size, .hits = cache.hits, .fills = cache.fills};
    return tm_reply(rq, &answer, sizeof(answer));
}
