/* SPDX-License-Identifier: Apache-2.0 */
/* An enclave as a value: made or opened, looked at, closed. */
#include "enclave.h"

#include <dlfcn.h>
#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "private.h"

#define SEGMENTS_MAX (1u << 16)

int backend_choose(int wanted, const struct backend **backend, struct teemate_diag *diag)
{
    switch (wanted) {
    case TEEMATE_AUTO:
        if (!backend_sgx.available(diag)) {
            *backend = &backend_sgx;
            return 0;
        }
        *backend = &backend_sim; /* and the diag keeps why it is not sgx */
        return (*backend)->available(NULL) ? (*backend)->available(diag) : 0;
    case TEEMATE_SIM:
        *backend = &backend_sim;
        break;
    case TEEMATE_SGX:
        *backend = &backend_sgx;
        break;
    default:
        return diag_set(diag, -EINVAL, TEEMATE_STEP_NONE, EINVAL, 0, "there is no backend number %d", wanted);
    }
    return (*backend)->available(diag);
}

int teemate_backend_choose(int wanted, struct teemate_diag *diag)
{
    const struct backend *backend = NULL;
    struct teemate_diag why = {0};
    int result = backend_choose(wanted, &backend, &why);

    if (diag)
        *diag = why;
    return result < 0 ? result : (int)backend->id;
}

int enclave_new(const struct backend *backend, struct teemate_enclave **enclave, struct teemate_diag *diag)
{
    struct teemate_enclave *made = calloc(1, sizeof(*made));

    if (!made)
        return diag_set(diag, -ENOMEM, TEEMATE_STEP_NONE, ENOMEM, 0, "no memory for an enclave's description");
    made->backend = backend;
    made->fd = -1;
    made->info.backend = backend->id;
    pthread_mutex_init(&made->lock, NULL);
    *enclave = made;
    return 0;
}

/* Whose enclave is `fd`?  No device is needed for one that was made already. */
static int backend_of(int wanted, int fd, const struct backend **backend, struct teemate_diag *diag)
{
    if (wanted == TEEMATE_AUTO)
        wanted = teemate_sim_is(fd) ? TEEMATE_SIM : TEEMATE_SGX;
    if (wanted != TEEMATE_SIM && wanted != TEEMATE_SGX)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_NONE, EINVAL, 0, "there is no backend number %d", wanted);
    *backend = wanted == TEEMATE_SIM ? &backend_sim : &backend_sgx;
    return (*backend)->enterable(diag);
}

/* Segments came from another process: they are looked at one by one. */
static const char *segments_fault(const struct teemate_segment *segments, size_t count, uint64_t size)
{
    uint64_t end = 0;

    for (size_t i = 0; i < count; i++) {
        const struct teemate_segment *segment = &segments[i];
        if (segment->offset % SGX_PAGE || segment->size % SGX_PAGE || !segment->size)
            return "not whole pages";
        if (segment->offset < end)
            return "out of order or overlapping";
        if (segment->offset >= size || segment->size > size - segment->offset)
            return "outside of the enclave";
        if (segment->type != SGX_PT_REG && segment->type != SGX_PT_TCS)
            return "of a type that is neither TCS nor regular";
        if (segment->prot & ~(uint32_t)(PROT_READ | PROT_WRITE | PROT_EXEC))
            return "with a protection that mmap() does not know";
        end = segment->offset + segment->size;
    }
    return NULL;
}

static uint32_t count_tcs(const struct teemate_enclave *enclave)
{
    uint64_t pages = 0;

    for (size_t i = 0; i < enclave->segment_count; i++)
        if (enclave->segments[i].type == SGX_PT_TCS)
            pages += enclave->segments[i].size / SGX_PAGE;
    return (uint32_t)pages;
}

/* Their shadow memory has no place for our window: a plain message instead of a crash. */
static const char *hostile_runtime(void)
{
    if (dlsym(RTLD_DEFAULT, "__tsan_init"))
        return "ThreadSanitizer";
    if (dlsym(RTLD_DEFAULT, "__msan_init"))
        return "MemorySanitizer";
    return NULL;
}

int enclave_check_runtime(struct teemate_diag *diag)
{
    static _Atomic bool none; /* they start with the program, so once is enough: every library is searched */
    const char *runtime;

    if (atomic_load_explicit(&none, memory_order_relaxed))
        return 0;
    runtime = hostile_runtime();
    if (runtime == NULL) {
        atomic_store_explicit(&none, true, memory_order_relaxed);
        return 0;
    }
    return diag_set(diag, -ENOTSUP, TEEMATE_STEP_MAP, 0, 0,
                    "a program built with %s cannot hold an enclave: its runtime owns the address window", runtime);
}

static int open_checked(struct teemate_enclave *enclave, const struct teemate_segment *segments, size_t count,
                        struct teemate_diag *diag)
{
    uint64_t base = enclave->base, size = enclave->size;
    const char *fault;

    /* The landing page and the arena lie above, so there must be room for them. */
    if (size < 2 * SGX_PAGE || (size & (size - 1)) || base % size || !base || size > TEEMATE_WINDOW_SIZE / 2 ||
        base > (1ull << 47) - 2 * size)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_MAP, EINVAL, 0,
                        "an enclave of 0x%" PRIx64 " bytes at 0x%" PRIx64
                        ": the size must be a power of two, and divide the base",
                        size, base);
    if (count > SEGMENTS_MAX)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_MAP, EINVAL, 0, "%zu segments: %u at most can be mapped", count,
                        SEGMENTS_MAX);
    fault = segments_fault(segments, count, size);
    if (fault)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_MAP, EINVAL, 0, "a segment of the enclave is %s", fault);

    if (enclave_check_runtime(diag) != 0) /* before the driver's enclave is looked at by mapping it */
        return -ENOTSUP;
    enclave->segments = malloc((count ? count : 1) * sizeof(*segments));
    if (!enclave->segments)
        return diag_set(diag, -ENOMEM, TEEMATE_STEP_MAP, ENOMEM, 0, "no memory for %zu segments", count);
    if (count)
        memcpy(enclave->segments, segments, count * sizeof(*segments));
    enclave->segment_count = count;
    enclave->info.base = base;
    enclave->info.size = size;
    enclave->info.segment_count = (uint32_t)count;
    enclave->info.tcs_count = count_tcs(enclave);
    return enclave->backend->open(enclave, diag);
}

int teemate_open(int backend, int fd, uint64_t base, uint64_t size, const struct teemate_segment *segments,
                 size_t count, struct teemate_enclave **enclave, struct teemate_diag *diag)
{
    struct teemate_enclave *opened = NULL;
    const struct backend *owner = NULL;
    int result = backend_of(backend, fd, &owner, diag);

    if (!result)
        result = enclave_new(owner, &opened, diag);
    if (result < 0) {
        close(fd);
        return result;
    }
    opened->fd = fd;
    opened->base = base;
    opened->size = size;
    result = open_checked(opened, segments, count, diag);
    if (result < 0) {
        teemate_close(opened);
        return result;
    }
    *enclave = opened;
    return 0;
}

void teemate_close(struct teemate_enclave *enclave)
{
    if (!enclave)
        return;
    private_end(enclave);
    enclave_unmap(enclave);
    enclave->backend->close(enclave);
    if (enclave->fd >= 0)
        close(enclave->fd);
    free(enclave->segments);
    pthread_mutex_destroy(&enclave->lock);
    free(enclave);
}

int teemate_enclave_describe(const struct teemate_enclave *enclave, struct teemate_enclave_info *info)
{
    if (!enclave->finished)
        return -ESTALE;
    *info = enclave->info;
    return 0;
}

int teemate_enclave_fd(const struct teemate_enclave *enclave)
{
    return enclave->fd;
}

size_t teemate_enclave_segments(const struct teemate_enclave *enclave, struct teemate_segment *segments,
                                size_t capacity)
{
    size_t count = enclave->segment_count < capacity ? enclave->segment_count : capacity;

    if (count)
        memcpy(segments, enclave->segments, count * sizeof(*segments));
    return enclave->segment_count;
}

size_t teemate_enclave_tcs(const struct teemate_enclave *enclave, uint64_t *offsets, size_t capacity)
{
    size_t count = 0;

    for (size_t i = 0; i < enclave->segment_count; i++) {
        const struct teemate_segment *segment = &enclave->segments[i];
        if (segment->type != SGX_PT_TCS)
            continue;
        for (uint64_t at = 0; at < segment->size; at += SGX_PAGE, count++)
            if (count < capacity)
                offsets[count] = segment->offset + at;
    }
    return count;
}
