/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The EPC of one simulated enclave: its memfd and the tables behind the pages
 * (sim.h): ECREATE, EADD, and opening what another process made.
 *
 * The tables are shared with everybody who holds the fd and may hold anything at any
 * time.  What has to be true for this process's memory safety (size, seals, where the
 * tables lie) is checked once against the file itself, which the seals keep as it is;
 * every index and length read later is checked where it is used.
 */
#include "sim.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "enclave.h"
#include "secs.h"
#include "sim_check.h"
#include "sim_thread.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8u
#endif

#define SIM_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
/* CPUID.(12H,0):EDX[15:8] of the processors that Linux supports: 64 GiB. */
#define SIM_SIZE_MAX (1ull << 36)
#define SIM_ATTRIBUTES \
    (SGX_ATTR_DEBUG | SGX_ATTR_MODE64BIT | SGX_ATTR_PROVISIONKEY | SGX_ATTR_EINITTOKENKEY | SGX_ATTR_KSS)

/* The tables; `with_view`: and what lies before them in the file, the pages, in the same mapping. */
static int map_tables(struct teemate_enclave *enclave, bool with_view, struct teemate_diag *diag)
{
    struct sim_mapping *sim = calloc(1, sizeof(*sim));
    uint64_t offset = SIM_TABLES_OFFSET(enclave->size), before = with_view ? offset : 0;
    uint8_t *start, *tables;

    if (!sim)
        return diag_set(diag, -ENOMEM, TEEMATE_STEP_MAP, 0, 0, "no memory for the enclave's description");
    sim->tables_size = SIM_TABLES_SIZE(enclave->size);
    start = mmap(NULL, before + sim->tables_size, PROT_READ | PROT_WRITE, MAP_SHARED, enclave->fd,
                 (off_t)(offset - before));
    if (start == MAP_FAILED) {
        int error = -errno;

        free(sim);
        return diag_set(diag, error, TEEMATE_STEP_MAP, 0, 0,
                        "cannot map the tables of the simulated enclave (%s); is there a limit on address space?",
                        strerror(-error));
    }
    madvise(start, before + sim->tables_size, MADV_DONTFORK);
    tables = start + before;
    if (with_view)
        sim->view = start;
    sim->header = (struct sim_header *)tables;
    sim->tcs = (struct sim_tcs *)(tables + SIM_HEADER_SIZE);
    sim->epcm = (_Atomic uint64_t *)(tables + SIM_HEADER_SIZE + SIM_TCS_MAX * sizeof(struct sim_tcs));
    enclave->sim = sim;
    return 0;
}

/* SDM volume 3D, ECREATE: the checks of SECS.  NULL, or what is wrong. */
static const char *check_secs(const struct create_params *params)
{
    const struct secs_limits limits = {
        .size_max = SIM_SIZE_MAX,
        .attributes = SIM_ATTRIBUTES,
        .xfrm = sim_xcr0() ? sim_xcr0() : SGX_XFRM_LEGACY,
        .miscselect = SGX_MISC_EXINFO,
    };

    return secs_fault(params, &limits);
}

int sim_create(struct teemate_enclave *enclave, const struct create_params *params,
               struct teemate_diag *diag)
{
    const char *fault = check_secs(params), *machine = getenv("TEEMATE_SIM_CPU");
    struct sim_header *header;
    int fd, error;

    if (fault)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_ECREATE, 0, 0, "ECREATE refuses the enclave: %s", fault);
    fd = memfd_create("teemate-sim-enclave", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (fd < 0 && errno == EINVAL) /* before Linux 6.3 */
        fd = memfd_create("teemate-sim-enclave", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return diag_set(diag, -errno, TEEMATE_STEP_ECREATE, 0, 0, "cannot make a memfd for the enclave: %s",
                        strerror(errno));
    if (ftruncate(fd, (off_t)(params->size + SIM_TABLES_SIZE(params->size))) ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)) {
        error = -errno;
        close(fd);
        return diag_set(diag, error, TEEMATE_STEP_ECREATE, 0, 0,
                        "cannot size the enclave's memfd to %llu bytes: %s; is there a limit on file size?",
                        (unsigned long long)params->size, strerror(-error));
    }
    enclave->fd = fd;
    enclave->base = params->base;
    enclave->size = params->size;
    error = map_tables(enclave, false, diag);
    if (error) {
        enclave->fd = -1;
        close(fd);
        return error;
    }
    header = enclave->sim->header;
    header->version = SIM_VERSION;
    header->ssa_frame_pages = params->ssa_frame_pages;
    header->base = params->base;
    header->size = params->size;
    header->attributes = params->attributes;
    header->miscselect = params->miscselect;
    /* TEEMATE_SIM_CPU=sgx1: a processor without SGX2. */
    header->sgx2 = !(machine && strcmp(machine, "sgx1") == 0);
    atomic_store(&header->epoch, 1);
    header->magic = SIM_MAGIC;

    enclave->info.base = params->base;
    enclave->info.size = params->size;
    enclave->info.attributes = params->attributes.flags;
    enclave->info.xfrm = params->attributes.xfrm;
    sim_xsave_prepare(enclave->info.xfrm);
    enclave->info.miscselect = params->miscselect;
    enclave->info.ssa_frame_pages = params->ssa_frame_pages;
    enclave->info.backend = TEEMATE_SIM;
    return 0;
}

bool sim_tcs_legal(const struct sgx_tcs *tcs)
{
    static const uint8_t zero[sizeof(tcs->reserved)];

    /*
     * EADD and EACCEPT (SDM volume 3D) leave the alignment of OSSA, OFSBASE and OGSBASE to EENTER, and in
     * 64-bit mode they do not look at the limits.  Without CET its two fields are reserved.
     */
    return !(tcs->flags & ~SGX_TCS_DBGOPTIN) && !tcs->ocetssa && !tcs->oprevssp && memcmp(tcs->reserved, zero, sizeof(zero)) == 0;
}

int sim_tcs_enlist(struct sim_mapping *sim, uint64_t offset, const struct sgx_tcs *tcs)
{
    uint32_t count = atomic_load(&sim->header->tcs_count), index;
    struct sim_tcs *slot = NULL;

    if (count > SIM_TCS_MAX)
        count = SIM_TCS_MAX;
    /* A page that was a TCS before has a place already. */
    for (index = 0; index < count && !slot; index++)
        if (sim->tcs[index].valid && sim->tcs[index].offset == offset)
            slot = &sim->tcs[index];
    if (slot) {
        index--;
    } else {
        index = atomic_fetch_add(&sim->header->tcs_count, 1);
        if (index >= SIM_TCS_MAX) {
            atomic_store(&sim->header->tcs_count, SIM_TCS_MAX);
            return -ENOSPC;
        }
        slot = &sim->tcs[index];
    }
    slot->offset = offset;
    slot->flags = 0; /* DBGOPTIN is for EDBGWR to set */
    slot->ossa = tcs->ossa;
    slot->oentry = tcs->oentry;
    slot->ofsbase = tcs->ofsbase;
    slot->ogsbase = tcs->ogsbase;
    slot->nssa = tcs->nssa;
    atomic_store(&slot->word, SIM_TCS_WORD(0, 0, 0));
    slot->valid = 1;
    return (int)index;
}

static int write_all(int fd, const uint8_t *data, uint64_t size, uint64_t offset)
{
    while (size) {
        ssize_t n = pwrite(fd, data, size, (off_t)offset);

        if (n < 0 && errno != EINTR)
            return -errno;
        if (n > 0) {
            data += n;
            size -= (uint64_t)n;
            offset += (uint64_t)n;
        }
    }
    return 0;
}

int sim_add_pages(struct teemate_enclave *enclave, uint64_t offset, const void *data, uint64_t size,
                  uint64_t secinfo_flags, bool measured, bool partly, struct teemate_diag *diag)
{
    static const struct sgx_tcs no_tcs;
    struct sim_mapping *sim = enclave->sim;
    uint64_t type = secinfo_flags >> 8, rwx = secinfo_flags & 7;
    uint64_t word = SIM_EPCM_VALID | rwx << 1 | type << SIM_EPCM_TYPE_SHIFT |
                    (type == SGX_PT_TCS ? 3 : rwx) << SIM_EPCM_MAX_SHIFT;
    int error = 0;

    (void)measured; /* the loader measures; the model has no MRENCLAVE under construction */
    (void)partly;
    if (offset % SGX_PAGE || size % SGX_PAGE || offset > enclave->size || size > enclave->size - offset)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_EADD, 0, offset,
                        "EADD of %#llx bytes at offset %#llx: not whole pages inside the enclave of %#llx bytes",
                        (unsigned long long)size, (unsigned long long)offset,
                        (unsigned long long)enclave->size);
    if ((type != SGX_PT_REG && type != SGX_PT_TCS) || secinfo_flags & 0xf8)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_EADD, 0, offset,
                        "EADD at offset %#llx: SECINFO.FLAGS %#llx is not a regular page or a TCS",
                        (unsigned long long)offset, (unsigned long long)secinfo_flags);
    if ((rwx & SGX_SECINFO_W && !(rwx & SGX_SECINFO_R)) || (type == SGX_PT_TCS && rwx))
        return diag_set(diag, -EINVAL, TEEMATE_STEP_EADD, 0, offset,
                        "EADD at offset %#llx: %s", (unsigned long long)offset,
                        type == SGX_PT_TCS ? "a TCS page has no permissions"
                                           : "a page that can be written must be readable");
    if (enclave->finished || sim->header->attributes.flags & SGX_ATTR_INIT)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_EADD, 0, offset,
                        "EADD at offset %#llx: the enclave is initialized", (unsigned long long)offset);
    for (uint64_t at = offset; at < offset + size; at += SGX_PAGE)
        if (atomic_load_explicit(&sim->epcm[at / SGX_PAGE], memory_order_relaxed))
            return diag_set(diag, -EBUSY, TEEMATE_STEP_EADD, 0, at,
                            "EADD at offset %#llx: there is a page already", (unsigned long long)at);

    if (data)
        error = write_all(enclave->fd, data, size, offset);
    else if (fallocate(enclave->fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size))
        error = -errno;
    if (error)
        return diag_set(diag, error == -ENOSPC ? -ENOMEM : error, TEEMATE_STEP_EADD, 0, offset,
                        "EADD of %llu KiB at offset %#llx: %s; is there a memory limit?",
                        (unsigned long long)size / 1024, (unsigned long long)offset, strerror(-error));

    for (uint64_t at = offset; at < offset + size; at += SGX_PAGE) {
        uint64_t entry = word;

        if (type == SGX_PT_TCS) {
            struct sgx_tcs tcs = no_tcs;
            int index;

            if (data)
                memcpy(&tcs, (const uint8_t *)data + (at - offset), sizeof(tcs));
            if (!sim_tcs_legal(&tcs))
                return diag_set(diag, -EINVAL, TEEMATE_STEP_EADD, 0, at,
                                "EADD of the TCS at offset %#llx: FLAGS and the reserved bytes must be zero",
                                (unsigned long long)at);
            index = sim_tcs_enlist(sim, at, &tcs);
            if (index < 0)
                return diag_set(diag, index, TEEMATE_STEP_EADD, 0, at,
                                "EADD of the TCS at offset %#llx: the simulated enclave has no more than %u",
                                (unsigned long long)at, SIM_TCS_MAX);
            entry |= (uint64_t)index << SIM_EPCM_TCS_SHIFT;
        }
        atomic_store_explicit(&sim->epcm[at / SGX_PAGE], entry, memory_order_relaxed);
    }
    enclave->info.pages += size / SGX_PAGE;
    return 0;
}

/* Is this the file of a sim enclave?  Its size is the geometry that its header claims.  Returns its seals, or -1. */
static int read_header(int fd, struct sim_header *header, struct sim_file *file)
{
    int seals = fcntl(fd, F_GET_SEALS);
    struct stat stat;
    uint64_t size;

    if (seals < 0 || fstat(fd, &stat) || stat.st_size < (off_t)(SIM_HEADER_SIZE + 2 * SGX_PAGE))
        return -1;
    *file = (struct sim_file){stat.st_dev, stat.st_ino};
    /* The size of ELRANGE is the largest power of two that is not above the file's. */
    size = 1ull << (63 - __builtin_clzll((uint64_t)stat.st_size));
    if (size > SIM_SIZE_MAX)
        return -1;
    while (size >= 2 * SGX_PAGE && size + SIM_TABLES_SIZE(size) != (uint64_t)stat.st_size)
        size /= 2;
    if (size < 2 * SGX_PAGE ||
        pread(fd, header, sizeof(*header), (off_t)SIM_TABLES_OFFSET(size)) != sizeof(*header) ||
        header->magic != SIM_MAGIC || header->version != SIM_VERSION || header->size != size)
        return -1;
    return seals;
}

int sim_open(struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    struct teemate_enclave_info *info = &enclave->info;
    struct create_params claimed;
    struct sim_header header;
    struct sim_file file;
    int seals = read_header(enclave->fd, &header, &file), error;

    if (seals < 0)
        return diag_set(diag, -ENODEV, TEEMATE_STEP_MAP, 0, 0, "the descriptor is not that of a simulated enclave");
    if ((seals & SIM_SEALS) != SIM_SEALS || !(header.attributes.flags & SGX_ATTR_INIT))
        return diag_set(diag, -ESTALE, TEEMATE_STEP_MAP, 0, 0,
                        "the simulated enclave was not finished: EINIT has not been done");
    if (header.size != enclave->size || header.base != enclave->base)
        return diag_set(diag, -ESTALE, TEEMATE_STEP_MAP, 0, 0,
                        "the simulated enclave has its place at %#llx (%#llx bytes), not at %#llx (%#llx bytes)",
                        (unsigned long long)header.base, (unsigned long long)header.size,
                        (unsigned long long)enclave->base, (unsigned long long)enclave->size);
    claimed = (struct create_params){.base = header.base,
                                     .size = header.size,
                                     .ssa_frame_pages = header.ssa_frame_pages,
                                     .miscselect = header.miscselect,
                                     .attributes = header.attributes};
    claimed.attributes.flags &= ~(uint64_t)SGX_ATTR_INIT;
    /* An SSA frame smaller than its XSAVE area would have an AEX write behind the enclave's end. */
    if (check_secs(&claimed))
        return diag_set(diag, -EBADMSG, TEEMATE_STEP_MAP, 0, 0,
                        "the tables of the simulated enclave make no sense: somebody wrote into them");
    error = map_tables(enclave, true, diag);
    if (error)
        return error;
    enclave->sim->file = file;
    /* From the copy that was checked: the shared one may change under us. */
    info->base = header.base;
    info->size = header.size;
    info->attributes = header.attributes.flags;
    info->xfrm = header.attributes.xfrm;
    sim_xsave_prepare(info->xfrm);
    info->miscselect = header.miscselect;
    info->ssa_frame_pages = header.ssa_frame_pages;
    info->isvprodid = header.isvprodid;
    info->isvsvn = header.isvsvn;
    info->backend = TEEMATE_SIM;
    memcpy(info->mrenclave, header.mrenclave, sizeof(info->mrenclave));
    memcpy(info->mrsigner, header.mrsigner, sizeof(info->mrsigner));
    enclave->finished = true;
    return 0;
}

int sim_view_open(struct teemate_enclave *enclave)
{
    struct sim_mapping *sim = enclave->sim;
    uint8_t *view;

    if (sim->view)
        return 0;
    view = mmap(NULL, enclave->size, PROT_READ | PROT_WRITE, MAP_SHARED, enclave->fd, 0);
    if (view == MAP_FAILED)
        return -errno;
    madvise(view, enclave->size, MADV_DONTFORK);
    sim->view = view;
    return 0;
}

void sim_close(struct teemate_enclave *enclave)
{
    struct sim_mapping *sim = enclave->sim;

    if (!sim)
        return;
    if (sim->view != NULL && sim->view + SIM_TABLES_OFFSET(enclave->size) == (uint8_t *)sim->header) {
        munmap(sim->view, SIM_TABLES_OFFSET(enclave->size) + sim->tables_size);
    } else {
        if (sim->view)
            munmap(sim->view, enclave->size);
        munmap(sim->header, sim->tables_size);
    }
    free(sim);
    enclave->sim = NULL;
}

int teemate_sim_is(int fd)
{
    struct sim_header header;
    struct sim_file file;

    return read_header(fd, &header, &file) >= 0;
}

int64_t teemate_sim_pages(int fd)
{
    struct stat stat;

    if (fstat(fd, &stat))
        return -errno;
    return stat.st_blocks * 512 / SGX_PAGE;
}
