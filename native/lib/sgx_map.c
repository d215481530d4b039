/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Mapping an enclave of Linux's driver (arch/x86/kernel/cpu/sgx/encl.c, sgx_encl_may_map):
 * shared, at the addresses of ECREATE, and with permissions that every page of the range
 * was added with.  So each segment is mapped by itself and what lies between them stays
 * reserved: on SGX2 a touch of a mapped hole would add a page to the enclave.
 *
 * TCS segments are mapped without any permission, and a slot's own page gets and loses
 * its permissions by mprotect(): one step, at no time is the place free or can a fork()
 * take the page along.
 *
 * No ioctl and no file is used here: wardens and containers may be forbidden both.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "sgx.h"

#define MISC_MAJOR 10u /* include/uapi/linux/major.h; the minor number is dynamic */

/* May a page be mapped there?  0, or -EACCES (outside of the enclave), -EEXIST (a mapping is in the way), ... */
static int probe(const struct teemate_enclave *enclave, uint64_t address)
{
    void *at = mmap((void *)address, SGX_PAGE, PROT_NONE, MAP_SHARED | MAP_FIXED_NOREPLACE, enclave->fd, 0);

    if (at == MAP_FAILED)
        return -errno;
    munmap(at, SGX_PAGE);
    return 0;
}

/* An SGX enclave's file is a misc device that refuses private mappings, whatever its state. */
static bool is_enclave(int fd)
{
    struct stat stat;
    void *at;

    if (fstat(fd, &stat) || !S_ISCHR(stat.st_mode) || major(stat.st_rdev) != MISC_MAJOR)
        return false;
    at = mmap(NULL, SGX_PAGE, PROT_NONE, MAP_PRIVATE, fd, 0);
    if (at == MAP_FAILED)
        return errno == EINVAL;
    munmap(at, SGX_PAGE);
    return false;
}

/* Else every mmap() would answer EACCES. */
int sgx_may_map(struct teemate_diag *diag)
{
    if (map_all_executable())
        return diag_set(diag, -EACCES, TEEMATE_STEP_MAP, 0, 0, ALL_EXECUTABLE);
    return 0;
}

/*
 * There are no tables to read.  But a finished enclave can be mapped in ELRANGE and nowhere
 * else, and an unfinished one everywhere: four pages tell both.
 */
int sgx_open(struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    const uint64_t end = enclave->base + enclave->size;
    int first, last;

    enclave->process = fork_process();
    first = sgx_may_map(diag);
    if (first)
        return first;
    if (!is_enclave(enclave->fd))
        return diag_set(diag, -ENODEV, TEEMATE_STEP_MAP, 0, 0, "the descriptor is not that of an SGX enclave");
    if (!probe(enclave, end) || !probe(enclave, enclave->base - SGX_PAGE)) {
        /* Both are outside of the claimed place. */
        if (!probe(enclave, end) && !probe(enclave, enclave->base - SGX_PAGE))
            return diag_set(diag, -ESTALE, TEEMATE_STEP_MAP, 0, 0,
                            "the SGX enclave was not finished: EINIT has not been done");
        return diag_set(diag, -ESTALE, TEEMATE_STEP_MAP, 0, 0,
                        "the SGX enclave is larger than 0x%" PRIx64 " bytes at 0x%" PRIx64, enclave->size,
                        enclave->base);
    }
    first = probe(enclave, enclave->base);
    last = probe(enclave, end - SGX_PAGE);
    if (first == -EACCES || last == -EACCES)
        return diag_set(diag, -ESTALE, TEEMATE_STEP_MAP, 0, 0,
                        "the SGX enclave does not have its place at 0x%" PRIx64 " (0x%" PRIx64
                        " bytes)",
                        enclave->base, enclave->size);
    /* A mapping in the way is teemate_map's to name. */
    enclave->finished = true;
    return 0;
}

static int map_error(int error, const struct teemate_segment *segment, struct teemate_diag *diag)
{
    const char *what = strerror(-error);

    if (error == -EPERM)
        what = "/dev is mounted noexec where the enclave was created: mount it with exec there, enclaves have code";
    else if (error == -EACCES)
        what = "its pages have not these permissions";
    else if (error == -ENOMEM)
        what = "no memory, or more mappings than vm.max_map_count";
    return diag_set(diag, error, TEEMATE_STEP_MAP, 0, segment->offset,
                    "cannot map 0x%" PRIx64 " bytes of the enclave at offset 0x%" PRIx64 " (%c%c%c): %s", segment->size,
                    segment->offset, segment->prot & PROT_READ ? 'r' : '-', segment->prot & PROT_WRITE ? 'w' : '-',
                    segment->prot & PROT_EXEC ? 'x' : '-', what);
}

int sgx_map(struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    int error = sgx_may_map(diag);

    if (error)
        return error;
    for (size_t i = 0; i < enclave->segment_count; i++) {
        const struct teemate_segment *segment = &enclave->segments[i];
        int prot = segment->type == SGX_PT_TCS ? PROT_NONE : (int)segment->prot;

        /* The file's offset means nothing to the driver, but equal neighbours become one mapping by it. */
        if (mmap((void *)(enclave->base + segment->offset), segment->size, prot, MAP_SHARED | MAP_FIXED, enclave->fd,
                 (off_t)segment->offset) == MAP_FAILED)
            return map_error(-errno, segment, diag);
    }
    return 0;
}

/* Pages that were regular ones in the image; the newest comes first. */
struct sgx_pages {
    struct sgx_pages *next;
    uint64_t offset;
    uint64_t size;
};

int sgx_made_tcs(struct teemate_enclave *enclave, uint64_t offset, uint64_t size)
{
    struct sgx_pages *made = malloc(sizeof(*made));

    if (!made)
        return -ENOMEM;
    pthread_mutex_lock(&enclave->lock);
    *made = (struct sgx_pages){.next = enclave->sgx_made_tcs, .offset = offset, .size = size};
    enclave->sgx_made_tcs = made;
    pthread_mutex_unlock(&enclave->lock);
    return 0;
}

void sgx_forget_tcs(struct teemate_enclave *enclave)
{
    while (enclave->sgx_made_tcs) {
        struct sgx_pages *next = enclave->sgx_made_tcs->next;

        free(enclave->sgx_made_tcs);
        enclave->sgx_made_tcs = next;
    }
}

static bool is_tcs(const struct teemate_enclave *enclave, uint64_t offset)
{
    size_t low = 0, high = enclave->segment_count;

    for (const struct sgx_pages *made = enclave->sgx_made_tcs; made; made = made->next)
        if (offset >= made->offset && offset - made->offset < made->size)
            return true;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct teemate_segment *segment = &enclave->segments[middle];

        if (offset < segment->offset)
            high = middle;
        else if (offset - segment->offset >= segment->size)
            low = middle + 1;
        else
            return segment->type == SGX_PT_TCS;
    }
    return false;
}

int sgx_map_tcs(struct teemate_enclave *enclave, uint64_t offset, struct teemate_diag *diag)
{
    if (!is_tcs(enclave, offset))
        return diag_set(diag, -EINVAL, TEEMATE_STEP_MAP, 0, offset, "there is no TCS at offset 0x%" PRIx64, offset);
    if (mprotect((void *)(enclave->base + offset), SGX_PAGE, PROT_READ | PROT_WRITE)) {
        const struct teemate_segment page = {.offset = offset, .size = SGX_PAGE, .prot = PROT_READ | PROT_WRITE};

        return map_error(-errno, &page, diag);
    }
    return 0;
}

int sgx_unmap_tcs(struct teemate_enclave *enclave, uint64_t offset)
{
    if (!is_tcs(enclave, offset))
        return -EINVAL;
    return mprotect((void *)(enclave->base + offset), SGX_PAGE, PROT_NONE) ? -errno : 0;
}
