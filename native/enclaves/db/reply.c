/* SPDX-License-Identifier: Apache-2.0 */
#include "reply.h"

uint8_t *reply_add(struct reply *reply, size_t length)
{
    uint8_t *result;

    if (reply->room - reply->length < length) {
        size_t room = reply->room * 2 > reply->length + length ? reply->room * 2 : reply->length + length;
        uint8_t *moved = sqlite3_realloc64(reply->start, room < DB_REPLY_MIN ? DB_REPLY_MIN : room);

        if (!moved)
            return NULL;
        reply->start = moved;
        reply->room = room < DB_REPLY_MIN ? DB_REPLY_MIN : room;
    }
    result = reply->start + reply->length;
    reply->length += length;
    return result;
}

void reply_close(struct reply *reply)
{
    sqlite3_free(reply->start);
    memset(reply, 0, sizeof(*reply));
}

static const char *own_message(int code)
{
    switch (code) {
    case DB_E_TAMPERED:
        return "a file of the database is not what the enclave wrote: it was changed, swapped, or an older one was "
               "put back; or it was made by an enclave of another signer or on another computer";
    case DB_E_STORAGE:
        return "the enclave has no storage for files: let its policy give it some, or use a database in memory";
    case DB_E_PARAMETERS:
        return "as many values are wanted as the statement has parameters, each of its names among them";
    case DB_E_STATEMENTS:
        return "one statement is wanted, and there are more";
    case DB_E_CURSOR:
        return "there is no such cursor: it was ended";
    case DB_E_CURSORS:
        return "more cursors are open than the connection may have: end some";
    case DB_E_ROOM:
        return "not even one row fits: ask for a longer reply";
    case DB_E_TIME:
        return "the statement took longer than it may";
    case DB_E_DENIED:
        return "the caller has no right to do this with the database: its owner can grant it";
    case DB_E_EXISTS:
        return "there is a database of that name";
    case DB_E_RIGHTS:
        return "the database has 128 grants, and there may not be more: take some back, or grant to a group";
    case DB_E_SIZE:
        return "the database has the size that its owner lets it have";
    case DB_E_SPACE:
        return "there is no room for it: the files of the enclave take all of storage_limit in its policy, or the host's disk "
               "is full";
    case DB_E_HEAP:
        return "the enclave's heap is full, of what its other connections have and of kept pages";
    case DB_E_FILES:
        return "the policy of the enclave has io = \"client\", and this client has not taken the descriptors of the "
               "database's files: it is of a version that cannot";
    case DB_E_COPYING:
        return "a copy of the database is under way on this connection, or there is none to go on with";
    case DB_E_FORMAT:
        return "an earlier version of this enclave has made the database, in a format that this one does not read: export it "
               "with that version (teemate db export), delete it, and import what it gave (teemate db import)";
    default:
        return "the operation is none: a length or number in it cannot be";
    }
}

/* An error that a file's own may have become. */
static bool is_of_files(int code)
{
    int primary = code & 0xff;

    return code > 0 && (primary == SQLITE_IOERR || primary == SQLITE_CANTOPEN || primary == SQLITE_CORRUPT ||
                        primary == SQLITE_NOTADB || primary == SQLITE_FULL);
}

static bool is_refused_write(int code)
{
    return code > 0 && (code & 0xff) == SQLITE_READONLY;
}

void reply_error(struct reply *reply, struct connection *connection, int code, int offset, uint32_t set)
{
    sqlite3 *db = connection->db;
    struct db_error error = {.kind = DB_ERROR, .code = code, .offset = offset, .set = set};
    const char *text;
    uint8_t *place;

    if (connection->tampered && is_of_files(code))
        error.code = DB_E_TAMPERED;
    if (connection->older && is_of_files(code))
        error.code = DB_E_FORMAT;
    if (connection->no_storage && is_of_files(code))
        error.code = DB_E_STORAGE;
    if (code == SQLITE_FULL && (connection->no_space || connection->limited))
        error.code = connection->no_space ? DB_E_SPACE : DB_E_SIZE;
    connection->no_space = connection->older = false;
    if ((connection->denied && is_of_files(code)) || (is_refused_write(code) && connection->granted == DB_ACCESS_READ))
        error.code = DB_E_DENIED;
    if (((code & 0xff) == SQLITE_NOMEM || code == SQLITE_IOERR_NOMEM) && local_self()->memory.heap_full)
        error.code = DB_E_HEAP;
    if ((code & 0xff) == SQLITE_INTERRUPT && connection->late)
        error.code = DB_E_TIME;
    if (error.code < 0)
        text = own_message(error.code);
    else if (connection->said)
        text = connection->said;
    else if (db && sqlite3_extended_errcode(db) == code)
        text = sqlite3_errmsg(db);
    else
        text = sqlite3_errstr(code);
    error.length = (uint32_t)strlen(text);
    if (error.length > DB_REPLY_MIN - sizeof(error))
        error.length = DB_REPLY_MIN - sizeof(error);
    if (db && !sqlite3_get_autocommit(db))
        error.flags = DB_TRANSACTION;
    place = reply_add(reply, sizeof(error) + error.length);
    if (!place) {
        /* Without memory for a message: without one. */
        error.length = 0;
        place = reply_add(reply, sizeof(error));
        if (!place)
            return;
    }
    memcpy(place, &error, sizeof(error));
    memcpy(place + sizeof(error), text, error.length);
}

static const uint8_t types[] = {
    [SQLITE_NULL] = DB_NULL,
    [SQLITE_INTEGER] = DB_INTEGER,
    [SQLITE_FLOAT] = DB_REAL,
    [SQLITE_TEXT] = DB_TEXT,
    [SQLITE_BLOB] = DB_BLOB,
};

enum reply_row reply_row(struct reply *reply, sqlite3_stmt *stmt, size_t *needed)
{
    int columns = sqlite3_data_count(stmt);
    size_t fixed = (size_t)columns * 9, size = fixed;
    uint8_t *place, *fields, *bytes;

    for (int i = 0; i < columns; i++) {
        int type = sqlite3_column_type(stmt, i);

        if (type == SQLITE_TEXT || type == SQLITE_BLOB)
            size += (size_t)sqlite3_column_bytes(stmt, i);
    }
    *needed = size;
    if (reply->length + size + DB_REPLY_MIN > reply->most)
        return REPLY_FULL;
    place = reply_add(reply, size);
    if (!place)
        return REPLY_NO_MEMORY;
    fields = place + columns;
    bytes = place + fixed;
    for (int i = 0; i < columns; i++, fields += 8) {
        int type = sqlite3_column_type(stmt, i);
        uint64_t field = 0;
        double number;

        place[i] = types[type];
        switch (type) {
        case SQLITE_INTEGER:
            field = (uint64_t)sqlite3_column_int64(stmt, i);
            break;
        case SQLITE_FLOAT:
            number = sqlite3_column_double(stmt, i);
            memcpy(&field, &number, sizeof(field));
            break;
        case SQLITE_TEXT:
        case SQLITE_BLOB:
            field = (uint64_t)sqlite3_column_bytes(stmt, i);
            if (field)
                memcpy(bytes, type == SQLITE_TEXT ? (const void *)sqlite3_column_text(stmt, i) : sqlite3_column_blob(stmt, i),
                       field);
            bytes += field;
            break;
        }
        memcpy(fields, &field, sizeof(field));
    }
    return REPLY_ADDED;
}

static bool add_name(struct reply *reply, const char *name)
{
    uint16_t length = UINT16_MAX;
    uint8_t *place;

    if (name)
        length = strlen(name) < UINT16_MAX ? (uint16_t)strlen(name) : UINT16_MAX - 1;
    place = reply_add(reply, sizeof(length) + (name ? length : 0));
    if (!place)
        return false;
    memcpy(place, &length, sizeof(length));
    if (name)
        memcpy(place + sizeof(length), name, length);
    return true;
}

bool reply_columns(struct reply *reply, sqlite3_stmt *stmt)
{
    for (int i = 0; i < sqlite3_column_count(stmt); i++)
        if (!add_name(reply, sqlite3_column_name(stmt, i)) || !add_name(reply, sqlite3_column_decltype(stmt, i)))
            return false;
    return true;
}
