/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Functions as `teemate bench functions` measures them: in the enclave that a broker shares, in one of this
 * process's own, and what starts either of them, or a program without an enclave.
 *
 *   teemate-function shared SOCKET ENCLAVE NAME PAYLOAD [--first]
 *   teemate-function private IMAGE SIGSTRUCT BACKEND MODULE PAYLOAD [--first]
 *   teemate-function launch PAYLOAD COMMAND...
 *
 * PAYLOAD is a file.  With "--first" the function is invoked once, and what it wrote is written to stdout.  Else
 * "hold" comes in and invokes it once, "invoke" and "empty" measure one call.  "launch" measures from before a
 * command is started, with PAYLOAD as its stdin, to the first byte that it writes: the same for all sides.
 */
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../enclaves/functions/functions.h"
#include "floor.h"
#include "teemate.h"
#include "teemate_client.h"

#define WAIT_MS 30000u
#define NAME "bench"
#define REPLY (sizeof(struct fn_result) + FN_RESULT_TEXT + FN_DEFAULT_OUTPUT)

extern char **environ;

struct bytes {
    uint8_t *data;
    size_t length;
};

struct function {
    char **words;
    struct bytes request;
    uint8_t *reply;
    size_t length; /* of the reply */
    struct teemate_broker *broker;
    struct teemate_lease *lease; /* shared */
    struct teemate_enclave *own; /* private */
    struct teemate_slot *slot;
};

static _Noreturn void fail(const char *what, const char *why)
{
    fprintf(stderr, "teemate-function: %s: %s\n", what, why);
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
    fprintf(stderr, "teemate-function: %s: %s: %s\n", what, strerror(-result), diag != NULL ? diag->text : "");
    exit(1);
}

static int open_file(const char *name)
{
    int fd = open(name, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        fail(name, strerror(errno));
    return fd;
}

/* The file behind `room` bytes that are left for what comes before it. */
static struct bytes read_file(const char *name, size_t room)
{
    struct bytes bytes;
    struct stat status;
    int fd = open_file(name);

    if (fstat(fd, &status) < 0)
        fail(name, strerror(errno));
    bytes.length = room + (size_t)status.st_size;
    bytes.data = malloc(bytes.length + 1);
    if (bytes.data == NULL || read(fd, bytes.data + room, (size_t)status.st_size) != status.st_size)
        fail(name, "cannot be read");
    close(fd);
    return bytes;
}

static void call(struct function *function, const char *name, struct bytes request)
{
    struct teemate_error error;
    struct teemate_call own;
    int result;

    if (function->lease != NULL) {
        must(teemate_call(function->lease, name, request.data, request.length, function->reply, REPLY,
                          &function->length, NULL, &error),
             &error);
        return;
    }
    result = teemate_slot_call(function->slot, name, strlen(name), request.data, request.length, function->reply,
                               REPLY, 0, &own);
    while (result == 0 && own.outcome == TEEMATE_CALL_PAUSED)
        result = teemate_slot_resume(function->slot, 0, &own);
    done(name, result, NULL);
    if (own.outcome != TEEMATE_CALL_DONE || own.status != 0)
        fail(name, "failed");
    function->length = own.out_length;
}

static void make_request(struct function *function, const char *name, const char *payload)
{
    size_t name_length = strlen(name);
    struct fn_invoke head = {.name_length = (uint16_t)name_length};

    function->request = read_file(payload, sizeof(head) + name_length);
    head.stdin_length = (uint32_t)(function->request.length - sizeof(head) - name_length);
    memcpy(function->request.data, &head, sizeof(head));
    memcpy(function->request.data + sizeof(head), name, name_length);
    function->reply = malloc(REPLY);
    if (function->reply == NULL)
        fail("reply", strerror(errno));
}

/* First of all: the broker receives us while we make our request ready. */
static void shared_connect(struct function *function)
{
    struct teemate_error error;

    must(teemate_connect(function->words[0], "bench", &function->broker, &error), &error);
}

static void shared_open(struct function *function)
{
    struct teemate_grant *grant;
    struct teemate_error error;

    must(teemate_attach(function->broker, function->words[1], 1, WAIT_MS, &grant, &error), &error);
    must(teemate_take(grant, 0, &function->lease, &error), &error);
}

static void private_open(struct function *function)
{
    int backend = strcmp(function->words[2], "sgx") == 0 ? TEEMATE_SGX : TEEMATE_SIM;
    struct fn_deploy head = {.name_length = sizeof(NAME) - 1};
    struct bytes module, signature = read_file(function->words[1], 0);
    struct teemate_slot_args args;
    struct teemate_diag diag = {0};
    int fd = open_file(function->words[0]);

    if (signature.length != 1808)
        fail(function->words[1], "no SIGSTRUCT");
    done(function->words[0], teemate_create(backend, 0, 0, fd, signature.data, &function->own, &diag), &diag);
    close(fd);
    done("map", teemate_map(function->own, &diag), &diag);
    done("start", teemate_private_start(function->own, &diag), &diag);
    done("slot", teemate_private_slot(function->own, 0, &args), NULL);
    done("slot", teemate_slot_open(function->own, &args, &function->slot, &diag), &diag);
    module = read_file(function->words[3], sizeof(head) + sizeof(NAME) - 1);
    head.module_length = module.length - sizeof(head) - (sizeof(NAME) - 1);
    memcpy(module.data, &head, sizeof(head));
    memcpy(module.data + sizeof(head), NAME, sizeof(NAME) - 1);
    call(function, "deploy", module);
    free(module.data);
    free(signature.data);
}

static double invoke_once(void *state)
{
    struct function *function = state;
    double start = floor_now_ns();

    call(function, "invoke", function->request);
    return floor_now_ns() - start;
}

static double empty_once(void *state)
{
    struct function *function = state;
    double start = floor_now_ns();

    call(function, "empty", (struct bytes){0});
    return floor_now_ns() - start;
}

static double hold_once(void *state)
{
    struct function *function = state;
    double start = floor_now_ns();

    if (function->lease == NULL && function->own == NULL) {
        if (function->broker != NULL)
            shared_open(function);
        else
            private_open(function);
    }
    call(function, "invoke", function->request);
    return floor_now_ns() - start;
}

static int work(char **words, int first)
{
    int shared = strcmp(words[0], "shared") == 0;
    struct function function = {.words = words + 1};
    const struct floor floors[] = {
        {hold_once, "hold", &function}, {invoke_once, "invoke", &function}, {empty_once, "empty", &function}};

    if (shared)
        shared_connect(&function);
    make_request(&function, shared ? words[3] : NAME, words[shared ? 4 : 5]);
    if (first) {
        struct fn_result result;
        const uint8_t *out = function.reply;

        hold_once(&function);
        memcpy(&result, out, sizeof(result));
        out += sizeof(result) + result.text_length;
        if (write(STDOUT_FILENO, out, result.stdout_length) != (ssize_t)result.stdout_length)
            fail("stdout", strerror(errno));
        return 0;
    }
    return floor_serve(floors, 3);
}

/* ---- starting programs ------------------------------------------------------------- */

static double launch_once(void *state)
{
    char **words = state, byte, rest[4096];
    posix_spawn_file_actions_t actions;
    int ends[2], input = open_file(words[0]), status, error;
    double start = floor_now_ns(), end;
    ssize_t got;
    bool wrote;
    pid_t pid;

    if (pipe2(ends, O_CLOEXEC) < 0)
        floor_fail("pipe", errno);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, input, STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    error = posix_spawn(&pid, words[1], &actions, NULL, words + 1, environ);
    if (error)
        floor_fail(words[1], error);
    close(ends[1]);
    got = read(ends[0], &byte, 1);
    end = floor_now_ns();
    posix_spawn_file_actions_destroy(&actions);
    close(input);
    wrote = got == 1;
    while (got > 0)
        got = read(ends[0], rest, sizeof(rest));
    close(ends[0]);
    if (waitpid(pid, &status, 0) < 0 || status != 0 || !wrote)
        fail(words[1], "wrote nothing, or failed");
    return end - start;
}

int main(int argc, char **argv)
{
    int first = argc > 1 && strcmp(argv[argc - 1], "--first") == 0;
    int words = argc - first;

    if ((words == 6 && strcmp(argv[1], "shared") == 0) || (words == 7 && strcmp(argv[1], "private") == 0))
        return work(argv + 1, first);
    if (argc >= 4 && strcmp(argv[1], "launch") == 0) {
        const struct floor launch = {launch_once, "launch", argv + 2};

        return floor_serve(&launch, 1);
    }
    fprintf(stderr, "usage: teemate-function shared|private|launch ...\n");
    return 2;
}
