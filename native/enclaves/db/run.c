/* SPDX-License-Identifier: Apache-2.0 */
/* db_run: operations one after the other, each with its result. */
#include "connection.h"
#include "reply.h"

/* What came in and is not read yet; nothing of it is believed. */
struct input {
    const uint8_t *next;
    size_t left;
};

static const uint8_t *take(struct input *input, size_t length)
{
    const uint8_t *result = input->next;

    if (input->left < length)
        return NULL;
    input->next += length;
    input->left -= length;
    return result;
}

/* One operation, while it is done. */
struct task {
    struct connection *connection;
    struct db_operation op;
    const char *text;
    struct input values; /* names, then sets */
    const uint8_t *names;
    struct reply *reply;
    size_t start; /* of its result in the reply */
    struct db_rows rows;
    uint32_t set; /* that is being done */
    int offset;   /* of an error in the text */
    uint32_t needed;
};

/* ---- parameters ---------------------------------------------------------------- */

/* Texts and blobs stay in the request, unless the statement may outlive the call: then `keep` is SQLITE_TRANSIENT. */
static int bind(sqlite3_stmt *stmt, int parameter, uint8_t type, uint64_t field, const uint8_t *bytes,
                sqlite3_destructor_type keep)
{
    double number;

    switch (type) {
    case DB_NULL:
        return sqlite3_bind_null(stmt, parameter);
    case DB_INTEGER:
        return sqlite3_bind_int64(stmt, parameter, (int64_t)field);
    case DB_REAL:
        memcpy(&number, &field, sizeof(number));
        return sqlite3_bind_double(stmt, parameter, number);
    case DB_TEXT:
        return sqlite3_bind_text64(stmt, parameter, (const char *)bytes, field, keep, SQLITE_UTF8);
    default:
        return field ? sqlite3_bind_blob64(stmt, parameter, bytes, field, keep)
                     : sqlite3_bind_zeroblob(stmt, parameter, 0);
    }
}

/* Which of the given names is the statement's parameter; op.parameters when none is. */
static uint16_t named(const struct task *task, const char *wanted)
{
    struct input names = {task->names, task->op.length};
    size_t length = wanted ? strlen(wanted + 1) : 0;

    for (uint16_t i = 0; wanted && i < task->op.parameters; i++) {
        uint16_t have;

        memcpy(&have, take(&names, sizeof(have)), sizeof(have));
        if (have == length && !memcmp(take(&names, have), wanted + 1, length))
            return i;
        if (have != length)
            take(&names, have);
    }
    return task->op.parameters;
}

/* The names lie within the operation: once for all sets. */
static int read_names(struct task *task)
{
    task->names = task->values.next;
    for (uint16_t i = 0; i < task->op.parameters; i++) {
        const uint8_t *length = take(&task->values, 2);
        uint16_t bytes;

        if (!length)
            return DB_E_REQUEST;
        memcpy(&bytes, length, sizeof(bytes));
        if (!take(&task->values, bytes))
            return DB_E_REQUEST;
    }
    return 0;
}

/* Where the bytes of a value lie, those of the set at `bytes`. */
static const uint8_t *bytes_of(uint16_t value, const uint8_t *kinds, const uint8_t *fields, const uint8_t *bytes)
{
    for (uint16_t i = 0; i < value; i++) {
        uint64_t field;

        memcpy(&field, fields + i * 8u, sizeof(field));
        bytes += kinds[i] >= DB_TEXT ? field : 0;
    }
    return bytes;
}

/* Read one set and bind it. */
static int bind_set(struct task *task, sqlite3_stmt *stmt, sqlite3_destructor_type keep)
{
    uint16_t count = task->op.parameters;
    const uint8_t *kinds = take(&task->values, count), *fields = take(&task->values, (size_t)count * 8);
    int wanted = sqlite3_bind_parameter_count(stmt), code = 0;
    const uint8_t *bytes = task->values.next, *place = bytes;

    if (!kinds || !fields)
        return DB_E_REQUEST;
    if (!task->names && wanted != count)
        return DB_E_PARAMETERS;
    for (uint16_t i = 0; i < count; i++) {
        uint64_t field;

        memcpy(&field, fields + i * 8u, sizeof(field));
        if (kinds[i] > DB_BLOB || (kinds[i] >= DB_TEXT && !take(&task->values, field)))
            return DB_E_REQUEST;
    }
    for (int parameter = 1; parameter <= wanted && !code; parameter++) {
        uint16_t value = (uint16_t)(parameter - 1);
        uint64_t field;

        if (task->names) {
            value = named(task, sqlite3_bind_parameter_name(stmt, parameter));
            if (value == count)
                return DB_E_PARAMETERS;
            place = bytes_of(value, kinds, fields, bytes);
        }
        memcpy(&field, fields + value * 8u, sizeof(field));
        code = bind(stmt, parameter, kinds[value], field, place, keep);
        place += kinds[value] >= DB_TEXT ? field : 0;
    }
    return code;
}

/* ---- statements ------------------------------------------------------------------ */

static bool only_blanks(const char *text, const char *end)
{
    while (text < end) {
        if (end - text >= 2 && text[0] == '-' && text[1] == '-') {
            while (text < end && *text != '\n')
                text++;
        } else if (end - text >= 2 && text[0] == '/' && text[1] == '*') {
            for (text += 2; text < end && !(text[0] == '*' && end - text >= 2 && text[1] == '/'); text++)
                ;
            text = end - text >= 2 ? text + 2 : end;
        } else if (*text == ' ' || *text == ';' || (*text >= '\t' && *text <= '\r')) {
            text++;
        } else {
            return false;
        }
    }
    return true;
}

/* INSERT, UPDATE, DELETE or REPLACE: what legacy drivers begin transactions for, and what counts changes. */
static bool is_change(const char *text, const char *end)
{
    static const char *const words[] = {"insert", "update", "delete", "replace"};

    while (text < end && only_blanks(text, text + 1))
        text++;
    for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++) {
        size_t length = strlen(words[i]);

        if ((size_t)(end - text) > length && !sqlite3_strnicmp(text, words[i], (int)length))
            return true;
    }
    return false;
}

static int begin(struct task *task)
{
    static const char *const texts[] = {NULL, "BEGIN DEFERRED", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"};
    sqlite3 *db = task->connection->db;

    if (!task->op.begin || !sqlite3_get_autocommit(db))
        return 0;
    return sqlite3_exec(db, texts[task->op.begin], NULL, NULL, NULL);
}

/* The columns into the reply, before any row: not until it was stepped, as that is when a changed schema shows. */
static int describe(struct task *task, sqlite3_stmt *stmt)
{
    size_t before = task->reply->length;

    task->rows.columns = (uint16_t)sqlite3_column_count(stmt);
    if (!(task->op.flags & DB_DESCRIBE))
        return 0;
    if (!reply_columns(task->reply, stmt))
        return SQLITE_NOMEM;
    task->rows.described = (uint32_t)(task->reply->length - before);
    return 0;
}

/*
 * Rows of `cursor` into the reply, as many as are wanted and fit.  The row that does not fit any more stays the
 * statement's present one.
 */
static int fetch(struct task *task, struct cursor *cursor)
{
    sqlite3_stmt *stmt = cursor->statement->stmt;
    size_t needed;
    int code;

    task->rows.columns = (uint16_t)sqlite3_column_count(stmt);
    while (task->rows.count < task->op.rows) {
        if (!cursor->row) {
            code = sqlite3_step(stmt);
            if (code != SQLITE_ROW) {
                if (cursor->changes) {
                    task->rows.flags |= DB_CHANGES;
                    task->rows.changes = sqlite3_changes64(task->connection->db);
                }
                connection_end_cursor(task->connection, cursor);
                return code == SQLITE_DONE ? 0 : code;
            }
            cursor->row = true;
        }
        switch (reply_row(task->reply, stmt, &needed)) {
        case REPLY_NO_MEMORY:
            return SQLITE_NOMEM;
        case REPLY_FULL:
            if (task->rows.count || task->start) /* the caller has something to read first */
                goto more;
            task->needed = (uint32_t)(needed + sizeof(task->rows) + task->rows.described + DB_REPLY_MIN);
            task->set = cursor->number;
            return DB_E_ROOM;
        case REPLY_ADDED:
            break;
        }
        task->rows.count++;
        cursor->row = false;
    }
more:
    task->rows.flags |= DB_MORE;
    task->rows.cursor = cursor->number;
    return 0;
}

/* A statement that returns rows, which is the cursor's from here on; it is gone again when they all fit. */
static int query(struct task *task, struct statement *statement)
{
    struct cursor *cursor = connection_add_cursor(task->connection, statement);
    int code = 0;

    if (!cursor) {
        connection_release(task->connection, statement, true);
        return DB_E_CURSORS;
    }
    cursor->changes = task->rows.flags & DB_CHANGES;
    cursor->once = task->op.flags & DB_ONCE;
    if (sqlite3_bind_parameter_count(statement->stmt) || task->op.parameters)
        code = task->op.sets == 1 ? bind_set(task, statement->stmt, SQLITE_TRANSIENT) : DB_E_PARAMETERS;
    if (!code) {
        /* The first row before anything else: what the statement changes (RETURNING) is then done. */
        code = sqlite3_step(statement->stmt);
        if (code == SQLITE_ROW) {
            cursor->row = true;
            code = describe(task, statement->stmt);
            if (!code)
                return fetch(task, cursor);
        } else if (code == SQLITE_DONE) {
            code = describe(task, statement->stmt);
        }
    }
    if (!code && cursor->changes)
        task->rows.changes = sqlite3_changes64(task->connection->db);
    connection_end_cursor(task->connection, cursor);
    return code;
}

static int change(struct task *task, sqlite3_stmt *stmt)
{
    sqlite3 *db = task->connection->db;
    uint32_t sets = task->op.sets;
    int code = 0;

    if (!sets) {
        if (sqlite3_bind_parameter_count(stmt))
            return DB_E_PARAMETERS;
        sets = 1;
    }
    for (task->set = 0; task->set < sets && !code; task->set++) {
        if (task->op.sets)
            code = bind_set(task, stmt, SQLITE_STATIC);
        if (code)
            break;
        while ((code = sqlite3_step(stmt)) == SQLITE_ROW)
            ;
        if (code == SQLITE_DONE && task->rows.flags & DB_CHANGES)
            task->rows.changes += sqlite3_changes64(db);
        if (code == SQLITE_DONE)
            code = sqlite3_reset(stmt);
        if (code)
            break;
    }
    return code;
}

static int execute(struct task *task)
{
    struct connection *self = task->connection;
    const char *end = task->text + task->op.text, *tail;
    struct statement *statement = NULL;
    int code = 0;

    if (task->op.flags & DB_NAMED)
        code = read_names(task);
    if (code)
        return code;
    code = connection_prepare(self, task->text, task->op.text, &statement, &tail);
    if (code) {
        task->offset = sqlite3_error_offset(self->db);
        if (statement)
            connection_release(self, statement, false);
        return code;
    }
    if (!only_blanks(tail, end)) {
        connection_release(self, statement, false);
        return DB_E_STATEMENTS;
    }
    if (!statement->stmt) { /* nothing but blanks and comments */
        connection_release(self, statement, false);
        return 0;
    }
    task->rows.columns = (uint16_t)sqlite3_column_count(statement->stmt);
    if (sqlite3_stmt_readonly(statement->stmt))
        task->rows.flags |= DB_READS;
    if (is_change(task->text, end)) {
        task->rows.flags |= DB_CHANGES;
        code = begin(task);
    }
    if (!code && task->rows.columns && task->op.sets <= 1)
        return query(task, statement);
    if (!code)
        code = change(task, statement->stmt);
    connection_release(self, statement, !(task->op.flags & DB_ONCE));
    return code;
}

static int script(struct task *task)
{
    sqlite3 *db = task->connection->db;
    const char *next = task->text, *end = next + task->op.text;
    int code = 0;

    while (next < end && !code) {
        sqlite3_stmt *stmt = NULL;
        const char *tail = end;

        code = sqlite3_prepare_v2(db, next, (int)(end - next), &stmt, &tail);
        if (code) {
            int offset = sqlite3_error_offset(db);

            task->offset = offset < 0 ? offset : offset + (int)(next - task->text);
            break;
        }
        while (stmt && (code = sqlite3_step(stmt)) == SQLITE_ROW)
            ;
        code = sqlite3_finalize(stmt);
        next = tail;
    }
    return code;
}

static int more(struct task *task)
{
    struct cursor *cursor = connection_cursor(task->connection, task->op.cursor);
    int code;

    if (task->op.kind == DB_END) {
        if (cursor)
            connection_end_cursor(task->connection, cursor);
        return 0;
    }
    if (!cursor)
        return DB_E_CURSOR;
    code = describe(task, cursor->statement->stmt);
    return code ? code : fetch(task, cursor);
}

/* ---- the list ----------------------------------------------------------------------- */

static bool read_operation(struct input *input, struct task *task)
{
    const uint8_t *head = take(input, sizeof(task->op));

    if (!head)
        return false;
    memcpy(&task->op, head, sizeof(task->op));
    task->text = (const char *)take(input, task->op.text);
    task->values = (struct input){take(input, task->op.length), task->op.length};
    return task->text && task->values.next && !task->op.reserved && !task->op.reserved2 &&
           task->op.kind >= DB_EXECUTE && task->op.kind <= DB_SCRIPT && task->op.begin <= DB_BEGIN_EXCLUSIVE &&
           task->op.flags <= (DB_NAMED | DB_DESCRIBE | DB_ONCE) && task->op.text < INT32_MAX;
}

/* One operation and its result: false when that is an error. */
static bool operate(struct task *task)
{
    struct connection *self = task->connection;
    uint8_t *place;
    int code;

    task->start = task->reply->length;
    place = reply_add(task->reply, sizeof(task->rows));
    if (!place)
        code = SQLITE_NOMEM;
    else if (task->op.kind == DB_EXECUTE)
        code = execute(task);
    else if (task->op.kind == DB_SCRIPT)
        code = script(task);
    else
        code = more(task);
    if (code) {
        task->reply->length = task->start;
        reply_error(task->reply, self, code, task->offset, task->set);
        if (code == DB_E_ROOM && task->reply->length >= task->start + sizeof(struct db_error))
            memcpy(task->reply->start + task->start + offsetof(struct db_error, needed), &task->needed, 4);
        return false;
    }
    task->rows.kind = DB_ROWS;
    if (!sqlite3_get_autocommit(self->db))
        task->rows.flags |= DB_TRANSACTION;
    task->rows.last_rowid = sqlite3_last_insert_rowid(self->db);
    task->rows.length = (uint32_t)(task->reply->length - task->start - sizeof(task->rows) - task->rows.described);
    memcpy(task->reply->start + task->start, &task->rows, sizeof(task->rows));
    return true;
}

TM_ECALL(db_run)
{
    struct connection *self = connection_self();
    struct input input = {rq->in, rq->in_len};
    struct reply reply = {.most = tm_reply_room(rq)};
    struct db_run head;
    const uint8_t *start = take(&input, sizeof(head));
    int code, status;

    if (!start)
        return TM_E_ARGUMENT;
    memcpy(&head, start, sizeof(head));
    if (head.reserved || (head.interrupt && !tm_is_outside((const void *)head.interrupt, sizeof(uint32_t))) ||
        head.interrupt & 3)
        return TM_E_ARGUMENT;
    if (!self)
        return TM_E_STATE;
    if (reply.most < DB_REPLY_MIN) {
        rq->out_len = DB_REPLY_MIN;
        return TM_E_SPACE;
    }
    running[tm_caller().slot].stop = 0; /* that was for an earlier list, which it ended or came too late for */
    for (uint32_t i = 0; i < head.count; i++) {
        struct task task = {.connection = self, .reply = &reply, .offset = -1};

        /* Where no error would fit, nothing more is begun. */
        if (i && reply.length + DB_REPLY_MIN > reply.most)
            break;
        connection_begin(self, (const volatile uint32_t *)head.interrupt);
        if (!read_operation(&input, &task)) {
            reply_error(&reply, self, DB_E_REQUEST, -1, 0);
            break;
        }
        if ((code = connection_allowed(self))) {
            reply_error(&reply, self, code, -1, 0);
            break;
        }
        if (!operate(&task))
            break;
    }
    self->interrupt = NULL;
    status = tm_reply(rq, reply.start, reply.length);
    reply_close(&reply);
    return status;
}
