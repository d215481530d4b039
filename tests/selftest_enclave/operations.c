/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernel's selftest enclave (tools/testing/selftests/sgx/test_encl.c), driven through
 * libteemate on either backend: operations BACKEND SGXS SIGSTRUCT DATA DYN_ENTRY SCENARIO.
 *
 * Each scenario prints one line per step, with offsets in place of addresses, so that
 * two backends can be compared line by line.  What a step does is that of the kernel's
 * selftest of the same purpose (main.c); what has to come out is in test_selftest_enclave.py.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sgx2.h"
#include "teemate.h"

#define PAGE 4096u
#define TCS1 0ull
#define TCS2 4096ull
#define MAGIC 0x1122334455667788ull
#define MAGIC2 0x8877665544332211ull

/* enum encl_op_type of the selftests' defines.h; each has its numbers after the type. */
enum operation { PUT_BUFFER, GET_BUFFER, PUT, GET, NOP, ACCEPT, EXTEND, INIT_TCS, NO_OPERATION };

struct request {
    uint64_t type, words[3];
};

static struct teemate_enclave *enclave;
static struct teemate_enclave_info info;
static uint64_t data, dynamic, dyn_entry;

static void fail(const char *what, int error, const struct teemate_diag *diag)
{
    fprintf(stderr, "%s: %s %s\n", what, strerror(-error), diag ? diag->text : "");
    exit(2);
}

static void *enter(uint64_t tcs, struct request *request, uint32_t function, struct sgx_enclave_run *run)
{
    struct teemate_regs regs = {.rdi = (uint64_t)request};
    int outcome;

    while ((outcome = teemate_enter(enclave, tcs, &regs, function, 0, run)) == TEEMATE_PAUSED) {
        function = run->function;
        if (function == SGX_EENTER)
            regs = (struct teemate_regs){.rdi = (uint64_t)request};
    }
    if (outcome != TEEMATE_LEFT)
        fail("teemate_enter", outcome < 0 ? outcome : -EPROTO, NULL);
    return request;
}

static void show(const char *step, const struct sgx_enclave_run *run)
{
    if (run->function == SGX_EEXIT)
        printf("%s: left", step);
    else
        printf("%s: function %u vector %u error %#x at +%#" PRIx64, step, run->function, run->exception_vector,
               run->exception_error_code, run->exception_addr - info.base);
}

static void go(const char *step, uint64_t tcs, struct request *request, uint32_t function)
{
    struct sgx_enclave_run run = {0};

    enter(tcs, request, function, &run);
    show(step, &run);
    if (run.function == SGX_EEXIT && (request->type == GET_BUFFER || request->type == GET))
        printf(", %#" PRIx64, request->words[0]);
    if (run.function == SGX_EEXIT && request->type == ACCEPT)
        printf(", %" PRIu64, request->words[2]);
    printf("\n");
}

static void put(uint64_t tcs, uint64_t offset, uint64_t value)
{
    struct request request = {PUT, {value, info.base + offset}};

    go("put", tcs, &request, SGX_EENTER);
}

static void get(uint64_t tcs, uint64_t offset)
{
    struct request request = {GET, {0, info.base + offset}};

    go("get", tcs, &request, SGX_EENTER);
}

static void accept_page(uint64_t tcs, uint64_t offset, uint64_t flags)
{
    struct request request = {ACCEPT, {info.base + offset, flags, 0xdead}};

    go("accept", tcs, &request, SGX_EENTER);
}

static void types(uint64_t offset, uint64_t pages, uint64_t type)
{
    uint64_t result = 0, count = 0;
    int error = enclave_modify_types(enclave, offset, pages * PAGE, type, &result, &count);

    printf("types: %d, %" PRIu64 ", %" PRIu64 " pages\n", error, result, count / PAGE);
}

static void restrict_to(uint64_t offset, uint64_t permissions)
{
    uint64_t result = 0, count = 0;
    int error = enclave_restrict_permissions(enclave, offset, PAGE, permissions, &result, &count);

    printf("restrict: %d, %" PRIu64 ", %" PRIu64 " pages\n", error, result, count / PAGE);
}

static void remove_pages(uint64_t offset, uint64_t pages)
{
    uint64_t count = 0;
    int error = enclave_remove_pages(enclave, offset, pages * PAGE, &count);

    printf("remove: %d, %" PRIu64 " pages\n", error, count / PAGE);
}

#define REG SGX_SECINFO_PT(SGX_PT_REG)
#define RW (SGX_SECINFO_R | SGX_SECINFO_W)
#define ADDED (RW | REG | SGX_SECINFO_PENDING)
#define TRIMMED (SGX_SECINFO_PT(SGX_PT_TRIM) | SGX_SECINFO_MODIFIED)

static void buffer(void)
{
    struct request in = {PUT_BUFFER, {MAGIC}}, out = {GET_BUFFER, {0}}, nop = {NOP, {0}}, none = {NO_OPERATION, {0}};

    go("put", TCS1, &in, SGX_EENTER);
    go("get", TCS2, &out, SGX_EENTER);
    go("nop", TCS1, &nop, SGX_EENTER);
    go("no operation", TCS2, &none, SGX_EENTER);
    put(TCS1, data + PAGE, MAGIC2);
    get(TCS2, data + PAGE);
}

static int handled;

static int handler(long rdi, long rsi, long rdx, long rsp, long r8, long r9, struct sgx_enclave_run *run)
{
    (void)rdi, (void)rsi, (void)rdx, (void)rsp, (void)r8, (void)r9;
    handled++;
    run->user_data = 0;
    return 0;
}

static void with_handler(void)
{
    struct sgx_enclave_run run = {.user_handler = (uint64_t)handler, .user_data = 0xdeadbeef};
    struct request nop = {NOP, {0}};

    enter(TCS1, &nop, SGX_EENTER, &run);
    show("nop", &run);
    printf(", handled %d, data %#" PRIx64 "\n", handled, run.user_data);
}

/* The host's page table says less than the EPCM; then as much. */
static void mapping(void)
{
    struct request request = {PUT, {MAGIC2, info.base + data + PAGE}};

    put(TCS1, data + PAGE, MAGIC);
    if (mprotect((void *)(info.base + data + PAGE), PAGE, PROT_READ))
        fail("mprotect", -errno, NULL);
    go("put", TCS1, &request, SGX_EENTER);
    if (mprotect((void *)(info.base + data + PAGE), PAGE, PROT_READ | PROT_WRITE))
        fail("mprotect", -errno, NULL);
    go("resume", TCS1, &request, SGX_ERESUME);
    get(TCS1, data + PAGE);
}

static void permissions(void)
{
    struct request request = {PUT, {MAGIC2, info.base + data + PAGE}};
    struct request extend = {EXTEND, {info.base + data + PAGE, RW}};

    restrict_to(TCS1, SGX_SECINFO_R);
    put(TCS1, data + PAGE, MAGIC);
    restrict_to(data + PAGE, SGX_SECINFO_R);
    accept_page(TCS1, data + PAGE, RW | REG | SGX_SECINFO_PR);
    accept_page(TCS1, data + PAGE, SGX_SECINFO_R | REG | SGX_SECINFO_PR);
    go("put", TCS1, &request, SGX_EENTER);
    go("extend", TCS2, &extend, SGX_EENTER);
    go("resume", TCS1, &request, SGX_ERESUME);
    get(TCS1, data + PAGE);
}

static void augment(void)
{
    struct request request = {PUT, {MAGIC, info.base + dynamic}};

    go("put", TCS1, &request, SGX_EENTER);
    accept_page(TCS2, dynamic, ADDED);
    go("resume", TCS1, &request, SGX_ERESUME);
    get(TCS1, dynamic);
}

static void augment_by_accept(void)
{
    accept_page(TCS1, dynamic, ADDED);
    get(TCS1, dynamic);
    put(TCS1, dynamic, MAGIC);
    get(TCS1, dynamic);
}

static void new_tcs(void)
{
    uint64_t stack = dynamic, tcs = dynamic + PAGE, ssa = dynamic + 2 * PAGE;
    struct request init = {INIT_TCS, {info.base + tcs, ssa, dyn_entry}};
    struct request in = {PUT_BUFFER, {MAGIC}}, out = {GET_BUFFER, {0}};
    struct teemate_diag diag = {0};
    int error;

    accept_page(TCS1, stack, ADDED);
    accept_page(TCS1, ssa, ADDED);
    accept_page(TCS1, tcs, ADDED);
    go("init", TCS1, &init, SGX_EENTER);
    types(tcs, 1, SGX_PT_TCS);
    accept_page(TCS1, tcs, SGX_SECINFO_PT(SGX_PT_TCS) | SGX_SECINFO_MODIFIED);
    error = teemate_map_tcs(enclave, tcs, &diag);
    if (error)
        fail("teemate_map_tcs", error, &diag);
    go("put", tcs, &in, SGX_EENTER);
    go("get", tcs, &out, SGX_EENTER);
    types(dynamic, 3, SGX_PT_TRIM);
    accept_page(TCS1, stack, TRIMMED);
    accept_page(TCS1, tcs, TRIMMED);
    accept_page(TCS1, ssa, TRIMMED);
    remove_pages(dynamic, 3);
    /* Where the TCS was: a page like any other. */
    accept_page(TCS1, tcs, ADDED);
    get(TCS1, tcs);
    put(TCS1, tcs, MAGIC);
    get(TCS1, tcs);
}

static void remove_unaccepted(void)
{
    put(TCS1, data + PAGE, MAGIC);
    types(data + PAGE, 1, SGX_PT_TRIM);
    remove_pages(data + PAGE, 1);
}

static void trimmed_access(void)
{
    put(TCS1, data + PAGE, MAGIC);
    types(data + PAGE, 1, SGX_PT_TRIM);
    get(TCS1, data + PAGE);
}

static void accepted_trimmed_access(void)
{
    put(TCS1, data + PAGE, MAGIC);
    types(data + PAGE, 1, SGX_PT_TRIM);
    accept_page(TCS1, data + PAGE, TRIMMED);
    get(TCS1, data + PAGE);
}

static void remove_untouched(void)
{
    types(data + PAGE, 1, SGX_PT_TRIM);
    accept_page(TCS1, data + PAGE, TRIMMED);
    remove_pages(data + PAGE, 1);
}

static const struct {
    const char *name;
    void (*run)(void);
} scenarios[] = {
    {"buffer", buffer},
    {"handler", with_handler},
    {"mapping", mapping},
    {"permissions", permissions},
    {"augment", augment},
    {"augment-by-accept", augment_by_accept},
    {"new-tcs", new_tcs},
    {"remove-unaccepted", remove_unaccepted},
    {"trimmed-access", trimmed_access},
    {"accepted-trimmed-access", accepted_trimmed_access},
    {"remove-untouched", remove_untouched},
};

/*
 * Built, then opened again with one more segment: room for pages that are added later.
 * The segments of an image are those that it brings.
 */
static void open_with_room(int backend, const char *sgxs, const char *signature)
{
    struct teemate_segment segments[16];
    uint8_t sigstruct[1808];
    struct teemate_enclave *built;
    struct teemate_diag diag = {0};
    int image = open(sgxs, O_RDONLY | O_CLOEXEC), file = open(signature, O_RDONLY | O_CLOEXEC), error;
    size_t count;

    if (image < 0 || file < 0 || read(file, sigstruct, sizeof(sigstruct)) != sizeof(sigstruct))
        fail(sgxs, -errno, NULL);
    error = teemate_create(backend, 0, 0, image, sigstruct, &built, &diag);
    if (!error)
        error = teemate_enclave_describe(built, &info);
    if (error)
        fail("teemate_create", error, &diag);
    count = teemate_enclave_segments(built, segments, 15);
    dynamic = segments[count - 1].offset + segments[count - 1].size;
    segments[count++] =
        (struct teemate_segment){.offset = dynamic, .size = 3 * PAGE, .prot = PROT_READ | PROT_WRITE, .type = SGX_PT_REG};
    error = teemate_open(backend, fcntl(teemate_enclave_fd(built), F_DUPFD_CLOEXEC, 3), info.base, info.size,
                         segments, count, &enclave, &diag);
    if (error)
        fail("teemate_open", error, &diag);
    teemate_close(built);
    close(image);
    close(file);
}

int main(int argc, char **argv)
{
    struct teemate_diag diag = {0};
    int error;

    if (argc != 7)
        return 2;
    open_with_room(!strcmp(argv[1], "sgx") ? TEEMATE_SGX : TEEMATE_SIM, argv[2], argv[3]);
    data = strtoull(argv[4], NULL, 0);
    dyn_entry = strtoull(argv[5], NULL, 0);
    error = teemate_map(enclave, &diag);
    if (!error)
        error = teemate_map_tcs(enclave, TCS1, &diag);
    if (!error)
        error = teemate_map_tcs(enclave, TCS2, &diag);
    if (error)
        fail("mapping", error, &diag);
    for (size_t i = 0; i < sizeof(scenarios) / sizeof(scenarios[0]); i++) {
        if (strcmp(scenarios[i].name, argv[6]))
            continue;
        scenarios[i].run();
        teemate_close(enclave);
        return 0;
    }
    return 2;
}
