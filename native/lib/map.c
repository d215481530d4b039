/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An enclave's place in the address space: 2 x size, reserved at once.
 *
 *   [base, base + size)      ELRANGE; segments, and TCS pages one by one
 *   base + size              landing page
 *   base + size + 1 page     arena
 *
 * On the sim the cost does not depend on the size: attaching to a big enclave takes as
 * long as attaching to a small one.  Linux's driver looks at every page of a range that is
 * mapped (sgx_encl_may_map), so there it grows with segments and pages.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <unistd.h>

#include "enclave.h"
#include "teemate_abi.h"

#define NAME_MAX_SHOWN 100
#define RESERVE_FLAGS (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)

bool map_all_executable(void)
{
    int now = personality(0xffffffff);

    return now != -1 && (now & READ_IMPLIES_EXEC) != 0;
}

/* Name what lies in [start, end): "/usr/lib/libfoo.so (7f.. - 7f..)". */
static void name_mapping(uint64_t start, uint64_t end, char *text, size_t size)
{
    char line[512], path[256];
    const char *name;
    size_t length;
    FILE *maps = fopen("/proc/self/maps", "re");

    snprintf(text, size, "another mapping");
    if (!maps)
        return;
    while (fgets(line, sizeof(line), maps)) {
        uint64_t from, to;

        path[0] = 0;
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %*s %*s %*s %255[^\n]", &from, &to, path) < 2)
            continue;
        if (from >= end || to <= start)
            continue;
        length = strlen(path); /* the end of a long path says more than its beginning */
        name = !length ? "an anonymous mapping" : length > NAME_MAX_SHOWN ? path + length - NAME_MAX_SHOWN : path;
        snprintf(text, size, "%.*s at %#" PRIx64 "-%#" PRIx64, NAME_MAX_SHOWN, name, from, to);
        break;
    }
    fclose(maps);
}

static int reserve(struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    uint64_t size = 2 * enclave->size;
    void *wanted = (void *)enclave->base;
    bool shared = enclave->backend->reserves_file;
    void *at = mmap(wanted, size, PROT_NONE, (shared ? MAP_SHARED : RESERVE_FLAGS) | MAP_FIXED_NOREPLACE,
                    shared ? enclave->fd : -1, 0);
    int error = at == MAP_FAILED ? errno : 0;

    if (!error && at != wanted) { /* a kernel before 4.17 takes the address as a hint */
        munmap(at, size);
        error = EEXIST;
    }
    if (error == EEXIST) {
        char text[160];

        name_mapping(enclave->base, enclave->base + size, text, sizeof(text));
        return diag_set(diag, -EEXIST, TEEMATE_STEP_MAP, 0, 0,
                        "the enclave's address range %#" PRIx64 "-%#" PRIx64 " is taken by %s: attach before it is mapped,"
                        " or keep 0x400000000000-0x40ffffffffff free",
                        enclave->base, enclave->base + size, text);
    }
    if (error)
        return diag_set(diag, -error, TEEMATE_STEP_MAP, 0, 0,
                        "cannot reserve %" PRIu64 " MiB of address space at %#" PRIx64 ": %s; look at RLIMIT_AS (ulimit -v)",
                        size >> 20, enclave->base, strerror(error));
    return 0;
}

int teemate_map(struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    int error = 0;

    if (!enclave_is_ours(enclave))
        return diag_set(diag, -ENOTCONN, TEEMATE_STEP_MAP, 0, 0,
                        "this enclave was opened before fork(): the child has to attach itself");
    error = enclave_check_runtime(diag);
    if (error)
        return error;
    if (!enclave->finished)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_MAP, 0, 0, "an enclave is mapped after EINIT");
    pthread_mutex_lock(&enclave->lock);
    if (enclave->mapped) {
        pthread_mutex_unlock(&enclave->lock);
        return 0;
    }
    error = reserve(enclave, diag);
    if (error) {
        pthread_mutex_unlock(&enclave->lock);
        return error;
    }
    error = enclave->backend->map(enclave, diag);
    if (!error) {
        error = landing_map(TM_LANDING(enclave->base, enclave->size));
        if (error)
            diag_set(diag, error, TEEMATE_STEP_MAP, 0, 0, "cannot make the landing page: %s", strerror(-error));
    }
    /* Once for all: a fork() in between takes along what the child is told not to use. */
    if (!error && madvise((void *)enclave->base, 2 * enclave->size, MADV_DONTFORK)) {
        error = -errno;
        diag_set(diag, error, TEEMATE_STEP_MAP, 0, 0, "cannot keep the enclave out of fork: %s", strerror(-error));
    }
    if (error)
        munmap((void *)enclave->base, 2 * enclave->size);
    else
        enclave->mapped = true;
    pthread_mutex_unlock(&enclave->lock);
    return error;
}

void enclave_unmap(struct teemate_enclave *enclave)
{
    if (!enclave_is_ours(enclave))
        return; /* whatever is at that address now is not this mapping */
    pthread_mutex_lock(&enclave->lock);
    if (enclave->mapped)
        munmap((void *)enclave->base, 2 * enclave->size);
    enclave->mapped = false;
    enclave->arena_mapped = false;
    pthread_mutex_unlock(&enclave->lock);
}

int teemate_map_tcs(struct teemate_enclave *enclave, uint64_t offset, struct teemate_diag *diag)
{
    int error;

    if (!enclave_is_ours(enclave))
        return diag_set(diag, -ENOTCONN, TEEMATE_STEP_MAP, 0, offset,
                        "this enclave was mapped before fork(): the child has to attach itself");
    if (offset % SGX_PAGE || offset >= enclave->size)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_MAP, 0, offset, "%#" PRIx64 " is not a page of the enclave", offset);
    pthread_mutex_lock(&enclave->lock);
    error = enclave->mapped ? enclave->backend->map_tcs(enclave, offset, diag)
                            : diag_set(diag, -EINVAL, TEEMATE_STEP_MAP, 0, offset, "teemate_map comes first");
    pthread_mutex_unlock(&enclave->lock);
    return error;
}

int teemate_unmap_tcs(struct teemate_enclave *enclave, uint64_t offset)
{
    int error = -EINVAL;

    if (!enclave_is_ours(enclave))
        return -ENOTCONN;
    if (offset % SGX_PAGE || offset >= enclave->size)
        return -EINVAL;
    pthread_mutex_lock(&enclave->lock);
    if (enclave->mapped)
        error = enclave->backend->unmap_tcs(enclave, offset);
    pthread_mutex_unlock(&enclave->lock);
    return error;
}

int teemate_map_arena(struct teemate_enclave *enclave, int fd, struct teemate_diag *diag)
{
    void *place = (void *)TM_ARENA(enclave->base, enclave->size);
    int seals = fcntl(fd, F_GET_SEALS), wanted = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL, error = 0;

    if (!enclave_is_ours(enclave))
        return diag_set(diag, -ENOTCONN, TEEMATE_STEP_MAP, 0, 0,
                        "this enclave was mapped before fork(): the child has to attach itself");
    /* One that can shrink would end the waiters in SIGBUS. */
    if (seals < 0 || (seals & wanted) != wanted || lseek(fd, 0, SEEK_END) != TM_ARENA_SIZE)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_MAP, 0, 0,
                        "the arena is not a memfd of %u bytes with the seals SHRINK, GROW and SEAL", TM_ARENA_SIZE);
    pthread_mutex_lock(&enclave->lock);
    if (!enclave->mapped)
        error = diag_set(diag, -EINVAL, TEEMATE_STEP_MAP, 0, 0, "teemate_map comes first");
    else if (mmap(place, TM_ARENA_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED ||
             madvise(place, TM_ARENA_SIZE, MADV_DONTFORK)) {
        error = -errno;
        diag_set(diag, error, TEEMATE_STEP_MAP, 0, 0, "cannot map the arena: %s", strerror(-error));
    } else {
        enclave->arena_mapped = true;
    }
    pthread_mutex_unlock(&enclave->lock);
    return error;
}

int teemate_arena_create(void)
{
    int fd = memfd_create("teemate-arena", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int error;

    if (fd < 0)
        return -errno;
    if (ftruncate(fd, TM_ARENA_SIZE) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)) {
        error = -errno;
        close(fd);
        return error;
    }
    return fd;
}
