/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The SGXS stream (https://github.com/fortanix/rust-sgx, doc/SGXS.md): 64-byte
 * records, little endian, those with data followed by 256 bytes of it.
 *
 *   ECREATE\0       u32 SSA frame size in pages, u64 size of ELRANGE
 *   EADD\0\0\0\0    u64 offset, the first 48 bytes of SECINFO
 *   EEXTEND\0       u64 offset; data
 *   UNMEASRD        u64 offset; data.  Loaded, but no part of MRENCLAVE
 *   UNSIZED\0       in place of ECREATE: a stream that cannot be measured yet
 *
 * The reader takes canonical streams only, and nothing on trust.
 */
#ifndef TEEMATE_SGXS_H
#define TEEMATE_SGXS_H

#include <stdbool.h>

#include "enclave.h"

#define SGXS_RECORD 64u
#define SGXS_DATA 256u
#define SGXS_CHUNKS (SGX_PAGE / SGXS_DATA)

/* What a stream may ask for; anything larger is refused before memory is spent on it. */
#define SGXS_SIZE_MAX (1ull << 47)   /* of ELRANGE: user space has no more */
#define SGXS_PAGES_MAX (1ull << 24)  /* 64 GiB */
#define SGXS_SEGMENTS_MAX (1u << 15) /* half of the mappings that Linux grants a process by default */

/* Pages of one SECINFO, one after the other. */
struct sgxs_run {
    uint64_t record; /* where the first page's EADD starts in the file */
    uint64_t offset; /* from the base */
    uint64_t size;
    uint64_t secinfo_flags;
    const void *data; /* NULL: zeros; else valid during the call */
    bool measured;    /* all chunks, in ascending order */
    bool partly;      /* some chunks, or in another order: such a page comes alone */
};

/*
 * Who gets what is read, in the order of the stream: `begin` once, then `pages`.
 * TCS pages come one by one.  What they return ends the reading when negative.
 */
struct sgxs_consumer {
    int (*begin)(void *context, uint64_t size, uint32_t ssa_frame_pages, struct teemate_diag *diag);
    int (*pages)(void *context, const struct sgxs_run *run, struct teemate_diag *diag);
    void *context;
};

struct sgxs_image {
    struct teemate_image_info info; /* but for `sdk`, which image.c decides */
    struct teemate_segment *segments; /* owned; free() it */
    size_t segment_count;
    bool header_measured;  /* info.header holds the first bytes of ELRANGE, and they are EEXTENDed */
    uint64_t header_record; /* where that EEXTEND starts in the file */
};

/*
 * Read `fd` from offset 0 to its end; consumer may be NULL.  *image is filled on
 * success only.  Fails with -EBADMSG, -ENOMEM, the errno of pread(), or what the
 * consumer returned.
 */
int sgxs_read(int fd, const struct sgxs_consumer *consumer, struct sgxs_image *image,
              struct teemate_diag *diag);

/* image.c: the same, and what an SDK image claims about itself is checked. */
int image_read(int fd, const struct sgxs_consumer *consumer, struct sgxs_image *image,
               struct teemate_diag *diag);

#endif
