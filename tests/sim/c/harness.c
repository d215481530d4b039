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
    static uint8_t aligned[CODE_SIZE] __attribute__((aligned(4096))); /* as ADD_PAGES wants it */
    struct teemate_diag diag = {0};
    int error;

    if (data) {
        CHECK(size <= sizeof(aligned));
        data = memcpy(aligned, data, size);
    }
    error = enclave->backend->add_pages(enclave, offset, data, size, flags, !on_sgx(), false, &diag);

    if (error)
        fprintf(stderr, "%s\n", diag.text);
    CHECK(error == 0);
}

static void finish_on_sim(struct teemate_enclave *enclave)
{
    enclave->sim->header->attributes.flags |= SGX_ATTR_INIT;
    CHECK(fcntl(enclave->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0 ||
          fcntl(enclave->fd, F_GET_SEALS) & F_SEAL_SEAL);
}

/* The measurement has the layout and no contents, so one SIGSTRUCT (layout.py) goes with all options. */
static void finish_on_sgx(struct teemate_enclave *enclave)
{
    const char *path = getenv("TEEMATE_TEST_SIGSTRUCT");
    FILE *file = path ? fopen(path, "re") : NULL;
    struct sgx_sigstruct sigstruct;
    struct teemate_diag diag = {0};

    CHECK(file && fread(&sigstruct, sizeof(sigstruct), 1, file) == 1);
    fclose(file);
    if (enclave->backend->init(enclave, &sigstruct, sigstruct.enclavehash, &diag)) {
        fprintf(stderr, "%s\n", diag.text);
        abort_test();
    }
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
                                    .attributes = {.flags = SGX_ATTR_MODE64BIT | options->attributes |
                                                            (on_sgx() ? SGX_ATTR_DEBUG : 0),
                                                   .xfrm = options->xfrm ? options->xfrm : SGX_XFRM_LEGACY}};
    CHECK(enclave_new(on_sgx() ? &backend_sgx : &backend_sim, &enclave, &diag) == 0);
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
    if (on_sgx())
        finish_on_sgx(enclave);
    else
        finish_on_sim(enclave);
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

    if (teemate_open(on_sgx() ? TEEMATE_SGX : TEEMATE_SIM, fd, BASE, SIZE, segments, SEGMENTS, &enclave, &diag)) {
        fprintf(stderr, "%s\n", diag.text);
        abort_test();
    }
    if (map)
        map_all(enclave);
    return enclave;
}

bool on_sgx(void)
{
    const char *name = getenv("TEEMATE_TEST_BACKEND");

    return name && strcmp(name, "sgx") == 0;
}

/* The driver does EDBGRD and EDBGWR for ptrace's kind of access (sgx_vma_access). */
static int debugger(void)
{
    int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);

    CHECK(fd >= 0);
    return fd;
}

void memory_read(struct teemate_enclave *enclave, uint64_t offset, void *data, size_t size)
{
    int fd;

    if (!on_sgx()) {
        memcpy(data, enclave->sim->view + offset, size);
        return;
    }
    fd = debugger();
    CHECK(pread(fd, data, size, (off_t)(enclave->base + offset)) == (ssize_t)size);
    close(fd);
}

void memory_write(struct teemate_enclave *enclave, uint64_t offset, const void *data, size_t size)
{
    int fd;

    if (!on_sgx()) {
        memcpy(enclave->sim->view + offset, data, size);
        return;
    }
    fd = debugger();
    CHECK(pwrite(fd, data, size, (off_t)(enclave->base + offset)) == (ssize_t)size);
    close(fd);
}

uint64_t board_get(struct teemate_enclave *enclave, unsigned word)
{
    uint64_t value;

    if (!on_sgx())
        return __atomic_load_n((uint64_t *)(enclave->sim->view + DATA) + word, __ATOMIC_RELAXED);
    memory_read(enclave, DATA + word * 8ull, &value, sizeof(value));
    return value;
}

void board_set(struct teemate_enclave *enclave, unsigned word, uint64_t value)
{
    memory_write(enclave, DATA + word * 8ull, &value, sizeof(value));
}

static uint64_t frame_end(unsigned tcs, unsigned cssa)
{
    return SSA + tcs * SSA_STRIDE + (cssa + 1) * 4096ull;
}

struct sgx_gprs frame_get(struct teemate_enclave *enclave, unsigned tcs, unsigned cssa)
{
    struct sgx_gprs gprs;

    memory_read(enclave, frame_end(tcs, cssa) - sizeof(gprs), &gprs, sizeof(gprs));
    return gprs;
}

void frame_set(struct teemate_enclave *enclave, unsigned tcs, unsigned cssa, const struct sgx_gprs *gprs)
{
    memory_write(enclave, frame_end(tcs, cssa) - sizeof(*gprs), gprs, sizeof(*gprs));
}

void frame_skip(struct teemate_enclave *enclave, unsigned tcs, unsigned cssa, uint64_t bytes)
{
    struct sgx_gprs gprs = frame_get(enclave, tcs, cssa);

    gprs.rip += bytes;
    frame_set(enclave, tcs, cssa, &gprs);
}

struct sgx_exinfo exinfo_get(struct teemate_enclave *enclave, unsigned tcs, unsigned cssa)
{
    struct sgx_exinfo exinfo;

    memory_read(enclave, frame_end(tcs, cssa) - sizeof(struct sgx_gprs) - sizeof(exinfo), &exinfo, sizeof(exinfo));
    return exinfo;
}

uint64_t tcs_word(struct teemate_enclave *enclave, unsigned tcs)
{
    uint32_t cssa[2];

    if (!on_sgx())
        return atomic_load(&enclave->sim->tcs[tcs].word);
    memory_read(enclave, tcs_of(tcs) + 24, cssa, sizeof(cssa)); /* SDM volume 3D, "TCS": CSSA and NSSA */
    return SIM_TCS_WORD(0, cssa[0], 0);
}

void tcs_set_flags(struct teemate_enclave *enclave, unsigned tcs, uint64_t flags)
{
    if (on_sgx())
        memory_write(enclave, tcs_of(tcs) + 8, &flags, sizeof(flags));
    else
        enclave->sim->tcs[tcs].flags = flags;
}

void without_sgx2(struct teemate_enclave *enclave)
{
    if (!on_sgx())
        enclave->sim->header->sgx2 = 0;
}

uint64_t behind_enclu(void)
{
    return on_sgx() ? sgx_vdso_enclu() + 3 : (uint64_t)(uintptr_t)sim_exit;
}

uint64_t aep(void)
{
    return on_sgx() ? sgx_vdso_enclu() : (uint64_t)(uintptr_t)sim_aep;
}

int handler_pauses(void)
{
    return on_sgx() ? 0 : 1;
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
        result = result.run.function == SGX_EENTER ? enter(enclave, tcs, rdi, rsi, rdx) : resume(enclave, tcs);
    return result;
}
