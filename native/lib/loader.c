/* SPDX-License-Identifier: Apache-2.0 */
/* From an image to an enclave: what the reader reads goes to a backend. */
#include <cpuid.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include "sgxs.h"

#define WINDOW_TRIES 256u
#define USER_END (1ull << 47)

struct loader {
    struct teemate_enclave *enclave;
    const struct sgx_sigstruct *sigstruct;
    uint64_t base; /* 0: choose one */
    uint64_t attributes;
    uint64_t pages_left; /* that the backend may be asked for */
};

/*
 * A range of the window where nothing is mapped: [base, base + 2 size), since the
 * landing page and the arena lie above ELRANGE.  Places are tried from a random one
 * on, so that processes that share enclaves later rarely meet.  It is not kept:
 * teemate_map says so when somebody was faster.
 */
static int choose_base(uint64_t size, uint64_t *base, struct teemate_diag *diag)
{
    uint64_t places, first = 0;

    if (size > TEEMATE_WINDOW_SIZE / 2)
        return diag_set(diag, -ENOSPC, TEEMATE_STEP_ECREATE, ENOSPC, 0,
                        "an enclave of 0x%" PRIx64 " bytes does not fit the window of 0x%llx bytes twice", size,
                        TEEMATE_WINDOW_SIZE);
    places = TEEMATE_WINDOW_SIZE / (2 * size);
    if (getrandom(&first, sizeof(first), GRND_NONBLOCK) != sizeof(first))
        first = 0; /* early at boot: any place will do */
    for (uint64_t i = 0; i < places && i < WINDOW_TRIES; i++) {
        uint64_t place = TEEMATE_WINDOW_START + (first % places + i) % places * 2 * size;
        void *got = mmap((void *)place, 2 * size, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
        if (got == MAP_FAILED)
            continue;
        munmap(got, 2 * size);
        /* A kernel before 4.17 takes the address for a hint. */
        if (got == (void *)place) {
            *base = place;
            return 0;
        }
    }
    return diag_set(diag, -ENOSPC, TEEMATE_STEP_ECREATE, ENOSPC, 0,
                    "no free range of 0x%" PRIx64 " bytes in the window from 0x%llx: look at /proc/self/maps and at "
                    "the limit of address space (ulimit -v)",
                    2 * size, TEEMATE_WINDOW_START);
}

/* The XSAVE features that the operating system has switched on (XCR0). */
static uint64_t host_xfrm(void)
{
    unsigned a, b, c, d;

    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return SGX_XFRM_LEGACY;
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t)d << 32 | a;
}

/*
 * What the SIGSTRUCT asks for.  Bits that its masks leave open: DEBUG is off unless
 * the caller wants it, XSAVE features are taken where the host has them.
 */
static void choose_attributes(const struct loader *loader, struct create_params *params)
{
    const struct sgx_sigstruct *sigstruct = loader->sigstruct;
    uint64_t wanted = sigstruct->attributes.flags & ~SGX_ATTR_INIT;

    if (!(sigstruct->attributemask.flags & SGX_ATTR_DEBUG))
        wanted &= ~SGX_ATTR_DEBUG;
    params->attributes.flags = wanted | SGX_ATTR_MODE64BIT | loader->attributes;
    params->attributes.xfrm = sigstruct->attributes.xfrm & (sigstruct->attributemask.xfrm | host_xfrm());
    params->miscselect = sigstruct->miscselect;
}

/* An argument that a backend refuses came from the image or its SIGSTRUCT: these are what is bad. */
static int backend_error(int result)
{
    return result == -EINVAL ? -EBADMSG : result;
}

static int loader_begin(void *context, uint64_t size, uint32_t ssa_frame_pages, struct teemate_diag *diag)
{
    struct loader *loader = context;
    struct teemate_enclave *enclave = loader->enclave;
    struct create_params params = {.base = loader->base, .size = size, .ssa_frame_pages = ssa_frame_pages};
    int result;

    if (!loader->base) {
        result = choose_base(size, &params.base, diag);
        if (result < 0)
            return result;
    } else if (loader->base % size || loader->base > USER_END || 2 * size > USER_END - loader->base) {
        return diag_set(diag, -EINVAL, TEEMATE_STEP_ECREATE, EINVAL, 0,
                        "base 0x%" PRIx64 " is not a multiple of the enclave's size 0x%" PRIx64
                        " with as much room above it",
                        loader->base, size);
    }
    choose_attributes(loader, &params);
    enclave->base = params.base;
    enclave->size = size;
    return backend_error(enclave->backend->create(enclave, &params, diag));
}

/* The EPC that CPUID shows (leaf 12H, subleafs from 2), in pages. */
static uint64_t epc_pages(void)
{
    uint64_t bytes = 0;
    unsigned a, b, c, d;

    for (unsigned leaf = 2; leaf < 64 && __get_cpuid_count(0x12, leaf, &a, &b, &c, &d) && (a & 15) == 1; leaf++)
        bytes += (uint64_t)(d & 0xfffff) << 32 | (c & 0xfffff000);
    return bytes / SGX_PAGE;
}

/*
 * The sim's EPC is memory, and so is what Linux swaps out of a real one: adding pages does not
 * fail when there is no more, the kernel kills processes until there is.  A small stream can
 * ask for 64 GiB.
 */
static uint64_t pages_limit(const struct teemate_enclave *enclave)
{
    long pages = sysconf(_SC_PHYS_PAGES);

    return (pages > 0 ? (uint64_t)pages / 2 : UINT64_MAX / 2) +
           (enclave->backend->id == TEEMATE_SGX ? epc_pages() : 0);
}

static int loader_pages(void *context, const struct sgxs_run *run, struct teemate_diag *diag)
{
    struct loader *loader = context;
    struct teemate_enclave *enclave = loader->enclave;
    int result;

    if (run->size / SGX_PAGE > loader->pages_left)
        return diag_set(diag, -ENOMEM, TEEMATE_STEP_EADD, ENOMEM, run->record,
                        "the enclave has more than %" PRIu64
                        " pages, half of this machine's memory%s: no more can be added here",
                        pages_limit(enclave), enclave->backend->id == TEEMATE_SGX ? " and its EPC" : "");
    loader->pages_left -= run->size / SGX_PAGE;
    result = enclave->backend->add_pages(enclave, run->offset, run->data, run->size, run->secinfo_flags,
                                         run->measured, run->partly, diag);
    /* People look for the record in the file, not for the page in ELRANGE. */
    if (result < 0 && diag)
        diag->offset = run->record;
    return backend_error(result);
}

static int load(struct loader *loader, int image_fd, struct teemate_diag *diag)
{
    struct teemate_enclave *enclave = loader->enclave;
    const struct sgxs_consumer consumer = {.begin = loader_begin, .pages = loader_pages, .context = loader};
    struct sgxs_image image;
    int result = image_read(image_fd, &consumer, &image, diag);

    if (result < 0)
        return result;
    enclave->segments = image.segments;
    enclave->segment_count = image.segment_count;
    enclave->info.segment_count = image.info.segment_count;
    enclave->info.tcs_count = image.info.tcs_count;
    enclave->info.sdk = image.info.sdk;
    memcpy(enclave->info.header, image.info.header, sizeof(enclave->info.header));
    return enclave->backend->init(enclave, loader->sigstruct, image.info.mrenclave, diag);
}

int teemate_create(int backend, uint64_t base, uint64_t attributes, int image_fd, const uint8_t *sigstruct,
                   struct teemate_enclave **enclave, struct teemate_diag *diag)
{
    struct sgx_sigstruct copy;
    struct loader loader = {.sigstruct = &copy, .base = base, .attributes = attributes};
    const struct backend *chosen = NULL;
    int result;

    if (attributes & ~SGX_ATTR_DEBUG)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_ECREATE, EINVAL, 0,
                        "attributes 0x%" PRIx64 ": only DEBUG can be asked for, all others are the SIGSTRUCT's",
                        attributes);
    result = backend_choose(backend, &chosen, diag);
    if (!result)
        result = enclave_new(chosen, &loader.enclave, diag);
    if (result < 0)
        return result;
    memcpy(&copy, sigstruct, sizeof(copy)); /* it may lie at any address, and is read more than once */
    loader.pages_left = pages_limit(loader.enclave);
    result = load(&loader, image_fd, diag);
    if (result < 0) {
        teemate_close(loader.enclave);
        return result;
    }
    *enclave = loader.enclave;
    return 0;
}
