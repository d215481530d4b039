/* SPDX-License-Identifier: Apache-2.0 */
#include "manage.h"

#include "file.h"
#include "files.h"
#include "head.h"
#include "reply.h"
#include "vfs.h"

#define LISTED_BYTES 1024u /* of names, in one call */
#define CHANGE_ROUNDS 500u /* of 10 ms that another slot may take to open the database, or to change its rights */

int manage_claim(const char *name, struct database **result)
{
    struct database *database;

    if (database_find(name, &database))
        return SQLITE_NOMEM;
    if (database_holds(database) & (HOLDS_OPEN | HOLDS_SETUP) ||
        !database_hold(database, HOLDS_SETUP, HOLDS_SETUP | HOLDS_OPEN))
        return SQLITE_BUSY;
    if (!database_is(database, name)) {
        database_drop(database, HOLDS_SETUP);
        return SQLITE_BUSY; /* somebody has deleted it just now, and the struct is another's */
    }
    *result = database;
    return SQLITE_OK;
}

static int answer(struct tm_request *rq, int code)
{
    struct reply reply = {0};
    int status;

    if (!code)
        return 0;
    reply_error(&reply, connection_self(), code, -1, 0);
    status = tm_reply(rq, reply.start, reply.length);
    reply_close(&reply);
    return status ? status : DB_FAILED;
}

/* ---- deleting ------------------------------------------------------------------- */

/* Is it the caller's?  So is what never became a database.  One that another signer's enclave made is nobody's here. */
static int may_delete(struct database *database)
{
    struct record_file file = {.database = database, .kind = FILE_MAIN};
    int status = 0;

    if (!database->ready) {
        status = tm_file_open(database->name, TM_FILE_READ_ONLY, &file.handle);
        if (!status) {
            status = head_read(&file);
            tm_file_close(file.handle);
        }
    }
    if (status == -TM_ENOENT)
        return SQLITE_OK;
    if (status && status != RECORD_FORMAT)
        return file_code(status, SQLITE_CANTOPEN);
    return head_access(database) == DB_ACCESS_OWNER ? SQLITE_OK : DB_E_DENIED;
}

/* What is known goes first: a death in between leaves a database that is opened as one of an earlier life. */
static int delete(const char *name)
{
    struct database *database;
    char log[DB_NAME_MAX + 8];
    int code = head_admits(name, DB_ACCESS_OWNER) ? manage_claim(name, &database) : DB_E_DENIED, status;

    if (code)
        return code;
    code = may_delete(database);
    if (!code) {
        database_wipe(database);
        cache_drop((uint64_t)database);
        vfs_log_name(name, log);
        status = tm_file_delete(name);
        if (!status || status == -TM_ENOENT) /* a deletion that was cut short is gone on with */
            status = tm_file_delete(log);
        if (!status || status == -TM_ENOENT)
            status = root_delete(name);
        code = status == -TM_ENOENT ? SQLITE_OK : file_code(status, SQLITE_IOERR_DELETE);
    }
    database_drop(database, HOLDS_SETUP);
    return code;
}

TM_ECALL(db_delete)
{
    char name[DB_NAME_MAX + 1] = {0};

    if (rq->in_len > DB_NAME_MAX || !connection_name_is_right((const char *)rq->in, (uint32_t)rq->in_len))
        return TM_E_ARGUMENT;
    if (!connection_self())
        return TM_E_STATE; /* SQLite's memory is the connection's */
    memcpy(name, rq->in, rq->in_len);
    return answer(rq, delete(name));
}

/* ---- rights --------------------------------------------------------------------- */

/* One right more, another one instead, or one less: false when there are as many as there may be. */
static bool change(struct rights *rights, const struct db_right *right)
{
    uint32_t place = 0;

    while (place < rights->count &&
           (rights->list[place].id != right->id || rights->list[place].grantee != right->grantee))
        place++;
    if (right->access == DB_ACCESS_NONE) {
        if (place < rights->count) {
            rights->list[place] = rights->list[--rights->count];
            memset(&rights->list[rights->count], 0, sizeof(*rights->list));
        }
        return true;
    }
    if (place == DB_RIGHTS_MAX)
        return false;
    rights->list[place] = *right;
    rights->count += place == rights->count;
    return true;
}

/* The owner changes something about it: one right, or its size when `right` is NULL. */
static int alter(struct database *database, const struct db_right *right, uint64_t pages_most)
{
    struct record_file file = {.database = database, .kind = FILE_MAIN};
    struct rights rights;
    int status;

    if (head_access(database) != DB_ACCESS_OWNER)
        return DB_E_DENIED;
    for (uint32_t rounds = 0; !database_hold(database, HOLDS_SETUP, HOLDS_SETUP); rounds++) {
        if (rounds == CHANGE_ROUNDS)
            return SQLITE_BUSY;
        sqlite3_sleep(10);
    }
    head_rights(database, &rights);
    if (!right)
        rights.pages_most = pages_most;
    else if (!change(&rights, right)) {
        database_drop(database, HOLDS_SETUP);
        return DB_E_RIGHTS;
    }
    status = tm_file_open(database->name, 0, &file.handle);
    if (!status) {
        status = head_change(&file, &rights);
        tm_file_close(file.handle);
    }
    database_drop(database, HOLDS_SETUP);
    return file_code(status, SQLITE_IOERR_WRITE);
}

TM_ECALL(db_grant)
{
    struct connection *self = connection_self();
    struct db_right right;
    int code;

    if (rq->in_len != sizeof(right))
        return TM_E_ARGUMENT;
    memcpy(&right, rq->in, sizeof(right));
    if (right.reserved || (right.grantee != DB_GRANT_UID && right.grantee != DB_GRANT_GID) ||
        right.access > DB_ACCESS_WRITE)
        return TM_E_ARGUMENT;
    if (!self || !self->database)
        return TM_E_STATE;
    code = connection_allowed(self);
    return answer(rq, code ? code : alter(self->database, &right, 0));
}

TM_ECALL(db_limit)
{
    struct connection *self = connection_self();
    struct db_limit limit;
    int code;

    if (rq->in_len != sizeof(limit))
        return TM_E_ARGUMENT;
    memcpy(&limit, rq->in, sizeof(limit));
    if (limit.pages > (uint64_t)TAGS_IN_CHUNK * CHUNKS_MOST)
        return TM_E_ARGUMENT;
    if (!self || !self->database)
        return TM_E_STATE;
    code = connection_allowed(self);
    return answer(rq, code ? code : alter(self->database, NULL, limit.pages));
}

TM_ECALL(db_describe)
{
    struct connection *self = connection_self();
    struct db_description description = {0};
    struct rights rights;
    int status;

    if (!self || !self->database)
        return TM_E_STATE;
    status = connection_allowed(self);
    if (status)
        return answer(rq, status);
    head_rights(self->database, &rights);
    description.owner = rights.owner;
    description.access = head_access(self->database);
    description.count = description.access == DB_ACCESS_OWNER ? rights.count : 0;
    description.pages_most = rights.pages_most;
    description.pages = self->database->files[FILE_MAIN].records;
    status = tm_reply(rq, &description, sizeof(description));
    return status ? status : tm_reply(rq, rights.list, description.count * sizeof(*rights.list));
}

/* ---- listing -------------------------------------------------------------------- */

/* One that there is and that the caller may use. */
static bool look(const char *name, struct db_listing *listing)
{
    struct rights rights;
    int status = head_rights_of(name, &rights);

    if (status && status != RECORD_FORMAT) /* of an earlier format: its owner can delete it */
        return false;
    listing->owner = rights.owner;
    listing->access = rights_access(&rights);
    memcpy(listing->name, name, strlen(name) + 1);
    return listing->access != DB_ACCESS_NONE;
}

TM_ECALL(db_list)
{
    struct db_listed listed = {0};
    struct db_list request;
    char *names;
    int64_t got;
    int status;

    if (rq->in_len != sizeof(request))
        return TM_E_ARGUMENT;
    memcpy(&request, rq->in, sizeof(request));
    if (!connection_self())
        return TM_E_STATE;
    if (tm_reply_room(rq) < sizeof(listed) + LISTED_BYTES / 2 * sizeof(struct db_listing)) {
        rq->out_len = sizeof(listed) + LISTED_BYTES / 2 * sizeof(struct db_listing);
        return TM_E_SPACE;
    }
    names = sqlite3_malloc(LISTED_BYTES + 1);
    if (!names)
        return answer(rq, SQLITE_NOMEM);
    got = tm_file_list(request.from, names, LISTED_BYTES);
    if (got < 0) {
        sqlite3_free(names);
        return answer(rq, file_code((int)got, SQLITE_IOERR));
    }
    names[got] = 0;
    listed.next = request.from;
    for (int64_t at = 0; at < got; at += (int64_t)strlen(names + at) + 1)
        listed.next++;
    if (!got)
        listed.next = 0;
    status = tm_reply(rq, &listed, sizeof(listed));
    for (int64_t at = 0; at < got && !status; at += (int64_t)strlen(names + at) + 1) {
        struct db_listing listing = {0};

        if (connection_name_is_right(names + at, (uint32_t)strlen(names + at)) && look(names + at, &listing))
            status = tm_reply(rq, &listing, sizeof(listing));
    }
    sqlite3_free(names);
    return status;
}
