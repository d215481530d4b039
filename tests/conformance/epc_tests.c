/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the conformance table cannot show: files that pretend to be enclaves, tables that
 * somebody scribbled over, and what one process's SGX2 calls mean for another.
 *
 *   epc_tests FOLDER NAME      runs one test; status 0, or a line that says what was wrong
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "enclave.h"
#include "sim.h"
#include "teemate.h"

#define DATA 0x2000u
#define DATA2 0x3000u
#define T0 0x18000u
#define ENCLAVE_SIZE 0x40000u

#define CHECK(condition)                                                     \
    do {                                                                     \
        if (!(condition)) {                                                  \
            printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);   \
            exit(1);                                                         \
        }                                                                    \
    } while (0)

/* Mirrors runner.c and enclave.S. */
enum { OP_NONE = 0, OP_WRITE = 4 };
struct block {
    uint64_t rax, rbx, rcx, rdx, rflags, out_rax, out_rflags, started, stop, state[8];
};

static const char *folder;

static struct teemate_enclave *create(void)
{
    char path[512];
    uint8_t sigstruct[1808];
    struct teemate_enclave *enclave;
    struct teemate_diag diag = {0};
    int image, sig;

    snprintf(path, sizeof(path), "%s/plain.good.sig", folder);
    sig = open(path, O_RDONLY);
    CHECK(read(sig, sigstruct, sizeof(sigstruct)) == sizeof(sigstruct));
    close(sig);
    snprintf(path, sizeof(path), "%s/plain.sgxs", folder);
    image = open(path, O_RDONLY);
    CHECK(image >= 0);
    if (teemate_create(TEEMATE_SIM, 0, 0, image, sigstruct, &enclave, &diag)) {
        printf("%s\n", diag.text);
        exit(1);
    }
    close(image);
    return enclave;
}

static int open_again(int fd, uint64_t base, uint64_t size, struct teemate_enclave **enclave)
{
    static const struct teemate_segment segments[] = {
        {.offset = 0, .size = 0x2000, .prot = PROT_READ | PROT_EXEC, .type = SGX_PT_REG},
        {.offset = DATA, .size = 0x2000, .prot = PROT_READ | PROT_WRITE, .type = SGX_PT_REG},
        {.offset = 0x8000, .size = 0x4000, .prot = PROT_READ | PROT_WRITE, .type = SGX_PT_REG},
        {.offset = 0x10000, .size = 0x8000, .prot = PROT_READ | PROT_WRITE, .type = SGX_PT_REG},
        {.offset = T0, .size = 0x2000, .prot = PROT_READ | PROT_WRITE, .type = SGX_PT_TCS},
    };
    struct teemate_diag diag;

    return teemate_open(TEEMATE_SIM, dup(fd), base, size, segments, sizeof(segments) / sizeof(segments[0]), enclave,
                        &diag);
}

static struct teemate_enclave *attach(struct teemate_enclave *made)
{
    struct teemate_enclave *enclave;

    CHECK(open_again(teemate_enclave_fd(made), made->base, made->size, &enclave) == 0);
    CHECK(teemate_map(enclave, NULL) == 0);
    CHECK(teemate_map_tcs(enclave, T0, NULL) == 0);
    return enclave;
}

/* The vector of what happened, or -1 for EEXIT. */
static int write_inside(struct teemate_enclave *enclave, uint64_t offset, struct sgx_enclave_run *run)
{
    struct block block = {.rbx = enclave->base + offset};
    struct teemate_regs regs = {.rdi = OP_WRITE, .rsi = (uint64_t)&block};

    memset(run, 0, sizeof(*run));
    CHECK(teemate_enter(enclave, T0, &regs, SGX_EENTER, 2000000000, run) == TEEMATE_LEFT);
    return run->function == SGX_EEXIT ? -1 : run->exception_vector;
}

static void foreign_files(void)
{
    struct teemate_enclave *made = create(), *enclave;
    int fds[2], memory, file;

    CHECK(pipe(fds) == 0);
    CHECK(!teemate_sim_is(fds[0]));
    CHECK(!teemate_sim_is(-1));
    memory = memfd_create("other", MFD_ALLOW_SEALING);
    CHECK(ftruncate(memory, ENCLAVE_SIZE + SIM_TABLES_SIZE(ENCLAVE_SIZE)) == 0);
    CHECK(!teemate_sim_is(memory));
    CHECK(open_again(memory, made->base, made->size, &enclave) == -ENODEV);
    file = open("/dev/zero", O_RDWR);
    CHECK(!teemate_sim_is(file));
    CHECK(open_again(file, made->base, made->size, &enclave) == -ENODEV);
    CHECK(teemate_sim_is(teemate_enclave_fd(made)));
}

/* All bytes of an enclave's file in another memfd: what the seals promise is not there. */
static void copies_without_seals(void)
{
    struct teemate_enclave *made = create(), *enclave;
    size_t size = ENCLAVE_SIZE + SIM_TABLES_SIZE(ENCLAVE_SIZE);
    uint8_t *bytes = malloc(size);
    int copy = memfd_create("copy", MFD_ALLOW_SEALING);

    CHECK(pread(teemate_enclave_fd(made), bytes, size, 0) == (ssize_t)size);
    CHECK(write(copy, bytes, size) == (ssize_t)size);
    CHECK(open_again(copy, made->base, made->size, &enclave) == -ESTALE);
    CHECK(fcntl(copy, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0);
    CHECK(open_again(copy, made->base, made->size, &enclave) == -ESTALE);
    CHECK(ftruncate(copy, (off_t)size - 4096) == -1);
}

static void finished_is_sealed(void)
{
    struct teemate_enclave *made = create();
    int fd = teemate_enclave_fd(made);

    CHECK(fcntl(fd, F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) ||
          fcntl(fd, F_GET_SEALS) & F_SEAL_SEAL);
    CHECK(ftruncate(fd, 0) == -1 && errno == EPERM);
    CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) == -1);
}

static void other_geometry(void)
{
    struct teemate_enclave *made = create(), *enclave;
    int fd = teemate_enclave_fd(made);

    CHECK(open_again(fd, made->base + ENCLAVE_SIZE * 8, made->size, &enclave) == -ESTALE);
    CHECK(open_again(fd, made->base / (ENCLAVE_SIZE * 4) * (ENCLAVE_SIZE * 4), made->size * 2, &enclave) == -ESTALE);
}

static void unfinished(void)
{
    struct teemate_enclave raw = {.fd = -1}, *enclave;
    struct create_params params = {.base = 0x400000000000, .size = ENCLAVE_SIZE, .ssa_frame_pages = 1,
                                   .attributes = {.flags = SGX_ATTR_MODE64BIT, .xfrm = 3}};

    CHECK(sim_create(&raw, &params, NULL) == 0);
    CHECK(teemate_sim_is(raw.fd));
    CHECK(open_again(raw.fd, params.base, params.size, &enclave) == -ESTALE);
    sim_close(&raw);
}

static int secs(uint64_t base, uint64_t size, uint32_t frame, uint64_t flags, uint64_t xfrm, uint32_t misc)
{
    struct teemate_enclave raw = {.fd = -1};
    struct create_params params = {.base = base, .size = size, .ssa_frame_pages = frame, .miscselect = misc,
                                   .attributes = {.flags = flags, .xfrm = xfrm}};
    int error = sim_create(&raw, &params, NULL);

    sim_close(&raw);
    if (raw.fd >= 0)
        close(raw.fd);
    return error;
}

/* SDM volume 3D, ECREATE. */
static void secs_checks(void)
{
    const uint64_t base = 0x400000000000, size = 1 << 20, mode64 = SGX_ATTR_MODE64BIT;

    CHECK(secs(base, size, 1, mode64, 3, 0) == 0);
    CHECK(secs(base, size + 4096, 1, mode64, 3, 0) == -EINVAL);
    CHECK(secs(base, 4096, 1, mode64, 3, 0) == -EINVAL);
    CHECK(secs(base, 1ull << 37, 1, mode64, 3, 0) == -EINVAL);
    CHECK(secs(base + 4096, size, 1, mode64, 3, 0) == -EINVAL);
    CHECK(secs(1ull << 47, size, 1, mode64, 3, 0) == -EINVAL);
    CHECK(secs(base, size, 0, mode64, 3, 0) == -EINVAL);
    CHECK(secs(base, size, 0x80000000, mode64, 3, 0) == -EINVAL);
    CHECK(secs(base, size, 1, 0, 3, 0) == -EINVAL);
    CHECK(secs(base, size, 1, mode64 | SGX_ATTR_INIT, 3, 0) == -EINVAL);
    CHECK(secs(base, size, 1, mode64 | 8, 3, 0) == -EINVAL);
    CHECK(secs(base, size, 1, mode64, 1, 0) == -EINVAL);
    CHECK(secs(base, size, 1, mode64, 3 | 1ull << 62, 0) == -EINVAL);
    CHECK(secs(base, size, 1, mode64, 3, 2) == -EINVAL);
    CHECK(secs(base, size, 1, mode64, 3, 1) == 0);
}

/* SDM volume 3D, EADD, and what the driver checks before it. */
static void eadd_checks(void)
{
    struct teemate_enclave raw = {.fd = -1};
    struct create_params params = {.base = 0x400000000000, .size = 1 << 20, .ssa_frame_pages = 1,
                                   .attributes = {.flags = SGX_ATTR_MODE64BIT, .xfrm = 3}};
    struct sgx_tcs tcs = {.nssa = 1};
    const uint64_t rw = SGX_SECINFO_PT(SGX_PT_REG) | 3, thread = SGX_SECINFO_PT(SGX_PT_TCS);

    CHECK(sim_create(&raw, &params, NULL) == 0);
    CHECK(sim_add_pages(&raw, 0, NULL, 4096, rw, false, false, NULL) == 0);
    CHECK(sim_add_pages(&raw, 0, NULL, 4096, rw, false, false, NULL) == -EBUSY);
    CHECK(sim_add_pages(&raw, 8, NULL, 4096, rw, false, false, NULL) == -EINVAL);
    CHECK(sim_add_pages(&raw, 4096, NULL, 100, rw, false, false, NULL) == -EINVAL);
    CHECK(sim_add_pages(&raw, 1 << 20, NULL, 4096, rw, false, false, NULL) == -EINVAL);
    CHECK(sim_add_pages(&raw, 4096, NULL, ~0xfffull, rw, false, false, NULL) == -EINVAL);
    CHECK(sim_add_pages(&raw, ~0xfffull, NULL, 8192, rw, false, false, NULL) == -EINVAL);
    CHECK(sim_add_pages(&raw, 4096, NULL, 4096, SGX_SECINFO_PT(SGX_PT_REG) | 2, false, false, NULL) == -EINVAL);
    CHECK(sim_add_pages(&raw, 4096, NULL, 4096, rw | SGX_SECINFO_PENDING, false, false, NULL) == -EINVAL);
    CHECK(sim_add_pages(&raw, 4096, NULL, 4096, SGX_SECINFO_PT(SGX_PT_SECS), false, false, NULL) == -EINVAL);
    CHECK(sim_add_pages(&raw, 4096, NULL, 4096, SGX_SECINFO_PT(SGX_PT_TRIM), false, false, NULL) == -EINVAL);
    CHECK(sim_add_pages(&raw, 4096, NULL, 4096, rw | 1ull << 40, false, false, NULL) == -EINVAL);
    CHECK(sim_add_pages(&raw, 4096, &tcs, 4096, thread | 1, false, false, NULL) == -EINVAL);
    tcs.reserved[4000] = 1;
    CHECK(sim_add_pages(&raw, 4096, &tcs, 4096, thread, false, false, NULL) == -EINVAL);
    tcs.reserved[4000] = 0;
    CHECK(sim_add_pages(&raw, 4096, &tcs, 4096, thread, false, false, NULL) == 0);
    CHECK(atomic_load(&raw.sim->header->tcs_count) == 1);
    CHECK(raw.info.pages == 2);
    sim_close(&raw);
}

/* Blocks of the file are what was added, zero pages included, and little more. */
static void pages_are_counted(void)
{
    struct teemate_enclave raw = {.fd = -1};
    struct create_params params = {.base = 0x400000000000, .size = 64 << 20, .ssa_frame_pages = 1,
                                   .attributes = {.flags = SGX_ATTR_MODE64BIT, .xfrm = 3}};
    int64_t before, after;

    CHECK(sim_create(&raw, &params, NULL) == 0);
    before = teemate_sim_pages(raw.fd);
    CHECK(before >= 0 && before < 8);
    CHECK(sim_add_pages(&raw, 0, NULL, 8 << 20, SGX_SECINFO_PT(SGX_PT_REG) | 3, false, false, NULL) == 0);
    after = teemate_sim_pages(raw.fd);
    CHECK(after - before >= 2048 && after - before < 2048 + 16);
    sim_close(&raw);
}

static void read_whole(const char *name, void *data, size_t size)
{
    char path[512];
    int fd;

    snprintf(path, sizeof(path), "%s/%s", folder, name);
    fd = open(path, O_RDONLY);
    CHECK(read(fd, data, size) == (ssize_t)size);
    close(fd);
}

/* EINIT of the plain image's SIGSTRUCT for a SECS that the loader would not have made. */
static int einit(uint32_t miscselect, uint64_t xfrm, struct teemate_diag *diag)
{
    struct teemate_enclave raw = {.fd = -1};
    struct create_params params = {.base = 0x400000000000, .size = ENCLAVE_SIZE, .ssa_frame_pages = 1,
                                   .miscselect = miscselect,
                                   .attributes = {.flags = SGX_ATTR_MODE64BIT, .xfrm = xfrm}};
    struct sgx_sigstruct sigstruct;
    uint8_t mrenclave[32];
    int error, again;

    read_whole("plain.good.sig", &sigstruct, sizeof(sigstruct));
    read_whole("plain.mrenclave", mrenclave, sizeof(mrenclave));
    CHECK(sim_create(&raw, &params, NULL) == 0);
    error = sim_init(&raw, &sigstruct, mrenclave, diag);
    again = sim_init(&raw, &sigstruct, mrenclave, NULL);
    CHECK(again == (error ? error : -EINVAL));
    if (!error)
        CHECK(sim_add_pages(&raw, 0, NULL, 4096, SGX_SECINFO_PT(SGX_PT_REG) | 1, false, false, NULL) == -EINVAL);
    sim_close(&raw);
    close(raw.fd);
    return error;
}

static void einit_below_the_loader(void)
{
    struct teemate_diag diag = {0};

    CHECK(einit(0, SGX_XFRM_LEGACY, &diag) == 0);
    CHECK(einit(SGX_MISC_EXINFO, SGX_XFRM_LEGACY, &diag) == -EACCES);
    CHECK(diag.step == TEEMATE_STEP_EINIT && diag.code == SGX_INVALID_ATTRIBUTE);
    CHECK(diag.offset == offsetof(struct sgx_sigstruct, miscselect));
    if (__builtin_cpu_supports("avx")) {
        CHECK(einit(0, SGX_XFRM_LEGACY | SGX_XFRM_AVX, &diag) == -EACCES);
        CHECK(diag.code == SGX_INVALID_ATTRIBUTE && diag.offset == offsetof(struct sgx_sigstruct, attributes) + 8);
    }
}

static uint64_t random_state = 88172645463325252ull;

static uint64_t random64(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

/* Values that hurt, among others. */
static uint64_t nasty(void)
{
    static const uint64_t values[] = {0, 1, 0xfff, 0x1000, ENCLAVE_SIZE, ENCLAVE_SIZE - 1, 1ull << 47, ~0ull, ~0xfffull, 1ull << 63};

    return random64() % 3 ? values[random64() % (sizeof(values) / sizeof(values[0]))] : random64();
}

static void scribble_header(void)
{
    struct teemate_enclave *made = create(), *enclave;
    struct sim_header *header = made->sim->header, good = *header;

    /* An XSAVE area that this computer does not have, and perhaps the SSA frame no room for. */
    header->attributes.xfrm |= 1ull << 62;
    CHECK(open_again(teemate_enclave_fd(made), made->base, made->size, &enclave) == -EBADMSG);
    *header = good;

    for (int i = 0; i < 3000; i++) {
        int error;

        for (unsigned n = 1 + random64() % 3; n; n--)
            ((uint64_t *)header)[random64() % (sizeof(*header) / 8)] = nasty();
        error = open_again(teemate_enclave_fd(made), made->base, made->size, &enclave);
        CHECK(error == 0 || error == -ENODEV || error == -ESTALE || error == -EBADMSG);
        if (!error) {
            CHECK(enclave->size == made->size && enclave->base == made->base);
            CHECK(enclave->info.ssa_frame_pages && enclave->info.ssa_frame_pages <= ENCLAVE_SIZE / SGX_PAGE);
            teemate_close(enclave);
        }
        *header = good;
    }
}

/*
 * TCS table and EPCM are anything: entering, leaves, SGX2 calls and burying the dead give
 * errors or faults.  OENTRY stays: where to start is the enclave's business, and so is what
 * it does with a wrong FS or GS.
 */
static void scribble_tables(void)
{
    struct teemate_enclave *made = create(), *enclave = attach(made);
    struct sim_mapping *sim = enclave->sim;
    struct sim_tcs tcs = sim->tcs[0];
    uint64_t epcm[ENCLAVE_SIZE / SGX_PAGE], result, count;
    struct sgx_enclave_run run;

    memcpy(epcm, (void *)sim->epcm, sizeof(epcm));
    for (int i = 0; i < 3000; i++) {
        struct sim_leaf_regs regs = {.rax = random64() % 9, .rbx = enclave->base + DATA,
                                     .rcx = random64() % 2 ? enclave->base + DATA2 : nasty(),
                                     .rdx = random64() % 2 ? enclave->base + DATA : nasty()};
        struct sim_fault fault;

        switch (random64() % 6) {
        case 0:
            /* The second puts the frame at the very end of the address space. */
            sim->tcs[0].ossa = random64() % 2 ? nasty() : 0 - enclave->base - SGX_PAGE;
            break;
        case 1:
            atomic_store(&sim->tcs[0].word, nasty() & ~SIM_TCS_BUSY);
            break;
        case 2:
            sim->tcs[0].nssa = (uint32_t)nasty();
            atomic_store(&sim->tcs[0].word, SIM_TCS_WORD(0, random64() & 0xffff, random64() & 1));
            break;
        case 3:
            atomic_store(&sim->header->tcs_count, (uint32_t)nasty());
            break;
        default:
            atomic_store(&sim->epcm[random64() % 2 ? T0 / SGX_PAGE : random64() % (ENCLAVE_SIZE / SGX_PAGE)],
                         random64() % 2 ? nasty() : random64() | SIM_EPCM_VALID);
        }
        write_inside(enclave, random64() % ENCLAVE_SIZE, &run);
        regs.rax = random64() % 9;
        sim_enclu(enclave, &regs, &fault);
        sim_tcs_bury(enclave, T0);
        teemate_map_tcs(enclave, random64() % 64 * SGX_PAGE, NULL);
        if (i % 50 == 0) {
            sim_restrict_permissions(enclave, nasty(), nasty() % (2 * ENCLAVE_SIZE), random64() % 8, &result, &count);
            sim_modify_types(enclave, nasty(), nasty() % (2 * ENCLAVE_SIZE), random64() % 6, &result, &count);
            sim_remove_pages(enclave, nasty(), nasty() % (2 * ENCLAVE_SIZE), &count);
        }
        sim->tcs[0] = tcs;
        memcpy((void *)sim->epcm, epcm, sizeof(epcm));
        atomic_store(&sim->header->tcs_count, 16);
    }
    atomic_fetch_add(&sim->header->epoch, 1);
    CHECK(write_inside(enclave, DATA, &run) == -1);
}

/* One process restricts a page; the other, which has used it, sees that at its next entry. */
static void restriction_crosses_processes(void)
{
    struct teemate_enclave *made = create(), *enclave;
    uint64_t result, count;
    int ready[2], go[2], status;
    char byte;
    pid_t child;

    CHECK(pipe(ready) == 0 && pipe(go) == 0);
    child = fork();
    if (child == 0) {
        struct sgx_enclave_run run;
        struct teemate_enclave *mine;

        CHECK(open_again(made->fd, made->base, made->size, &mine) == 0);
        CHECK(teemate_map(mine, NULL) == 0 && teemate_map_tcs(mine, T0, NULL) == 0);
        CHECK(write_inside(mine, DATA2, &run) == -1);
        CHECK(write(ready[1], "r", 1) == 1 && read(go[0], &byte, 1) == 1);
        CHECK(write_inside(mine, DATA2, &run) == SGX_VECTOR_PF);
        CHECK(run.exception_error_code == (SGX_PF_SGX | SGX_PF_P | SGX_PF_W | SGX_PF_U));
        CHECK(run.exception_addr == mine->base + DATA2);
        _exit(0);
    }
    enclave = attach(made);
    CHECK(read(ready[0], &byte, 1) == 1);
    CHECK(sim_restrict_permissions(enclave, DATA2, SGX_PAGE, SGX_SECINFO_R, &result, &count) == 0);
    CHECK(write(go[1], "g", 1) == 1);
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

static uint64_t egetkey(struct teemate_enclave *enclave, const struct sgx_keyrequest *request, uint8_t key[16])
{
    struct sim_leaf_regs regs = {.rax = SGX_EGETKEY, .rbx = enclave->base + DATA, .rcx = enclave->base + DATA2};
    struct sim_fault fault;

    memcpy(sim_at(enclave, regs.rbx), request, sizeof(*request));
    CHECK(sim_enclu(enclave, &regs, &fault) == 0);
    memcpy(key, sim_at(enclave, enclave->base + DATA2), 16);
    return regs.rax;
}

/* Keys that need attributes which nobody can have here; the SECS is changed behind EINIT's back. */
static void privileged_keys(void)
{
    struct teemate_enclave *made = create(), *enclave = attach(made);
    struct sim_header *header = enclave->sim->header;
    uint8_t keys[4][16];

    header->attributes.flags |= SGX_ATTR_PROVISIONKEY | SGX_ATTR_EINITTOKENKEY;
    for (uint16_t name = SGX_KEY_EINITTOKEN; name <= SGX_KEY_PROVISION_SEAL; name++) {
        struct sgx_keyrequest request = {.keyname = name};
        uint8_t other[16], signer = header->mrsigner[0];

        CHECK(egetkey(enclave, &request, keys[name]) == SGX_SUCCESS);
        request.isvsvn = (uint16_t)(header->isvsvn + 1);
        CHECK(egetkey(enclave, &request, other) == SGX_INVALID_ISVSVN);
        request.isvsvn = 0;
        request.cpusvn[3] = 1;
        CHECK(egetkey(enclave, &request, other) == SGX_INVALID_CPUSVN);
        request.cpusvn[3] = 0;
        /* KEYID counts for EINITTOKEN keys only, MRSIGNER for all. */
        request.keyid[0] = 1;
        CHECK(egetkey(enclave, &request, other) == SGX_SUCCESS);
        CHECK((memcmp(other, keys[name], 16) != 0) == (name == SGX_KEY_EINITTOKEN));
        request.keyid[0] = 0;
        header->mrsigner[0] ^= 1;
        CHECK(egetkey(enclave, &request, other) == SGX_SUCCESS);
        CHECK(memcmp(other, keys[name], 16) != 0);
        header->mrsigner[0] = signer;
    }
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < i; j++)
            CHECK(memcmp(keys[i], keys[j], 16) != 0);
}

/* Attaching maps the same whatever the size: page permissions come with the faults. */
static void windows_of_pages(void)
{
    struct teemate_enclave *made = create(), *enclave = attach(made);
    struct sim_fault fault;
    struct sgx_enclave_run run;

    CHECK(atomic_load(&enclave->sim->epoch) == atomic_load(&enclave->sim->header->epoch));
    CHECK(write_inside(enclave, DATA, &run) == -1);
    CHECK(sim_page_fault(enclave, enclave->base + DATA, SGX_PF_U | SGX_PF_W, &fault) == 0);
    /* Host code of this process reaches the page that the fault opened, and its neighbour. */
    *(volatile uint8_t *)(enclave->base + DATA) = 1;
    *(volatile uint8_t *)(enclave->base + DATA2) = 1;
    CHECK(sim_page_fault(enclave, enclave->base + enclave->size, SGX_PF_U, &fault) == 1);
    CHECK(fault.vector == SGX_VECTOR_PF && fault.error == SGX_PF_U);
    CHECK(sim_page_fault(enclave, 0x1234, SGX_PF_U | SGX_PF_W, &fault) == 1 && fault.addr == 0x1234);
}

/* The same file mapped once more: what was found out the first time holds for the same segments and limits alone. */
static void mapped_again(void)
{
    struct teemate_enclave *made = create(), *enclave;
    struct teemate_segment wide = {.offset = DATA, .size = 0x1000, .prot = PROT_READ | PROT_WRITE | PROT_EXEC,
                                   .type = SGX_PT_REG};
    _Atomic uint64_t *epcm;
    uint64_t word;

    for (int i = 0; i < 2; i++)
        teemate_close(attach(made));
    CHECK(teemate_open(TEEMATE_SIM, dup(teemate_enclave_fd(made)), made->base, made->size, &wide, 1, &enclave, NULL) == 0);
    CHECK(teemate_map(enclave, NULL) == -EACCES);
    teemate_close(enclave);
    teemate_close(attach(made));
    /* EMODT makes the limit of a page another one, and counts. */
    epcm = &made->sim->epcm[DATA / SGX_PAGE];
    word = atomic_load(epcm);
    atomic_store(epcm, word & ~((uint64_t)SIM_EPCM_W << 31));
    CHECK(SIM_EPCM_MAX(atomic_load(epcm)) == PROT_READ);
    atomic_fetch_add(&made->sim->header->epoch, 1);
    CHECK(open_again(teemate_enclave_fd(made), made->base, made->size, &enclave) == 0);
    CHECK(teemate_map(enclave, NULL) == -EACCES);
    teemate_close(enclave);
    atomic_store(epcm, word);
    teemate_close(attach(made));
}

static const struct test {
    const char *name;
    void (*run)(void);
} tests[] = {
    {"foreign_files", foreign_files},
    {"copies_without_seals", copies_without_seals},
    {"finished_is_sealed", finished_is_sealed},
    {"other_geometry", other_geometry},
    {"unfinished", unfinished},
    {"secs_checks", secs_checks},
    {"eadd_checks", eadd_checks},
    {"einit_below_the_loader", einit_below_the_loader},
    {"pages_are_counted", pages_are_counted},
    {"scribble_header", scribble_header},
    {"scribble_tables", scribble_tables},
    {"restriction_crosses_processes", restriction_crosses_processes},
    {"privileged_keys", privileged_keys},
    {"windows_of_pages", windows_of_pages},
    {"mapped_again", mapped_again},
};

int main(int argc, char **argv)
{
    if (argc == 3) {
        folder = argv[1];
        alarm(60);
        for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++)
            if (strcmp(argv[2], tests[i].name) == 0) {
                tests[i].run();
                return 0;
            }
    }
    fprintf(stderr, "usage: epc_tests FOLDER NAME\n");
    return 2;
}
