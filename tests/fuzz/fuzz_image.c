/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzz target of everything that reads images: the SGXS reader, the check of the SDK's
 * header, the SIGSTRUCT, and the loader with a backend that believes nothing.
 *
 * An input is a SIGSTRUCT (1808 bytes; a shorter input is all stream) and a stream.
 * Build it with -fsanitize=fuzzer,address,undefined where the compiler has
 * libFuzzer, or with -fsanitize=address,undefined and fuzz_driver.c everywhere.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "crypto.h"
#include "enclave.h"
#include "private.h"
#include "sgxs.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(condition)                                                             \
    do {                                                                               \
        if (!(condition)) {                                                            \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                   \
        }                                                                              \
    } while (0)

/* ---- a backend that checks what the loader promises -------------------------------- */

static struct {
    uint64_t next;  /* lowest offset that may still be added */
    uint64_t pages;
    uint64_t touched; /* sum of all bytes: the sanitizer sees that each can be read */
    bool created, initialized;
} seen;

static int checking_create(struct teemate_enclave *enclave, const struct create_params *params,
                           struct teemate_diag *diag)
{
    (void)diag;
    REQUIRE(!seen.created);
    REQUIRE(params->size >= 2 * SGX_PAGE && (params->size & (params->size - 1)) == 0);
    REQUIRE(params->base % params->size == 0 && params->base);
    REQUIRE(params->ssa_frame_pages && params->ssa_frame_pages < params->size / SGX_PAGE);
    REQUIRE(!(params->attributes.flags & SGX_ATTR_INIT));
    seen.created = true;
    enclave->fd = memfd_create("fuzz", MFD_CLOEXEC);
    return enclave->fd < 0 ? -errno : 0;
}

static int checking_add_pages(struct teemate_enclave *enclave, uint64_t offset, const void *data, uint64_t size,
                              uint64_t secinfo_flags, bool measured, bool partly, struct teemate_diag *diag)
{
    uint64_t type = secinfo_flags >> 8;
    const uint8_t *bytes = data;

    REQUIRE(seen.created && !seen.initialized);
    REQUIRE(size && size % SGX_PAGE == 0 && offset % SGX_PAGE == 0);
    REQUIRE(offset >= seen.next && offset < enclave->size && size <= enclave->size - offset);
    REQUIRE(type == SGX_PT_REG || type == SGX_PT_TCS);
    REQUIRE(type == SGX_PT_REG || (size == SGX_PAGE && !(secinfo_flags & 0xff)));
    REQUIRE(!(measured && partly) && (!partly || size == SGX_PAGE));
    REQUIRE(data || !(measured || partly));
    for (uint64_t i = 0; data && i < size; i++)
        seen.touched += bytes[i];
    seen.next = offset + size;
    seen.pages += size / SGX_PAGE;
    /* Now and then a backend that fails: everything must be torn down. */
    if (seen.touched % 31 == 30)
        return diag_set(diag, -ENOMEM, TEEMATE_STEP_EADD, ENOMEM, offset, "no memory, it says");
    return 0;
}

static int checking_init(struct teemate_enclave *enclave, const struct sgx_sigstruct *sigstruct,
                         const uint8_t mrenclave[32], struct teemate_diag *diag)
{
    struct teemate_diag own;

    REQUIRE(enclave->segments || !enclave->segment_count);
    seen.initialized = true;
    /* A mutated stream never fits its SIGSTRUCT: half of them are taken all the same, to see them closed. */
    if (teemate_sigstruct_verify((const uint8_t *)sigstruct, mrenclave, NULL, &own) == 0 || mrenclave[0] % 2)
        return 0;
    return diag_set(diag, -EKEYEXPIRED, TEEMATE_STEP_EINIT, SGX_INVALID_MEASUREMENT, 0, "not this one");
}

static int checking_open(struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    (void)enclave;
    (void)diag;
    return 0;
}

static void checking_close(struct teemate_enclave *enclave)
{
    (void)enclave;
}

static int checking_available(struct teemate_diag *diag)
{
    (void)diag;
    return 0;
}

const struct backend backend_sim = {
    .name = "checking",
    .id = TEEMATE_SIM,
    .available = checking_available,
    .enterable = checking_available,
    .create = checking_create,
    .add_pages = checking_add_pages,
    .init = checking_init,
    .open = checking_open,
    .close = checking_close,
};

static int nowhere(struct teemate_diag *diag)
{
    return diag_set(diag, -ENODEV, TEEMATE_STEP_ECREATE, ENODEV, 0, "not here");
}

const struct backend backend_sgx = {
    .name = "nowhere",
    .id = TEEMATE_SGX,
    .available = nowhere,
    .enterable = nowhere,
};

int teemate_sim_is(int fd)
{
    (void)fd;
    return 1;
}

/* Nothing is mapped here, and nobody is a warden. */
void enclave_unmap(struct teemate_enclave *enclave)
{
    REQUIRE(!enclave->mapped);
}

void private_end(struct teemate_enclave *enclave)
{
    REQUIRE(!enclave->warden);
}

/* ---- the target ---------------------------------------------------------------------- */

static int file_of(const uint8_t *data, size_t size)
{
    static int fd = -1;

    if (fd < 0)
        fd = memfd_create("input", MFD_CLOEXEC);
    REQUIRE(fd >= 0 && ftruncate(fd, 0) == 0);
    REQUIRE(pwrite(fd, data, size, 0) == (ssize_t)size);
    return fd;
}

static void check_diag(const struct teemate_diag *diag, int result, size_t size)
{
    REQUIRE(memchr(diag->text, 0, sizeof(diag->text)) && diag->text[0]);
    if (result == -EBADMSG && diag->step == TEEMATE_STEP_PARSE) {
        REQUIRE(diag->code >= TEEMATE_BAD_TRUNCATED && diag->code <= TEEMATE_BAD_HEADER);
        REQUIRE(diag->offset <= size);
    }
}

/* What the reader says and what the records say by themselves must agree. */
static void check_measurement(const uint8_t *stream, size_t size, const struct teemate_image_info *info)
{
    struct sha256 sha;
    uint8_t digest[32];
    uint64_t pages = 0, extends = 0;

    sha256_init(&sha);
    for (size_t at = 0; at < size;) {
        size_t length = 64;
        if (memcmp(stream + at, "EEXTEND", 8) == 0 || memcmp(stream + at, "UNMEASRD", 8) == 0)
            length += 256;
        REQUIRE(length <= size - at);
        if (memcmp(stream + at, "UNMEASRD", 8) != 0)
            sha256_update(&sha, stream + at, length);
        pages += memcmp(stream + at, "EADD\0\0\0\0", 8) == 0;
        extends += memcmp(stream + at, "EEXTEND", 8) == 0;
        at += length;
    }
    sha256_final(&sha, digest);
    REQUIRE(memcmp(digest, info->mrenclave, 32) == 0);
    REQUIRE(info->pages == pages && info->measured_bytes == extends * 256);
    REQUIRE(info->file_bytes == size && info->segment_count <= pages && info->tcs_count <= pages);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct sgx_sigstruct sigstruct = {0};
    struct teemate_image_info info;
    struct teemate_enclave *enclave = NULL;
    struct teemate_diag diag = {0};
    uint8_t mrsigner[32];
    int measured, created;
    int fd;

    if (size >= sizeof(sigstruct)) {
        memcpy(&sigstruct, data, sizeof(sigstruct));
        data += sizeof(sigstruct);
        size -= sizeof(sigstruct);
    }
    if (teemate_sigstruct_verify((const uint8_t *)&sigstruct, NULL, mrsigner, &diag) < 0)
        REQUIRE(diag.offset < sizeof(sigstruct) && diag.text[0]);

    fd = file_of(data, size);
    measured = teemate_image_measure(fd, &info, &diag);
    if (measured < 0)
        check_diag(&diag, measured, size);
    else
        check_measurement(data, size, &info);

    memset(&seen, 0, sizeof(seen));
    created = teemate_create(TEEMATE_SIM, 0, 0, fd, (const uint8_t *)&sigstruct, &enclave, &diag);
    REQUIRE(measured == 0 || created < 0);
    if (created < 0) {
        check_diag(&diag, created, size);
    } else {
        REQUIRE(seen.pages == info.pages && seen.initialized);
        teemate_close(enclave);
    }
    return 0;
}
