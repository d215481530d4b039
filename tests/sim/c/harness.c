/* SPDX-License-Identifier: Apache-2.0 */
#include "harness.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

extern const uint8_t enclave_code[], enclave_code_end[];

_Noreturn void abort_test(void)
{
    fflush(NULL);
    _exit(99);
}

static const struct teemate_segment segments[] = {
    {CODE, CODE_SIZE, PROT_READ | PROT_EXEC, SGX_PT_REG},
    {DATA, SSA + TCS_COUNT * SSA_STRIDE - DATA, PROT_READ | PROT_WRITE, SGX_PT_REG},
    {TCS, TCS_COUNT * 4096, PROT_READ | PROT_WRITE, SGX_PT_TCS},
};
#define SEGMENTS (sizeof(segments) / sizeof(segments[0]))

static void add(struct teemate_enclave *enclave, uint64_t offset, const void *data, uint64_t size, uint64_t flags)
{
    struct teemate_diag diag = {0};
    int error = enclave->backend->add_pages(enclave, offset, data, size, flags, true, false, &diag);

    if (error)
        fprintf(stderr, "%s\n", diag.text);
    CHECK(error == 0);
}

struct teemate_enclave *test_enclave(const struct options *options)
{
    struct options defaults = {0};
    struct teemate_enclave *enclave;
    struct teemate_diag diag = {0};
    struct create_params params;
    static uint8_t code[CODE_SIZE];
    uint64_t base;

    if (!options)
        options = &defaults;
    base = options->base ? options->base : BASE;
    params = (struct create_params){.base = base,
                                    .size = SIZE,
                                    .ssa_frame_pages = 1,
                                    .miscselect = options->miscselect,
                                    .attributes = {.flags = SGX_ATTR_MODE64BIT | options->attributes,
                                                   .xfrm = options->xfrm ? options->xfrm : SGX_XFRM_LEGACY}};
    CHECK(enclave_new(&backend_sim, &enclave, &diag) == 0);
    enclave->base = base;
    enclave->size = SIZE;
    if (enclave->backend->create(enclave, &params, &diag)) {
        fprintf(stderr, "%s\n", diag.text);
        abort_test();
    }
    memcpy(code, enclave_code, (size_t)(enclave_code_end - enclave_code));
    add(enclave, CODE, code, CODE_SIZE, SGX_SECINFO_R | SGX_SECINFO_X | SGX_SECINFO_PT(SGX_PT_REG));
    add(enclave, DATA, NULL, SSA + TCS_COUNT * SSA_STRIDE - DATA,
        SGX_SECINFO_R | SGX_SECINFO_W | SGX_SECINFO_PT(SGX_PT_REG));
    for (unsigned i = 0; i < TCS_COUNT; i++) {
        struct sgx_tcs tcs = {.ossa = SSA + i * SSA_STRIDE,
                              .nssa = NSSA,
                              .oentry = ENTRY,
                              .ofsbase = FSPAGE,
                              .ogsbase = GSPAGE,
                              .fslimit = 0xfff,
                              .gslimit = 0xfff};
        add(enclave, tcs_of(i), &tcs, 4096, SGX_SECINFO_PT(SGX_PT_TCS));
    }
    enclave->sim->header->attributes.flags |= SGX_ATTR_INIT;
    CHECK(fcntl(enclave->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0 ||
          fcntl(enclave->fd, F_GET_SEALS) & F_SEAL_SEAL);
    enclave->finished = true;
    enclave->segments = malloc(sizeof(segments));
    memcpy(enclave->segments, segments, sizeof(segments));
    enclave->segment_count = SEGMENTS;
    return enclave;
}

static void map_all(struct teemate_enclave *enclave)
{
    struct teemate_diag diag = {0};

    if (teemate_map(enclave, &diag)) {
        fprintf(stderr, "%s\n", diag.text);
        abort_test();
    }
    for (unsigned i = 0; i < TCS_COUNT; i++)
        CHECK(teemate_map_tcs(enclave, tcs_of(i), &diag) == 0);
}

struct teemate_enclave *test_enclave_mapped(const struct options *options)
{
    struct teemate_enclave *enclave = test_enclave(options);

    map_all(enclave);
    return enclave;
}

struct teemate_enclave *test_enclave_from_fd(int fd, bool map)
{
    struct teemate_enclave *enclave;
    struct teemate_diag diag = {0};

    if (teemate_open(TEEMATE_SIM, fd, BASE, SIZE, segments, SEGMENTS, &enclave, &diag)) {
        fprintf(stderr, "%s\n", diag.text);
        abort_test();
    }
    if (map)
        map_all(enclave);
    return enclave;
}

uint64_t *board(struct teemate_enclave *enclave)
{
    return (uint64_t *)(enclave->sim->view + DATA);
}

struct sgx_gprs *frame(struct teemate_enclave *enclave, unsigned tcs, unsigned cssa)
{
    return (struct sgx_gprs *)(enclave->sim->view + SSA + tcs * SSA_STRIDE + (cssa + 1) * 4096ull -
                               sizeof(struct sgx_gprs));
}

uint64_t tcs_word(struct teemate_enclave *enclave, unsigned tcs)
{
    return atomic_load(&enclave->sim->tcs[tcs].word);
}

struct result enter(struct teemate_enclave *enclave, unsigned tcs, uint64_t rdi, uint64_t rsi, uint64_t rdx)
{
    struct result result = {.regs = {.rdi = rdi, .rsi = rsi, .rdx = rdx}};

    result.outcome = teemate_enter(enclave, tcs_of(tcs), &result.regs, SGX_EENTER, 0, &result.run);
    return result;
}

struct result resume(struct teemate_enclave *enclave, unsigned tcs)
{
    struct result result = {0};

    result.outcome = teemate_enter(enclave, tcs_of(tcs), &result.regs, SGX_ERESUME, 0, &result.run);
    return result;
}

struct result call(struct teemate_enclave *enclave, unsigned tcs, uint64_t rdi, uint64_t rsi, uint64_t rdx)
{
    struct result result = enter(enclave, tcs, rdi, rsi, rdx);

    while (result.outcome == TEEMATE_PAUSED)
        result = resume(enclave, tcs);
    return result;
}
