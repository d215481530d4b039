/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The C library, one step at a time: reads commands, one a line, and answers each with a line,
 * "ok ..." or "error CODE STATUS VECTOR NEEDED LIMIT|SETTING|TEXT".  Bytes are hexadecimal, "-" is none.
 *
 *   connect PATH NAME      disconnect            ping             list
 *   attach NAME SLOTS MS   detach G              acquire G N MS   release G N
 *   take G MS              give L                call L NAME HEX MS ROOM
 *   ocall L NAME HEX HOW   patient L NAME HEX N  raw L RDI RSI RDX MS
 *   event MS               fds                   mapped           stopped         handlers
 *   start N COMMAND...     join N                fork COMMAND...  calls L COUNT  pings COUNT
 *
 * G and L are numbers that attach and take answered with, counted from 0.  start runs a command in thread N,
 * and join answers what it answered.  HOW of ocall: echo, fail, abandon, none, or wait (until `stopped`).
 * patient gives the call up when it was asked N times.
 */
#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <teemate_client.h>
#include <unistd.h>

#define MOST 64
#define LINE (1 << 18)

static struct teemate_broker *broker;
static struct teemate_grant *grants[MOST];
static struct teemate_lease *leases[MOST];
static int grant_count, lease_count;
static atomic_int stopped, in_handler;

struct job {
    pthread_t thread;
    char *line, *answer;
};
static struct job jobs[MOST];

static void run(char *line, char *answer);

static void finish(char *answer, int code, const struct teemate_error *error)
{
    if (code == TEEMATE_OK)
        snprintf(answer, LINE, "ok");
    else if (error->code != code)
        snprintf(answer, LINE, "error mismatch 0 0 0 ||returned %d, but the error is of %d", code, error->code);
    else
        snprintf(answer, LINE, "error %s %d %u %llu %s|%s|%s", teemate_code_name(code), error->status, error->vector,
                 (unsigned long long)error->needed, error->limit, error->setting, error->text);
}

static size_t from_hex(const char *hex, unsigned char *data)
{
    size_t size = 0;
    unsigned byte;

    for (; hex[0] != '-' && sscanf(hex, "%2x", &byte) == 1; hex += 2)
        data[size++] = (unsigned char)byte;
    return size;
}

static void to_hex(char *answer, const unsigned char *data, size_t size)
{
    answer += sprintf(answer, "ok ");
    for (size_t i = 0; i < size; i++)
        answer += sprintf(answer, "%02x", data[i]);
}

static int handler(void *context, const char *name, size_t name_length, const void *data, size_t length,
                   const void **answer, size_t *answer_length)
{
    const char *how = context;
    static _Thread_local char echoed[LINE]; /* more than the library's own threads have as a stack */

    atomic_fetch_add(&in_handler, 1);
    while (strcmp(how, "wait") == 0 && !atomic_load(&stopped))
        usleep(1000);
    atomic_fetch_sub(&in_handler, 1);
    if (strcmp(how, "fail") == 0)
        return -1;
    if (strcmp(how, "abandon") == 0)
        return TEEMATE_OCALL_ABANDON;
    memcpy(echoed, name, name_length);
    memcpy(echoed + name_length, data, length);
    *answer = echoed;
    *answer_length = name_length + length;
    return 0;
}

static int give_up(void *context)
{
    int *left = context;

    return --*left < 0;
}

static void call(char *answer, int lease, const char *name, const char *hex, size_t room,
                 const struct teemate_call_options *options)
{
    unsigned char *in = malloc(LINE), *out = malloc(room + 1);
    struct teemate_error error = {0};
    size_t size = from_hex(hex, in), length = 0;
    int code = teemate_call(leases[lease], name, in, size, out, room, &length, options, &error);

    finish(answer, code, &error);
    if (code == TEEMATE_OK)
        to_hex(answer, out, length);
    free(in);
    free(out);
}

static int count_fds(void)
{
    DIR *folder = opendir("/proc/self/fd");
    int count = -1; /* its own */

    while (readdir(folder) != NULL)
        count++;
    closedir(folder);
    return count - 2;
}

/* Mappings in the address window of enclaves. */
static int count_mapped(void)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    unsigned long from;
    char line[512];
    int count = 0;

    while (fgets(line, sizeof(line), maps))
        count += sscanf(line, "%lx", &from) == 1 && from >= 0x400000000000ul && from < 0x410000000000ul;
    fclose(maps);
    return count;
}

static void list(char *answer)
{
    struct teemate_enclave_entry entries[8];
    struct teemate_error error = {0};
    size_t count = 0;
    int code = teemate_enclaves(broker, entries, 8, &count, &error);

    finish(answer, code, &error);
    for (size_t i = 0; code == TEEMATE_OK && i < count && i < 8; i++)
        sprintf(answer + strlen(answer), " %s:%u:%u:%llu:%llu/%llu", entries[i].name, entries[i].backend, entries[i].state,
                (unsigned long long)entries[i].base, (unsigned long long)entries[i].slots_free,
                (unsigned long long)entries[i].slots_total);
}

static void next_event(char *answer, int timeout)
{
    struct teemate_error error = {0};
    struct teemate_event event;
    int code = teemate_next_event(broker, timeout, &event, &error);

    finish(answer, code, &error);
    if (code == TEEMATE_OK)
        sprintf(answer + 2, " %d %llu %s %u %llu", event.kind, (unsigned long long)event.grant,
                event.enclave[0] ? event.enclave : "-", event.slots, (unsigned long long)event.missed);
}

static void *job_run(void *context)
{
    struct job *job = context;

    run(job->line, job->answer);
    return NULL;
}

static void in_child(char *line, char *answer)
{
    int ends[2];
    ssize_t size;
    pid_t child;

    if (pipe(ends) != 0)
        abort();
    child = fork();
    if (child == 0) {
        run(line, answer);
        if (write(ends[1], answer, strlen(answer) + 1) < 0)
            _exit(1);
        _exit(0);
    }
    close(ends[1]);
    size = read(ends[0], answer, LINE);
    close(ends[0]);
    waitpid(child, NULL, 0);
    if (size <= 0)
        snprintf(answer, LINE, "error child 0 0 0 ||the child ended without a word");
}

/* Call over and over: COUNT empty calls. */
static void many(char *answer, int lease, int count)
{
    struct teemate_error error = {0};
    int code = TEEMATE_OK;

    while (count-- > 0 && code == TEEMATE_OK)
        code = teemate_call(leases[lease], "empty", NULL, 0, NULL, 0, NULL, NULL, &error);
    finish(answer, code, &error);
}

static void run(char *line, char *answer)
{
    char *verb = strsep(&line, " "), *arg[6] = {0};
    struct teemate_call_options options = TEEMATE_CALL_OPTIONS_DEFAULT;
    struct teemate_error error = {0};
    int code = TEEMATE_OK;

    if (strcmp(verb, "fork") == 0) {
        in_child(line, answer);
        return;
    }
    if (strcmp(verb, "start") == 0) {
        struct job *job = &jobs[atoi(strsep(&line, " "))];

        job->line = strdup(line);
        job->answer = malloc(LINE);
        pthread_create(&job->thread, NULL, job_run, job);
        snprintf(answer, LINE, "ok");
        return;
    }
    for (int i = 0; i < 6 && line != NULL; i++)
        arg[i] = strsep(&line, " ");
#define NUMBER(i) atoi(arg[i])
#define GRANT grants[NUMBER(0)]
    if (strcmp(verb, "join") == 0) {
        struct job *job = &jobs[NUMBER(0)];

        pthread_join(job->thread, NULL);
        strcpy(answer, job->answer);
        free(job->line);
        free(job->answer);
    } else if (strcmp(verb, "connect") == 0) {
        finish(answer, teemate_connect(arg[0], arg[1], &broker, &error), &error);
    } else if (strcmp(verb, "disconnect") == 0) {
        code = teemate_disconnect(broker, &error);
        broker = code == TEEMATE_OK ? NULL : broker;
        finish(answer, code, &error);
    } else if (strcmp(verb, "ping") == 0) {
        finish(answer, teemate_ping(broker, &error), &error);
    } else if (strcmp(verb, "list") == 0) {
        list(answer);
    } else if (strcmp(verb, "attach") == 0) {
        code = teemate_attach(broker, arg[0], (uint32_t)NUMBER(1), (uint32_t)NUMBER(2), &grants[grant_count], &error);
        finish(answer, code, &error);
        if (code == TEEMATE_OK) {
            sprintf(answer, "ok %d %llu", grant_count, (unsigned long long)teemate_grant_number(grants[grant_count]));
            grant_count++;
        }
    } else if (strcmp(verb, "detach") == 0) {
        finish(answer, teemate_detach(GRANT, &error), &error);
    } else if (strcmp(verb, "acquire") == 0) {
        finish(answer, teemate_acquire(GRANT, (uint32_t)NUMBER(1), (uint32_t)NUMBER(2), &error), &error);
    } else if (strcmp(verb, "release") == 0) {
        finish(answer, teemate_release(GRANT, (uint32_t)NUMBER(1), &error), &error);
    } else if (strcmp(verb, "take") == 0) {
        code = teemate_take(GRANT, (uint32_t)NUMBER(1), &leases[lease_count], &error);
        finish(answer, code, &error);
        if (code == TEEMATE_OK) {
            sprintf(answer, "ok %d %u", lease_count, teemate_lease_slot(leases[lease_count]));
            lease_count++;
        }
    } else if (strcmp(verb, "give") == 0) {
        teemate_give(leases[NUMBER(0)]);
        snprintf(answer, LINE, "ok");
    } else if (strcmp(verb, "call") == 0) {
        options.timeout_ms = NUMBER(3);
        call(answer, NUMBER(0), arg[1], arg[2], (size_t)NUMBER(4), &options);
    } else if (strcmp(verb, "ocall") == 0) {
        options.ocall = strcmp(arg[3], "none") == 0 ? NULL : handler;
        options.context = arg[3];
        call(answer, NUMBER(0), arg[1], arg[2], 4096, &options);
    } else if (strcmp(verb, "patient") == 0) {
        int left = NUMBER(3);

        options.give_up = give_up;
        options.context = &left;
        call(answer, NUMBER(0), arg[1], arg[2], 4096, &options);
    } else if (strcmp(verb, "raw") == 0) {
        struct teemate_regs regs = {.rdi = strtoull(arg[1], NULL, 0), .rsi = strtoull(arg[2], NULL, 0),
                                    .rdx = strtoull(arg[3], NULL, 0)};

        options.timeout_ms = NUMBER(4);
        code = teemate_call_raw(leases[NUMBER(0)], &regs, &options, &error);
        finish(answer, code, &error);
        if (code == TEEMATE_OK)
            sprintf(answer, "ok %llu %llu %llu", (unsigned long long)regs.rdi, (unsigned long long)regs.rsi,
                    (unsigned long long)(regs.r12 | regs.r13));
    } else if (strcmp(verb, "event") == 0) {
        next_event(answer, NUMBER(0));
    } else if (strcmp(verb, "calls") == 0) {
        many(answer, NUMBER(0), NUMBER(1));
    } else if (strcmp(verb, "pings") == 0) {
        for (int left = NUMBER(0); left > 0 && code == TEEMATE_OK; left--)
            code = teemate_ping(broker, &error);
        finish(answer, code, &error);
    } else if (strcmp(verb, "fds") == 0) {
        snprintf(answer, LINE, "ok %d", count_fds());
    } else if (strcmp(verb, "mapped") == 0) {
        snprintf(answer, LINE, "ok %d", count_mapped());
    } else if (strcmp(verb, "handlers") == 0) {
        snprintf(answer, LINE, "ok %d", atomic_load(&in_handler));
    } else if (strcmp(verb, "stopped") == 0) {
        atomic_store(&stopped, 1);
        snprintf(answer, LINE, "ok");
    } else {
        snprintf(answer, LINE, "error verb 0 0 0 ||%s", verb);
    }
}

int main(void)
{
    char *line = NULL, *answer = malloc(LINE);
    size_t room = 0;
    ssize_t length;

    setvbuf(stdout, NULL, _IOLBF, 0);
    while ((length = getline(&line, &room, stdin)) > 0) {
        line[length - 1] = 0;
        run(line, answer);
        printf("%s\n", answer);
        fflush(stdout);
    }
    free(line);
    free(answer);
    return 0;
}
