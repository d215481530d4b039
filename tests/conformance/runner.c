/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs cases of the conformance table on a backend and prints what a caller saw.
 *
 *   runner BACKEND FOLDER < cases
 *
 * A case is a line "name|step; step; ...".  Each case runs in a process and an enclave of its
 * own; what its steps saw goes to one line "name|seen; seen; ...".  A step that begins with '-'
 * prepares: it prints nothing, and when it fails the case ends with "FAILED" (an exception in
 * the enclave is no failure; cases make them on purpose).
 *
 * Everything goes through teemate.h and sgx2.h, so the same cases run on any backend.  A call
 * that is paused though nobody asked for it (teemate_enter may do so for any signal, or for
 * none) is resumed, until `run.pause` is over.
 *
 * A TCS is busy only while its thread is on a processor: any interrupt makes it idle for a
 * moment, with CSSA + 1.  A case that needs it busy (step "contend") sees from the thread's
 * SSA frame whether one came in between; then it says nothing, and is run once more.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "sgx2.h"
#include "teemate.h"

#define SECONDS(n) ((n) * 1000000000ull)
/* CF PF AF ZF SF OF: all set before a leaf, so that one sees what it clears. */
#define FLAGS 0x8d5u
#define HOLE_SIZE 0x7000u /* as in conformance_image.py */
/* Exit status of a case that an interrupt came into, and how often it is run again. */
#define INTERRUPTED 4
#define AGAIN 200

enum op { OP_NONE, OP_ENCLU, OP_COPY, OP_READ, OP_WRITE, OP_CALL, OP_SPIN, OP_FAULT, OP_PATTERN, OP_STATE, OP_EEXIT };

/* Mirrored in enclave.S. */
struct block {
    uint64_t rax, rbx, rcx, rdx, rflags, out_rax, out_rflags;
    volatile uint64_t started, stop;
    uint64_t state[8];
};

struct place {
    char name[24];
    uint64_t offset;
};

struct spinner {
    pthread_t thread;
    struct block block;
    char tcs[24];
    char seen[128];
    bool running;
};

static struct {
    int backend;
    const char *folder;
    struct place places[128];
    size_t place_count;
    struct teemate_enclave *enclave;
    struct teemate_enclave_info info;
    struct teemate_segment segments[256]; /* of the enclave, and the hole */
    size_t segment_count;
    bool mapped_tcs[128];
    struct spinner spinner;
    struct block block;
    struct block paused; /* of a call that is paused: it looks at it again */
    struct sgx_enclave_run run;
    struct teemate_regs regs;
    uint64_t handler; /* the next entry's user handler */
    uint64_t pause;
    uint64_t xmm7;             /* right after the last entry */
    volatile sig_atomic_t traps; /* SIGTRAPs */
    uint8_t buffer[4096] __attribute__((aligned(4096))); /* "host": memory outside of ELRANGE */
} run;

static void host_code(void)
{
}

static void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
static void die(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    fflush(stdout);
    _exit(3);
}

/* The value of "key=" in the step's words, or NULL. */
static char *word(char **words, const char *key)
{
    size_t length = strlen(key);

    for (; *words; words++)
        if (strncmp(*words, key, length) == 0 && (*words)[length] == '=')
            return *words + length + 1;
    return NULL;
}

/* NAME, NAME+N, NAME-N or a number; names are places in ELRANGE, or "host" and "hostcode". */
static uint64_t value(const char *text)
{
    char name[24], *end;
    size_t n = strcspn(text, "+-");
    uint64_t result;

    if (text[0] >= '0' && text[0] <= '9')
        return strtoull(text, NULL, 0);
    if (n >= sizeof(name))
        die("bad address %s", text);
    memcpy(name, text, n);
    name[n] = 0;
    if (strcmp(name, "host") == 0) {
        result = (uint64_t)run.buffer;
    } else if (strcmp(name, "hostcode") == 0) {
        result = (uint64_t)host_code;
    } else {
        size_t i;

        for (i = 0; i < run.place_count && strcmp(run.places[i].name, name); i++)
            ;
        if (i == run.place_count)
            die("no place %s", name);
        result = run.info.base + run.places[i].offset;
    }
    if (text[n])
        result += text[n] == '+' ? strtoull(text + n + 1, &end, 0) : -strtoull(text + n + 1, &end, 0);
    return result;
}

static uint64_t offset_of(const char *text)
{
    return value(text) - run.info.base;
}

/* An address as people (and other bases) can compare it. */
static const char *where(uint64_t addr, char *text, size_t size)
{
    if (addr - run.info.base < run.info.size)
        snprintf(text, size, "@%#" PRIx64, addr - run.info.base);
    else if (addr - (uint64_t)run.buffer < sizeof(run.buffer))
        snprintf(text, size, "host");
    else
        snprintf(text, size, "elsewhere");
    return text;
}

static uint8_t *read_file(const char *name, size_t size)
{
    char path[512];
    uint8_t *data = malloc(size);
    FILE *file;

    snprintf(path, sizeof(path), "%s/%s", run.folder, name);
    file = fopen(path, "re");
    if (!file || !data || fread(data, 1, size, file) != size)
        die("cannot read %s", path);
    fclose(file);
    return data;
}

static const char *error_name(int error, char *text, size_t size)
{
    switch (error) {
    case 0:
        return "ok";
    case -EINVAL:
        return "EINVAL";
    case -EACCES:
        return "EACCES";
    case -EBADMSG:
        return "EBADMSG";
    case -EKEYREJECTED:
        return "EKEYREJECTED";
    case -EKEYEXPIRED:
        return "EKEYEXPIRED";
    case -EPERM:
        return "EPERM";
    case -EFAULT:
        return "EFAULT";
    case -EBUSY:
        return "EBUSY";
    case -ENODEV:
        return "ENODEV";
    case -EIO:
        return "EIO";
    default:
        snprintf(text, size, "errno %d", -error);
        return text;
    }
}

/* Which of the flags that leaves touch are set. */
static const char *flag_names(uint64_t rflags, char text[8])
{
    static const struct {
        uint32_t bit;
        char name;
    } flags[] = {{1, 'C'}, {4, 'P'}, {0x10, 'A'}, {0x40, 'Z'}, {0x80, 'S'}, {0x800, 'O'}};
    char *at = text;

    for (size_t i = 0; i < 6; i++)
        if (rflags & flags[i].bit)
            *at++ = flags[i].name;
    if (at == text)
        *at++ = '-';
    *at = 0;
    return text;
}

static void forget(void)
{
    if (run.enclave)
        teemate_close(run.enclave);
    run.enclave = NULL;
    memset(run.mapped_tcs, 0, sizeof(run.mapped_tcs));
}

/* Close what is there, and open the same enclave with run.segments. */
static int open_again(struct teemate_enclave *old, struct teemate_diag *diag)
{
    int fd = dup(teemate_enclave_fd(old)), error;

    teemate_close(old);
    run.enclave = NULL;
    error = teemate_open(run.backend, fd, run.info.base, run.info.size, run.segments, run.segment_count, &run.enclave, diag);
    return error ? error : teemate_map(run.enclave, diag);
}

/* The enclave is opened a second time, with a mapping of the hole as well. */
static int create(char **words, char *seen, size_t size)
{
    char file[128], name[32], *image = word(words, "image"), *sig = word(words, "sig");
    struct teemate_enclave *made;
    struct teemate_segment *segments = run.segments;
    struct teemate_diag diag = {0};
    uint8_t *sigstruct;
    size_t count, at = 0;
    int fd, error;

    forget();
    if (!image)
        image = "plain";
    if (!sig)
        sig = "good";
    snprintf(file, sizeof(file), "%s.%s.sig", image, sig);
    sigstruct = read_file(file, sizeof(struct sgx_sigstruct));
    snprintf(file, sizeof(file), "%s/%s.sgxs", run.folder, image);
    fd = open(file, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        die("cannot open %s", file);
    error = teemate_create(run.backend, 0, word(words, "debug") ? SGX_ATTR_DEBUG : 0, fd, sigstruct, &made, &diag);
    close(fd);
    free(sigstruct);
    if (error) {
        snprintf(seen, size, "%s code=%d", error_name(error, name, sizeof(name)), diag.code);
        if (getenv("CONFORMANCE_VERBOSE"))
            fprintf(stderr, "%s\n", diag.text);
        return 0;
    }
    teemate_enclave_describe(made, &run.info);
    count = teemate_enclave_segments(made, segments, 200);
    /* A window on what was not added; the kernel lets a process map that as it likes. */
    while (at < count && segments[at].offset < offset_of("hole"))
        at++;
    memmove(&segments[at + 1], &segments[at], (count - at) * sizeof(segments[0]));
    segments[at] = (struct teemate_segment){.offset = offset_of("hole"), .size = HOLE_SIZE, .prot = 7, .type = SGX_PT_REG};
    run.segment_count = count + 1;
    if (open_again(made, &diag))
        die("cannot open the enclave: %s", diag.text);
    snprintf(seen, size, "ok");
    return 0;
}

/*
 * The enclave, mapped anew with these permissions for the page at an address: a segment of its
 * own, between what is left of the one that it was in.
 */
static void step_remap(char **words, char *seen, size_t size)
{
    uint64_t offset = offset_of(words[1]);
    struct teemate_segment *segments = run.segments, whole;
    struct teemate_diag diag = {0};
    char name[32];
    size_t i = 0;

    while (i < run.segment_count && offset - segments[i].offset >= segments[i].size)
        i++;
    if (i == run.segment_count)
        die("no segment at %s", words[1]);
    whole = segments[i];
    memmove(&segments[i + 3], &segments[i + 1], (run.segment_count - i - 1) * sizeof(whole));
    for (size_t part = 0; part < 3; part++)
        segments[i + part] = whole;
    segments[i].size = offset - whole.offset;
    segments[i + 1].offset = offset;
    segments[i + 1].size = SGX_PAGE;
    segments[i + 1].prot = (uint32_t)strtoul(words[2], NULL, 0);
    segments[i + 2].offset = offset + SGX_PAGE;
    segments[i + 2].size = whole.offset + whole.size - offset - SGX_PAGE;
    run.segment_count += 2;
    for (i = run.segment_count; i-- > 0;)
        if (!segments[i].size)
            memmove(&segments[i], &segments[i + 1], (--run.segment_count - i) * sizeof(whole));
    memset(run.mapped_tcs, 0, sizeof(run.mapped_tcs));
    snprintf(seen, size, "%s", error_name(open_again(run.enclave, &diag), name, sizeof(name)));
}

/* The TCS's offset.  It is mapped first, unless it was a regular page: that one is mapped. */
static uint64_t tcs_of(const char *name)
{
    uint64_t offset = offset_of(name ? name : "t0");
    struct teemate_diag diag = {0};
    size_t i = 0;

    while (i < run.segment_count && offset - run.segments[i].offset >= run.segments[i].size)
        i++;
    if (i < run.segment_count && run.segments[i].type != SGX_PT_TCS)
        return offset;
    if (!run.mapped_tcs[offset / SGX_PAGE % 128]) {
        if (teemate_map_tcs(run.enclave, offset, &diag))
            die("cannot map TCS %s: %s", name, diag.text);
        run.mapped_tcs[offset / SGX_PAGE % 128] = true;
    }
    return offset;
}

static const char *vector_name(uint32_t vector, char text[32])
{
    static const char *const names[20] = {[0] = "DE", [1] = "DB", [3] = "BP", [6] = "UD", [13] = "GP", [16] = "MF", [17] = "AC", [19] = "XM"};

    if (vector < 20 && names[vector])
        return names[vector];
    snprintf(text, 32, "%u", vector);
    return text;
}

/*
 * The SDM leaves open how a leaf's operand is walked (as a read or a write, present or not),
 * so for these only the SGX bit counts.  For accesses of the enclave's own instructions all do.
 */
static const char *pf_name(uint32_t error, enum op op, char text[32])
{
    if (op == OP_READ || op == OP_WRITE || op == OP_CALL)
        snprintf(text, 32, "%#x", error);
    else
        snprintf(text, 32, "%s", error & SGX_PF_SGX ? "sgx" : "");
    return text;
}

static uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * SECONDS(1) + (uint64_t)time.tv_nsec;
}

/* teemate_enter, and on again when it paused of its own accord. */
static int enter_patiently(uint64_t tcs, uint32_t function, struct sgx_enclave_run *result, struct teemate_regs *regs)
{
    uint64_t end = now() + run.pause;
    int outcome;

    for (;;) {
        uint64_t at = now();

        result->user_handler = run.handler;
        outcome = teemate_enter(run.enclave, tcs, regs, function, at < end ? end - at : 1, result);
        if (outcome != TEEMATE_PAUSED || now() >= end)
            return outcome;
        function = SGX_ERESUME;
    }
}

/* One entry; what the caller saw, unless the enclave left by EEXIT: then "exit". */
static void enter(const char *tcs, uint32_t function, enum op op, struct block *block, struct sgx_enclave_run *result,
                  struct teemate_regs *regs, char *seen, size_t size)
{
    char at[32], name[32], error[32];
    int outcome;

    memset(result, 0, sizeof(*result));
    *regs = (struct teemate_regs){.rdi = (uint64_t)op, .rsi = (uint64_t)block, .rdx = 0x2222, .r8 = 0x8888, .r9 = 0x9999};
    outcome = enter_patiently(tcs_of(tcs), function, result, regs);
    __asm__ volatile("movq %%xmm7, %0" : "=r"(run.xmm7));
    if (outcome < 0)
        snprintf(seen, size, "%s", error_name(outcome, name, sizeof(name)));
    else if (outcome == TEEMATE_PAUSED)
        snprintf(seen, size, "paused");
    else if (outcome != TEEMATE_LEFT)
        snprintf(seen, size, "outcome %d", outcome);
    else if (result->function == SGX_EEXIT)
        snprintf(seen, size, "exit");
    else if (result->exception_vector == SGX_VECTOR_PF)
        snprintf(seen, size, "#PF(%s) %s%s", pf_name(result->exception_error_code, result->function == SGX_EENTER ? OP_NONE : op, error),
                 where(result->exception_addr, at, sizeof(at)), result->function == SGX_EENTER ? " at EENTER" : "");
    else
        snprintf(seen, size, "#%s(%u)%s", vector_name(result->exception_vector, name), result->exception_error_code,
                 result->function == SGX_EENTER ? " at EENTER" : "");
}

static void enter_main(const char *tcs, uint32_t function, enum op op, char *seen, size_t size)
{
    enter(tcs, function, op, &run.block, &run.run, &run.regs, seen, size);
}

/* The enclave copies for us, through `tcs`. */
static bool copy(const char *tcs, void *to, const void *from, uint64_t size)
{
    char seen[128];

    run.block = (struct block){.rbx = (uint64_t)to, .rcx = size, .rdx = (uint64_t)from};
    enter_main(tcs, SGX_EENTER, OP_COPY, seen, sizeof(seen));
    return strcmp(seen, "exit") == 0;
}

static size_t from_hex(const char *hex, uint8_t *bytes, size_t size)
{
    size_t n = 0;

    for (; hex[0] && hex[1] && n < size; hex += 2, n++) {
        char pair[3] = {hex[0], hex[1], 0};

        bytes[n] = (uint8_t)strtoul(pair, NULL, 16);
    }
    return n;
}

static void *spin(void *argument)
{
    struct spinner *spinner = argument;
    struct sgx_enclave_run result;
    struct teemate_regs regs;

    enter(spinner->tcs, SGX_EENTER, OP_SPIN, &spinner->block, &result, &regs, spinner->seen, sizeof(spinner->seen));
    return NULL;
}

static const struct leaf {
    const char *name;
    uint32_t number;
} leaves[] = {
    {"ereport", 0}, {"egetkey", 1}, {"eenter", 2}, {"eresume", 3}, {"eexit", 4}, {"eaccept", 5}, {"emodpe", 6}, {"eacceptcopy", 7},
};

static void step_enclu(char **words, char *seen, size_t size)
{
    char flags[8], *w;
    const char *tcs = word(words, "tcs");
    uint64_t leaf = ~0ull;

    memset(&run.block, 0, sizeof(run.block));
    for (size_t i = 0; i < sizeof(leaves) / sizeof(leaves[0]); i++)
        if (words[1] && strcmp(words[1], leaves[i].name) == 0)
            leaf = leaves[i].number;
    if (leaf == ~0ull)
        leaf = strtoull(words[1], NULL, 0);
    run.block.rax = leaf;
    run.block.rflags = FLAGS;
    if ((w = word(words, "rbx")))
        run.block.rbx = value(w);
    if ((w = word(words, "rcx")))
        run.block.rcx = value(w);
    if ((w = word(words, "rdx")))
        run.block.rdx = value(w);
    enter_main(tcs, SGX_EENTER, OP_ENCLU, seen, size);
    if (strcmp(seen, "exit") == 0)
        snprintf(seen, size, "rax=%" PRIu64 " %s", run.block.out_rax, flag_names(run.block.out_rflags, flags));
}

static void step_touch(enum op op, char **words, char *seen, size_t size)
{
    run.block = (struct block){.rbx = value(words[1])};
    enter_main(word(words, "tcs"), SGX_EENTER, op, seen, size);
}

/*
 * Linux takes #MF and #XM inside for spurious, so they repeat until the call is paused.  The last
 * AEX before that may have been an interrupt's, whose frame says nothing of the exception: then it
 * goes on to the next.
 */
static void go_on_to_the_exception(char *seen, size_t size)
{
    uint32_t exitinfo = 0;

    for (int pauses = 0; pauses < 1000 && strcmp(seen, "paused") == 0; pauses++) {
        if (!copy("t1", &exitinfo, (void *)value("ssa0+0xfe8"), sizeof(exitinfo)) || exitinfo & SGX_EXITINFO_VALID)
            return;
        run.pause = 1000000;
        enter_main("t0", SGX_ERESUME, OP_NONE, seen, size);
        run.pause = SECONDS(2);
    }
}

static void step_fault(char **words, char *seen, size_t size)
{
    static const char *const names[] = {"de", "ud", "gp", "mf", "ac", "xm", "bp", "db"};

    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (strcmp(words[1], names[i]) == 0) {
            run.block = (struct block){.rax = i};
            enter_main(word(words, "tcs"), SGX_EENTER, OP_FAULT, seen, size);
            if (word(words, "tcs") == NULL)
                go_on_to_the_exception(seen, size);
            return;
        }
    die("no fault %s", words[1]);
}

static void step_poke(char **words, char *seen, size_t size)
{
    uint64_t addr = value(words[1]);
    size_t length = from_hex(words[2], run.buffer, sizeof(run.buffer));

    snprintf(seen, size, copy(word(words, "tcs"), (void *)addr, run.buffer, length) ? "ok" : "not written");
}

static void step_peek(char **words, char *seen, size_t size)
{
    uint64_t addr = value(words[1]), length = value(words[2]);

    if (length > sizeof(run.buffer) || 2 * length >= size)
        die("peek of %" PRIu64 " bytes", length);
    if (!copy(word(words, "tcs"), run.buffer, (void *)addr, length)) {
        snprintf(seen, size, "not read");
        return;
    }
    for (size_t i = 0; i < length; i++)
        sprintf(seen + 2 * i, "%02x", run.buffer[i]);
}

/* Add to the eight bytes at an address in the enclave. */
static void step_add(char **words, char *seen, size_t size)
{
    uint64_t addr = value(words[1]), n = strtoull(words[2], NULL, 0), number;
    bool ok = copy(word(words, "tcs"), run.buffer, (void *)addr, 8);

    memcpy(&number, run.buffer, 8);
    number += n;
    memcpy(run.buffer, &number, 8);
    ok = ok && copy(word(words, "tcs"), (void *)addr, run.buffer, 8);
    snprintf(seen, size, ok ? "ok" : "not written");
}

/* TARGETINFO of this enclave, from what teemate_enclave_describe tells. */
static void step_target(char **words, char *seen, size_t size)
{
    struct sgx_targetinfo target;

    memset(&target, 0, sizeof(target));
    memcpy(target.mrenclave, run.info.mrenclave, 32);
    target.attributes = (struct sgx_attributes){.flags = run.info.attributes, .xfrm = run.info.xfrm};
    target.miscselect = run.info.miscselect;
    memcpy(run.buffer, &target, sizeof(target));
    snprintf(seen, size, copy(word(words, "tcs"), (void *)value(words[1]), run.buffer, sizeof(target)) ? "ok" : "not written");
}

/* Is there memory of this process, outside of ELRANGE? */
static bool of_the_host(uint64_t addr)
{
    unsigned char resident;

    return addr - run.info.base >= run.info.size &&
           mincore((void *)(addr / SGX_PAGE * SGX_PAGE), SGX_PAGE, &resident) == 0;
}

static void step_state(char **words, char *seen, size_t size)
{
    char tcs[32];

    memset(&run.block, 0, sizeof(run.block));
    enter_main(word(words, "tcs"), SGX_EENTER, OP_STATE, seen, size);
    if (strcmp(seen, "exit") != 0)
        return;
    snprintf(seen, size, "cssa=%" PRIu64 " rbx=%s return=%s rsp=%s tf=%d fs=%#" PRIx64 " gs=%#" PRIx64, run.block.state[0],
             where(run.block.state[1], tcs, sizeof(tcs)), of_the_host(run.block.state[2]) ? "host" : "elsewhere",
             of_the_host(run.block.state[3] - 8) ? "host" : "elsewhere", (int)(run.block.state[5] >> 8 & 1), run.block.state[6], run.block.state[7]);
}

/* Enter t0 and from the vDSO's user handler go on to whatever page `address` names. */
static struct {
    uint64_t tcs;
    int leaf;
} onward;

static int handler(long rdi, long rsi, long rdx, long rsp, long r8, long r9, struct sgx_enclave_run *result)
{
    int leaf = onward.leaf;

    (void)rdi, (void)rsi, (void)rdx, (void)rsp, (void)r8, (void)r9;
    if (!leaf)
        return 0;
    onward.leaf = 0;
    result->tcs = onward.tcs;
    return leaf;
}

static void step_via(char **words, char *seen, size_t size)
{
    onward.tcs = value(words[1]);
    onward.leaf = words[2] && strcmp(words[2], "resume") == 0 ? SGX_ERESUME : SGX_EENTER;
    run.handler = (uint64_t)handler;
    enter_main("t0", SGX_EENTER, OP_NONE, seen, size);
    run.handler = 0;
}

/* Where op_eexit goes to: not the address after ENCLU.  R10 is the way on. */
extern const char eexit_stub[];
uint64_t eexit_rcx;
__asm__(".text\n"
        "eexit_stub: endbr64\n"
        "mov %rcx, eexit_rcx(%rip)\n"
        "jmp *%r10\n");

static void step_eexit(char *seen, size_t size)
{
    run.block = (struct block){.rbx = (uint64_t)eexit_stub, .rcx = 0x1234};
    enter_main("t0", SGX_EENTER, OP_EEXIT, seen, size);
    if (strcmp(seen, "exit") == 0)
        snprintf(seen, size, "aep=%s", eexit_rcx == 0x1234 ? "rcx as it was" : "changed");
}

/* A thread inside is interrupted until the call is paused. */
static void step_pause(char **words, char *seen, size_t size)
{
    run.pause = 1000000;
    enter(words[1], SGX_EENTER, OP_SPIN, &run.paused, &run.run, &run.regs, seen, size);
    run.pause = SECONDS(2);
}

static void count_trap(int sig)
{
    (void)sig;
    run.traps++;
}

/* INT3 inside: the process gets a signal each time, until the call is paused. */
static void step_trap(char *seen, size_t size)
{
    signal(SIGTRAP, count_trap);
    run.pause = 1000000;
    run.block = (struct block){.rax = 6};
    enter_main("t0", SGX_EENTER, OP_FAULT, seen, size);
    run.pause = SECONDS(2);
    if (run.traps)
        snprintf(seen + strlen(seen), size - strlen(seen), ", signals");
}

/* The byte of code that RIP of t0's first frame points to. */
static void step_peekrip(char **words, char *seen, size_t size)
{
    uint64_t rip;

    if (!copy(word(words, "tcs"), run.buffer, (void *)value("ssa0+0xfd0"), 8)) {
        snprintf(seen, size, "not read");
        return;
    }
    memcpy(&rip, run.buffer, 8);
    copy(word(words, "tcs"), run.buffer, (void *)rip, 1);
    snprintf(seen, size, "%02x", run.buffer[0]);
}

static void step_spin(char **words, char *seen, size_t size)
{
    struct spinner *spinner = &run.spinner;

    snprintf(spinner->tcs, sizeof(spinner->tcs), "%s", words[1]);
    tcs_of(words[1]);
    if (pthread_create(&spinner->thread, NULL, spin, spinner))
        die("no thread");
    while (!spinner->block.started)
        sched_yield();
    spinner->running = true;
    snprintf(seen, size, "ok");
}

/*
 * Enter through the TCS that "spin" holds, with EENTER or ERESUME; at=ADDRESS is where the
 * spinner's frame has RAX, which counts its rounds: it changes with every interrupt.
 */
static void step_contend(char **words, char *seen, size_t size)
{
    const char *at = word(words, "at");
    uint64_t rounds[2];
    bool resume = words[2] && strcmp(words[2], "resume") == 0;

    if (!at)
        die("contend where?");
    for (int i = 0; i < 2; i++) {
        if (i)
            enter_main(words[1], resume ? SGX_ERESUME : SGX_EENTER, OP_NONE, seen, size);
        if (!copy("t1", run.buffer, (void *)value(at), 8))
            die("cannot read the frame");
        memcpy(&rounds[i], run.buffer, 8);
    }
    if (rounds[0] != rounds[1])
        _exit(INTERRUPTED);
}

static void step_unspin(char *seen, size_t size)
{
    run.spinner.block.stop = 1;
    pthread_join(run.spinner.thread, NULL);
    run.spinner.running = false;
    snprintf(seen, size, "%s", run.spinner.seen);
}

static void step_sgx2(char **words, char *seen, size_t size)
{
    uint64_t offset = offset_of(words[1]), length = strtoull(words[2], NULL, 0), argument, result = 0, count = 0;
    char name[32];
    int error;

    argument = words[3] ? strtoull(words[3], NULL, 0) : 0;
    if (strcmp(words[0], "restrict") == 0)
        error = enclave_restrict_permissions(run.enclave, offset, length, argument, &result, &count);
    else if (strcmp(words[0], "types") == 0)
        error = enclave_modify_types(run.enclave, offset, length, argument, &result, &count);
    else
        error = enclave_remove_pages(run.enclave, offset, length, &count);
    if (!error)
        snprintf(seen, size, "ok");
    else
        snprintf(seen, size, "%s result=%" PRIu64 " count=%#" PRIx64, error_name(error, name, sizeof(name)), result, count);
}

static void step(char **words, char *seen, size_t size)
{
    const char *verb = words[0];

    if (strcmp(verb, "create") != 0 && !run.enclave) {
        char *plain[] = {"create", NULL};

        create(plain, seen, size);
        if (strcmp(seen, "ok") != 0)
            die("cannot create the plain enclave: %s", seen);
    }
    if (strcmp(verb, "create") == 0)
        create(words, seen, size);
    else if (strcmp(verb, "enclu") == 0)
        step_enclu(words, seen, size);
    else if (strcmp(verb, "remap") == 0)
        step_remap(words, seen, size);
    else if (strcmp(verb, "personality") == 0)
        snprintf(seen, size, personality(READ_IMPLIES_EXEC) == -1 ? "not set" : "ok");
    else if (strcmp(verb, "read") == 0)
        step_touch(OP_READ, words, seen, size);
    else if (strcmp(verb, "write") == 0)
        step_touch(OP_WRITE, words, seen, size);
    else if (strcmp(verb, "exec") == 0)
        step_touch(OP_CALL, words, seen, size);
    else if (strcmp(verb, "fault") == 0)
        step_fault(words, seen, size);
    else if (strcmp(verb, "enter") == 0)
        enter_main(words[1], SGX_EENTER, OP_NONE, seen, size);
    else if (strcmp(verb, "resume") == 0)
        enter_main(words[1], SGX_ERESUME, OP_NONE, seen, size);
    else if (strcmp(verb, "pattern") == 0)
        enter_main(word(words, "tcs"), SGX_EENTER, OP_PATTERN, seen, size);
    else if (strcmp(verb, "regs") == 0) /* after an asynchronous exit */
        snprintf(seen, size, "r8=%" PRIu64 " r9=%" PRIu64, run.regs.r8, run.regs.r9);
    else if (strcmp(verb, "state") == 0)
        step_state(words, seen, size);
    else if (strcmp(verb, "poke") == 0)
        step_poke(words, seen, size);
    else if (strcmp(verb, "peek") == 0)
        step_peek(words, seen, size);
    else if (strcmp(verb, "add") == 0)
        step_add(words, seen, size);
    else if (strcmp(verb, "target") == 0)
        step_target(words, seen, size);
    else if (strcmp(verb, "munmap") == 0)
        snprintf(seen, size, munmap((void *)value(words[1]), value(words[2])) ? "not unmapped" : "ok");
    else if (strcmp(verb, "copy") == 0)
        snprintf(seen, size, copy(word(words, "tcs"), (void *)value(words[1]), (void *)value(words[2]), value(words[3])) ? "ok" : "not copied");
    else if (strcmp(verb, "via") == 0)
        step_via(words, seen, size);
    else if (strcmp(verb, "eexit") == 0)
        step_eexit(seen, size);
    else if (strcmp(verb, "pause") == 0)
        step_pause(words, seen, size);
    else if (strcmp(verb, "release") == 0) { /* what "pause" has spinning */
        run.paused.stop = 1;
        snprintf(seen, size, "ok");
    } else if (strcmp(verb, "trap") == 0)
        step_trap(seen, size);
    else if (strcmp(verb, "peekrip") == 0)
        step_peekrip(words, seen, size);
    else if (strcmp(verb, "xmm7") == 0)
        snprintf(seen, size, "xmm7=%" PRIx64, run.xmm7);
    else if (strcmp(verb, "spin") == 0)
        step_spin(words, seen, size);
    else if (strcmp(verb, "contend") == 0)
        step_contend(words, seen, size);
    else if (strcmp(verb, "unspin") == 0)
        step_unspin(seen, size);
    else if (strcmp(verb, "restrict") == 0 || strcmp(verb, "types") == 0 || strcmp(verb, "remove") == 0)
        step_sgx2(words, seen, size);
    else
        die("no step %s", verb);
}

static void run_case(char *line)
{
    char *name = strsep(&line, "|"), *text, seen[4096];
    bool first = true;

    printf("%s|", name);
    while ((text = strsep(&line, ";"))) {
        char *words[16] = {0}, *token, *save = NULL;
        size_t count = 0;
        bool prepare;

        for (token = strtok_r(text, " \n", &save); token && count < 15; token = strtok_r(NULL, " \n", &save))
            words[count++] = token;
        if (!count)
            continue;
        prepare = words[0][0] == '-';
        words[0] += prepare;
        seen[0] = 0;
        step(words, seen, sizeof(seen));
        if (prepare && strcmp(seen, "ok") && strcmp(seen, "exit") && strncmp(seen, "rax=0", 5) && strncmp(seen, "#", 1) && strcmp(seen, "paused"))
            die("FAILED %s: %s", words[0], seen);
        if (!prepare) {
            printf("%s%s", first ? "" : "; ", seen);
            first = false;
        }
    }
    printf("\n");
    fflush(stdout);
    _exit(0);
}

static void read_places(void)
{
    char path[512], line[128];
    FILE *file;

    snprintf(path, sizeof(path), "%s/places", run.folder);
    file = fopen(path, "re");
    if (!file)
        die("cannot open %s", path);
    while (fgets(line, sizeof(line), file) && run.place_count < 128) {
        struct place *place = &run.places[run.place_count];

        if (sscanf(line, "%23s %" SCNx64, place->name, &place->offset) == 2)
            run.place_count++;
    }
    fclose(file);
}

int main(int argc, char **argv)
{
    char *line = NULL;
    size_t size = 0;

    if (argc != 3) {
        fprintf(stderr, "usage: runner sim|sgx|sgx-machine FOLDER < cases\n");
        return 2;
    }
    run.backend = strncmp(argv[1], "sgx", 3) == 0 ? TEEMATE_SGX : TEEMATE_SIM;
    run.folder = argv[2];
    run.pause = SECONDS(2);
    read_places();
    while (getline(&line, &size, stdin) > 0) {
        int status, runs = 0;

        do {
            pid_t child;

            fflush(stdout);
            child = fork();
            if (child < 0)
                return 2;
            if (child == 0) {
                alarm(20);
                run_case(line);
            }
            waitpid(child, &status, 0);
        } while (WIFEXITED(status) && WEXITSTATUS(status) == INTERRUPTED && ++runs < AGAIN);
        if (WIFSIGNALED(status))
            printf("%.*s|killed by signal %d\n", (int)strcspn(line, "|"), line, WTERMSIG(status));
        else if (runs == AGAIN)
            printf("%.*s|interrupted %d times: is there a processor for the other thread?\n", (int)strcspn(line, "|"),
                   line, AGAIN);
        fflush(stdout);
    }
    free(line);
    return 0;
}
