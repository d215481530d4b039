/* SPDX-License-Identifier: Apache-2.0 */
/* The database enclave (enclaves/db/db.h): the one that a broker shares, or one of this process's own. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../enclaves/db/db.h"
#include "database.h"
#include "teemate.h"
#include "teemate_client.h"

#define WAIT_MS 30000u
#define REPLY (64u << 10)
#define REQUEST (64u << 10)

struct enclave {
    char **words;
    const char *name; /* of the database */
    /* Shared. */
    struct teemate_broker *broker;
    struct teemate_lease *lease;
    /* Private. */
    struct teemate_enclave *own;
    struct teemate_slot *slot;
    size_t length; /* of the request */
    uint8_t request[REQUEST], reply[REPLY];
};

static _Noreturn void fail(const char *what, const char *why)
{
    fprintf(stderr, "teemate-database: %s: %s\n", what, why);
    exit(1);
}

static void must(int code, const struct teemate_error *error)
{
    if (code != TEEMATE_OK)
        fail(teemate_code_name(error->code), error->text);
}

static void done(const char *what, int result, const struct teemate_diag *diag)
{
    if (result >= 0)
        return;
    fprintf(stderr, "teemate-database: %s: %s: %s\n", what, strerror(-result), diag != NULL ? diag->text : "");
    exit(1);
}

/* ---- calls ------------------------------------------------------------------ */

/* An ECALL with what is in `request`; returns the length of the reply. */
static size_t call(struct enclave *enclave, const char *name)
{
    struct teemate_error error;
    struct teemate_call own;
    size_t length = 0;
    int result;

    if (enclave->lease != NULL) {
        must(teemate_call(enclave->lease, name, enclave->request, enclave->length, enclave->reply, REPLY, &length,
                          NULL, &error),
             &error);
        return length;
    }
    result = teemate_slot_call(enclave->slot, name, strlen(name), enclave->request, enclave->length, enclave->reply,
                               REPLY, 0, &own);
    while (result == 0 && own.outcome == TEEMATE_CALL_PAUSED)
        result = teemate_slot_resume(enclave->slot, 0, &own);
    done(name, result, NULL);
    if (own.outcome != TEEMATE_CALL_DONE || own.status != 0)
        fail(name, "failed");
    return own.out_length;
}

static void add(struct enclave *enclave, const void *data, size_t length)
{
    if (REQUEST - enclave->length < length)
        fail("request", strerror(EMSGSIZE));
    memcpy(enclave->request + enclave->length, data, length);
    enclave->length += length;
}

static void begin(struct enclave *enclave, uint32_t operations)
{
    const struct db_run run = {.count = operations};

    enclave->length = 0;
    add(enclave, &run, sizeof(run));
}

static void operation(struct enclave *enclave, struct db_operation operation, const char *sql)
{
    operation.text = (uint32_t)strlen(sql);
    add(enclave, &operation, sizeof(operation));
    add(enclave, sql, operation.text);
}

/* Do them; returns how many rows came. */
static uint64_t run(struct enclave *enclave, uint32_t operations)
{
    size_t length = call(enclave, "db_run"), at = 0;
    uint64_t count = 0;

    for (; operations; operations--) {
        struct db_rows rows;

        if (at < length && enclave->reply[at] == DB_ERROR) {
            struct db_error error;

            memcpy(&error, enclave->reply + at, sizeof(error));
            fprintf(stderr, "teemate-database: %d: %.*s\n", error.code, (int)error.length,
                    (const char *)enclave->reply + at + sizeof(error));
            exit(1);
        }
        if (length - at < sizeof(rows))
            fail("db_run", "the reply was full");
        memcpy(&rows, enclave->reply + at, sizeof(rows));
        at += sizeof(rows) + rows.described + rows.length;
        count += rows.count;
    }
    return count;
}

static void enclave_script(void *state, const char *sql)
{
    begin(state, 1);
    operation(state, (struct db_operation){.kind = DB_SCRIPT}, sql);
    run(state, 1);
}

static uint64_t enclave_read(void *state, enum database_statement which, const int64_t *keys, unsigned count)
{
    struct db_operation read = {.kind = DB_EXECUTE, .sets = 1, .rows = UINT32_MAX};
    static const uint8_t types[] = {DB_INTEGER, DB_INTEGER};

    read.parameters = which == DATABASE_SPAN ? 2 : 1;
    read.length = read.parameters * 9u;
    begin(state, count);
    for (unsigned i = 0; i < count; i++) {
        const int64_t values[] = {keys[i], keys[i] + (int64_t)DATABASE_RANGE - 1};

        operation(state, read, database_sql[which]);
        add(state, types, read.parameters);
        add(state, values, read.parameters * sizeof(*values));
    }
    return run(state, count);
}

static void enclave_insert(void *state, const char *text, unsigned count)
{
    static const uint8_t type = DB_TEXT;
    const uint64_t length = DATABASE_VALUE;
    struct db_operation insert = {.kind = DB_EXECUTE, .begin = DB_BEGIN_IMMEDIATE, .parameters = 1, .sets = count};

    insert.length = count * (9u + DATABASE_VALUE);
    begin(state, 2);
    operation(state, insert, database_sql[DATABASE_INSERT]);
    for (unsigned i = 0; i < count; i++) {
        add(state, &type, sizeof(type));
        add(state, &length, sizeof(length));
        add(state, text, length);
    }
    operation(state, (struct db_operation){.kind = DB_EXECUTE}, "COMMIT");
    run(state, 2);
}

/* ---- coming in ------------------------------------------------------------------ */

static void open_database(struct enclave *enclave)
{
    struct db_open request = {.version = DB_VERSION, .flags = DB_OPEN_CREATE, .busy_ms = 60000};

    request.name_length = (uint32_t)strlen(enclave->name);
    enclave->length = 0;
    add(enclave, &request, sizeof(request));
    add(enclave, enclave->name, request.name_length);
    call(enclave, "db_open");
}

static void *prepare(int argc, char **argv, int words)
{
    struct enclave *enclave = argc == words ? calloc(1, sizeof(*enclave)) : NULL;

    if (enclave != NULL) {
        enclave->words = argv;
        enclave->name = argv[words - 1];
    }
    return enclave;
}

static void *shared_prepare(int argc, char **argv)
{
    return prepare(argc, argv, 3);
}

static void shared_open(void *state)
{
    struct enclave *enclave = state;
    struct teemate_grant *grant;
    struct teemate_error error;

    must(teemate_connect(enclave->words[0], "bench", &enclave->broker, &error), &error);
    must(teemate_attach(enclave->broker, enclave->words[1], 1, WAIT_MS, &grant, &error), &error);
    must(teemate_take(grant, 0, &enclave->lease, &error), &error);
    open_database(enclave);
}

static void shared_close(void *state)
{
    struct enclave *enclave = state;
    struct teemate_error error;

    enclave->length = 0;
    call(enclave, "db_close");
    teemate_give(enclave->lease);
    enclave->lease = NULL;
    must(teemate_disconnect(enclave->broker, &error), &error); /* detaches */
}

static void *private_prepare(int argc, char **argv)
{
    return prepare(argc, argv, 5);
}

static void private_open(void *state)
{
    struct enclave *enclave = state;
    int backend = strcmp(enclave->words[2], "sgx") == 0 ? TEEMATE_SGX : TEEMATE_SIM;
    struct teemate_slot_args args;
    struct teemate_diag diag = {0};
    uint8_t signature[1808];
    int fd, result;

    fd = open(enclave->words[1], O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, signature, sizeof(signature)) != (ssize_t)sizeof(signature))
        fail(enclave->words[1], "no SIGSTRUCT");
    close(fd);
    fd = open(enclave->words[0], O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        fail(enclave->words[0], strerror(errno));
    done(enclave->words[0], teemate_create(backend, 0, 0, fd, signature, &enclave->own, &diag), &diag);
    close(fd);
    done("map", teemate_map(enclave->own, &diag), &diag);
    done("start", teemate_private_start(enclave->own, &diag), &diag);
    fd = open(enclave->words[3], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        fail(enclave->words[3], strerror(errno));
    result = teemate_private_storage(enclave->own, fd, 0);
    close(fd);
    done(enclave->words[3], result, NULL);
    done("slot", teemate_private_slot(enclave->own, 0, &args), NULL);
    done("slot", teemate_slot_open(enclave->own, &args, &enclave->slot, &diag), &diag);
    open_database(enclave);
}

static void private_close(void *state)
{
    struct enclave *enclave = state;

    enclave->length = 0;
    call(enclave, "db_close");
    teemate_slot_close(enclave->slot);
    teemate_close(enclave->own);
}

const struct database_way database_shared = {
    shared_prepare, shared_open, shared_close, enclave_script, enclave_read, enclave_insert,
};
const struct database_way database_private = {
    private_prepare, private_open, private_close, enclave_script, enclave_read, enclave_insert,
};
