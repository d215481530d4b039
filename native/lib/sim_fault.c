/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The EPCM's say in accesses of enclave code, and the page table that follows it.
 *
 * A process's page table is a cache: everything starts without permission (sim_backend.c)
 * and sim_page_fault gives runs of pages what the mapping and the EPCM both allow.  So
 * attaching costs nothing per page, and taking a permission away is one count (the epoch)
 * that every process compares before it enters.
 *
 * All but sim_may_map, sim_fetch_for and what is theirs is called from signal handlers: no TLS, no locks, no libc
 * but system calls and memory.
 */
#include "sim.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "enclave.h"
#include "sim_check.h"
#include "teemate_abi.h"

/* Pages that one fault may bring in, in a window of this size and alignment. */
#define WINDOW 1024u
#define PRESENT_MASK \
    (SIM_EPCM_VALID | SIM_EPCM_R | SIM_EPCM_W | SIM_EPCM_X | SIM_EPCM_PENDING | SIM_EPCM_MODIFIED | \
     0xffull << SIM_EPCM_TYPE_SHIFT)

void *sim_at(const struct teemate_enclave *enclave, uint64_t addr)
{
    return enclave->sim->view + (addr - enclave->base);
}

static const struct teemate_segment *segment_of(const struct teemate_enclave *enclave, uint64_t offset)
{
    for (size_t i = 0; i < enclave->segment_count; i++)
        if (offset - enclave->segments[i].offset < enclave->segments[i].size)
            return &enclave->segments[i];
    return NULL;
}

/* PROT_READ, PROT_WRITE and PROT_EXEC are SECINFO's R, W and X.  Where no page is, all goes. */
static bool too_wide(const struct teemate_segment *segment, uint64_t word)
{
    return segment->type != SGX_PT_TCS && word & SIM_EPCM_VALID && segment->prot & ~SIM_EPCM_MAX(word);
}

bool sim_tcs_is_mapped(const struct teemate_enclave *enclave, uint64_t offset, uint32_t index)
{
    const struct teemate_segment *segment = segment_of(enclave, offset);

    if (segment && segment->type != SGX_PT_TCS)
        return segment->prot & PROT_WRITE &&
               !too_wide(segment, atomic_load(&enclave->sim->epcm[offset / SGX_PAGE]));
    return index < SIM_TCS_MAX && atomic_load(&enclave->sim->tcs_mapped[index]);
}

/*
 * Whether one of the segment's pages is.  This is what mapping costs for every page, so it decides nothing
 * page by page and compilers take several at a time: hence no atomic loads.  The words are aligned, and one
 * that changes meanwhile has changed before or after.
 */
static bool any_too_wide(const struct teemate_enclave *enclave, const struct teemate_segment *segment)
{
    const uint64_t *words = (const uint64_t *)enclave->sim->epcm + segment->offset / SGX_PAGE;
    uint64_t count = segment->size / SGX_PAGE, lacking = 0;

    if (segment->type == SGX_PT_TCS) /* mapped by sim_backend.c's map_tcs, if at all */
        return false;
    for (uint64_t i = 0; i < count; i++)
        lacking |= ~words[i] & -(words[i] & SIM_EPCM_VALID);
    return segment->prot & SIM_EPCM_MAX(lacking);
}

/*
 * The enclave that was mapped last, and how: who attaches to it again need not look at all of its pages once
 * more.  A page gets another limit by EMODT alone, and that counts the epoch.
 */
static struct {
    pthread_mutex_t lock; /* tried only: in a child of fork it may be held for ever */
    struct sim_file file;
    uint32_t epoch;
    struct teemate_segment *segments;
    size_t count;
} mapped_before = {.lock = PTHREAD_MUTEX_INITIALIZER};

static bool was_mapped(const struct teemate_enclave *enclave, uint32_t epoch)
{
    bool same;

    if (enclave->sim->file.inode == 0 || pthread_mutex_trylock(&mapped_before.lock) != 0)
        return false;
    same = mapped_before.file.inode == enclave->sim->file.inode &&
           mapped_before.file.device == enclave->sim->file.device && mapped_before.epoch == epoch &&
           mapped_before.count == enclave->segment_count &&
           memcmp(mapped_before.segments, enclave->segments, mapped_before.count * sizeof(*enclave->segments)) == 0;
    pthread_mutex_unlock(&mapped_before.lock);
    return same;
}

static void remember_mapped(const struct teemate_enclave *enclave, uint32_t epoch)
{
    size_t size = enclave->segment_count * sizeof(*enclave->segments);
    struct teemate_segment *segments;

    if (enclave->sim->file.inode == 0 || size == 0 || pthread_mutex_trylock(&mapped_before.lock) != 0)
        return;
    segments = realloc(mapped_before.segments, size);
    if (segments != NULL) {
        memcpy(segments, enclave->segments, size);
        mapped_before.segments = segments;
        mapped_before.count = enclave->segment_count;
        mapped_before.file = enclave->sim->file;
        mapped_before.epoch = epoch;
    }
    pthread_mutex_unlock(&mapped_before.lock);
}

int sim_may_map(const struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    uint32_t epoch = atomic_load(&enclave->sim->header->epoch);

    if (SIM_CHECK("MAP.PERSONALITY", map_all_executable()))
        return diag_set(diag, -EACCES, TEEMATE_STEP_MAP, 0, 0, ALL_EXECUTABLE);
    if (was_mapped(enclave, epoch))
        return 0;
    for (size_t i = 0; i < enclave->segment_count; i++) {
        const struct teemate_segment *segment = &enclave->segments[i];
        uint64_t at = segment->offset, last = segment->offset + segment->size - SGX_PAGE;

        if (!SIM_CHECK("MAP.PROT", any_too_wide(enclave, segment)))
            continue;
        while (at < last && !too_wide(segment, atomic_load(&enclave->sim->epcm[at / SGX_PAGE])))
            at += SGX_PAGE;
        return diag_set(diag, -EACCES, TEEMATE_STEP_MAP, 0, at,
                        "the page at offset %#llx was added with fewer permissions than its segment has",
                        (unsigned long long)at);
    }
    remember_mapped(enclave, epoch);
    return 0;
}

static int prot_of(uint64_t word)
{
    return (word & SIM_EPCM_R ? PROT_READ : 0) | (word & SIM_EPCM_W ? PROT_WRITE : 0) |
           (word & SIM_EPCM_X ? PROT_EXEC : 0);
}

static int prot_for(uint32_t access)
{
    return access & SGX_PF_W ? PROT_WRITE : access & SGX_PF_I ? PROT_EXEC : PROT_READ;
}

static bool refuse(struct sim_fault *fault, uint64_t addr, uint32_t access, uint32_t bits)
{
    fault->vector = SGX_VECTOR_PF;
    fault->error = (access & (SGX_PF_W | SGX_PF_I)) | SGX_PF_U | bits;
    fault->addr = addr;
    return false;
}

/* SDM volume 3D, "Access-control Requirements": every access to a page of ELRANGE. */
static bool epcm_allows(uint64_t word, uint32_t access)
{
    if (!(word & SIM_EPCM_VALID))
        return false;
    /* TCS and TRIM pages have no permission either: no test can tell this from R, W and X. */
    if (SIM_EPCM_TYPE(word) != SGX_PT_REG)
        return false;
    if (SIM_CHECK("EPCM.PENDING", word & SIM_EPCM_PENDING))
        return false;
    /* Only TCS and TRIM pages are ever MODIFIED, so no test can tell this from them. */
    if (word & SIM_EPCM_MODIFIED)
        return false;
    if (SIM_CHECK("EPCM.R", !(access & (SGX_PF_W | SGX_PF_I)) && !(word & SIM_EPCM_R)))
        return false;
    if (SIM_CHECK("EPCM.W", access & SGX_PF_W && !(word & SIM_EPCM_W)))
        return false;
    if (SIM_CHECK("EPCM.X", access & SGX_PF_I && !(word & SIM_EPCM_X)))
        return false;
    return true;
}

/* EAUG as the driver does it on a fault (sgx_encl_eaug_page): a zero page, pending. */
static uint64_t add_on_demand(_Atomic uint64_t *entry)
{
    uint64_t none = 0, word = SIM_EPCM_VALID | SIM_EPCM_R | SIM_EPCM_W | SIM_EPCM_PENDING |
                              (uint64_t)SGX_PT_REG << SIM_EPCM_TYPE_SHIFT | 7ull << SIM_EPCM_MAX_SHIFT;

    return atomic_compare_exchange_strong(entry, &none, word) ? word : none;
}

bool sim_access(struct teemate_enclave *enclave, uint64_t addr, uint32_t length, uint32_t access,
                struct sim_fault *fault)
{
    struct sim_mapping *sim = enclave->sim;
    uint64_t offset = addr - enclave->base, word;
    const struct teemate_segment *segment;

    if (offset >= enclave->size || length > enclave->size - offset)
        return refuse(fault, addr, access, 0);
    /* Paging comes first: what this process has mapped, and how. */
    segment = segment_of(enclave, offset);
    if (!enclave->mapped || !segment)
        return refuse(fault, addr, access, 0);
    word = atomic_load(&sim->epcm[offset / SGX_PAGE]);
    if (segment->type != SGX_PT_TCS && !(segment->prot & (uint32_t)prot_for(access)))
        return refuse(fault, addr, access, word & SIM_EPCM_VALID ? SGX_PF_P : 0);
    /* A page that became a TCS: EMODT took it out of all page tables, and it comes back in none that
     * maps it wider than R and W (Linux, ioctl.c, sgx_enclave_modify_types; encl.c, sgx_encl_load_page_in_vma). */
    if (SIM_CHECK("MAP.TCS", too_wide(segment, word)))
        return refuse(fault, addr, access, 0);
    if (!(word & SIM_EPCM_VALID)) {
        if (!sim->header->sgx2)
            return refuse(fault, addr, access, 0);
        word = add_on_demand(&sim->epcm[offset / SGX_PAGE]);
    }
    if (!epcm_allows(word, access))
        return refuse(fault, addr, access, SGX_PF_P | SGX_PF_SGX);
    return true;
}

/* The pages around `page` that the EPCM treats alike, within segment and window. */
static void run_of(const struct teemate_enclave *enclave, const struct teemate_segment *segment, uint64_t page,
                   uint64_t word, uint64_t *first, uint64_t *end)
{
    _Atomic uint64_t *epcm = enclave->sim->epcm;
    uint64_t low = page / WINDOW * WINDOW, high = low + WINDOW;

    if (low < segment->offset / SGX_PAGE)
        low = segment->offset / SGX_PAGE;
    if (high > (segment->offset + segment->size) / SGX_PAGE)
        high = (segment->offset + segment->size) / SGX_PAGE;
    *first = page;
    *end = page + 1;
    while (*first > low &&
           !((atomic_load_explicit(&epcm[*first - 1], memory_order_relaxed) ^ word) & PRESENT_MASK))
        --*first;
    while (*end < high && !((atomic_load_explicit(&epcm[*end], memory_order_relaxed) ^ word) & PRESENT_MASK))
        ++*end;
}

int sim_page_fault(struct teemate_enclave *enclave, uint64_t addr, uint32_t error, struct sim_fault *fault)
{
    uint64_t offset = addr - enclave->base, page = offset / SGX_PAGE, word, first, end, i;
    const struct teemate_segment *segment;
    _Atomic uint64_t *epcm;
    uint8_t *start;

    if (offset >= enclave->size) {
        fault->vector = SGX_VECTOR_PF;
        fault->error = error;
        fault->addr = addr;
        return 1;
    }
    if (!sim_access(enclave, addr, 1, error, fault))
        return 1;
    segment = segment_of(enclave, offset);
    epcm = enclave->sim->epcm;
    word = atomic_load(&epcm[page]);
    run_of(enclave, segment, page, word, &first, &end);
    start = (uint8_t *)(enclave->base + first * SGX_PAGE);
    if (mprotect(start, (end - first) * SGX_PAGE, prot_of(word) & (int)segment->prot)) {
        refuse(fault, addr, error, 0); /* somebody unmapped it behind our back */
        return 1;
    }
    /* Did the EPCM change between our look and our change?  Then the flush that goes with
     * the change may have come before it: take everything back and let it fault again. */
    for (i = first; i < end; i++)
        if ((atomic_load(&epcm[i]) ^ word) & PRESENT_MASK) {
            mprotect(start, (end - first) * SGX_PAGE, PROT_NONE);
            break;
        }
    return 0;
}

/* Bring in what lies around `offset`, when there is a page that may be read: none is added for this. */
static void fetch(struct teemate_enclave *enclave, uint64_t offset)
{
    const uint64_t wanted = SIM_EPCM_VALID | SIM_EPCM_R;
    struct sim_fault fault;

    if (offset < enclave->size && (atomic_load(&enclave->sim->epcm[offset / SGX_PAGE]) & wanted) == wanted)
        (void)sim_page_fault(enclave, enclave->base + offset, 0, &fault);
}

/* Where SDK images say that the stack ends; of others whatever lies there, which is looked at as anything is. */
static uint64_t stack_of(const struct teemate_enclave *enclave, const struct sim_tcs *tcs)
{
    const struct tm_td_static *td = (const struct tm_td_static *)(enclave->sim->view + tcs->ofsbase);

    if (tcs->ofsbase % SGX_PAGE || tcs->ofsbase >= enclave->size)
        return 0;
    return __atomic_load_n(&td->stack_top, __ATOMIC_RELAXED);
}

void sim_fetch_for(struct teemate_enclave *enclave, const struct sim_tcs *tcs)
{
    const struct teemate_segment *code = segment_of(enclave, tcs->oentry);

    fetch(enclave, tcs->ossa);
    fetch(enclave, tcs->ofsbase);
    fetch(enclave, stack_of(enclave, tcs) - 1);
    if (!code)
        return;
    fetch(enclave, code->offset);
    fetch(enclave, code->offset - SGX_PAGE); /* below the first page it is more than any size */
    fetch(enclave, code->offset + code->size);
}

void sim_flush(struct teemate_enclave *enclave)
{
    struct sim_mapping *sim = enclave->sim;
    uint32_t epoch = atomic_load(&sim->header->epoch);

    if (atomic_load(&sim->epoch) == epoch || !enclave->mapped)
        return;
    mprotect((void *)enclave->base, enclave->size, PROT_NONE);
    atomic_store(&sim->epoch, epoch);
}
