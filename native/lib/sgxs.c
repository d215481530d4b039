/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One pass over the stream: every byte is read once, hashed once (in runs as
 * long as the buffer where nothing unmeasured lies between), and copied once into
 * the pages that the consumer gets.
 */
#include "sgxs.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "crypto.h"

#define BUFFER_SIZE (256u << 10) /* fits the second-level cache, so hashing finds what reading left */
#define STAGING_PAGES 64u

#define TAG(a, b, c, d, e, f, g, h) \
    ((uint64_t)(a) | (uint64_t)(b) << 8 | (uint64_t)(c) << 16 | (uint64_t)(d) << 24 | (uint64_t)(e) << 32 | \
     (uint64_t)(f) << 40 | (uint64_t)(g) << 48 | (uint64_t)(h) << 56)
#define TAG_ECREATE TAG('E', 'C', 'R', 'E', 'A', 'T', 'E', 0)
#define TAG_EADD TAG('E', 'A', 'D', 'D', 0, 0, 0, 0)
#define TAG_EEXTEND TAG('E', 'E', 'X', 'T', 'E', 'N', 'D', 0)
#define TAG_UNMEASRD TAG('U', 'N', 'M', 'E', 'A', 'S', 'R', 'D')
#define TAG_UNSIZED TAG('U', 'N', 'S', 'I', 'Z', 'E', 'D', 0)

#define ALL_CHUNKS 0xffffu

/* The page whose data records are being read. */
struct page {
    bool open;
    bool ascending;    /* chunks came in the order in which EADD with EEXTEND by Linux has them */
    uint16_t present;  /* bit i: chunk i has data */
    uint16_t measured; /* bit i: chunk i is EEXTENDed */
    uint64_t record;
    uint64_t offset;
    uint64_t secinfo_flags;
};

struct reader {
    int fd;
    const struct sgxs_consumer *consumer;
    struct teemate_diag *diag;
    struct sgxs_image *image;
    struct sha256 sha;
    size_t segment_capacity;

    uint8_t *buffer;
    size_t at;             /* of the record that is being read, in the buffer */
    size_t end;            /* of what the buffer holds */
    size_t hashed;         /* everything before this is in `sha`, or not measured */
    uint64_t buffer_start; /* of the buffer in the file */

    struct page page;
    struct sgxs_run run; /* finished pages that wait for more of their kind */
    uint8_t *staging;    /* their data, then that of `page` */
};

static uint64_t record_offset(const struct reader *reader)
{
    return reader->buffer_start + reader->at;
}

#define refuse(reader, reason, ...) \
    diag_set((reader)->diag, -EBADMSG, TEEMATE_STEP_PARSE, reason, record_offset(reader), __VA_ARGS__)

static uint32_t read_u32(const uint8_t *from)
{
    uint32_t value;
    memcpy(&value, from, sizeof(value));
    return value;
}

static uint64_t read_u64(const uint8_t *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof(value));
    return value;
}

static bool is_zero(const uint8_t *from, size_t length)
{
    uint8_t any = 0;
    for (size_t i = 0; i < length; i++)
        any |= from[i];
    return any == 0;
}

/* ---- the buffer ---------------------------------------------------------------- */

/* Everything up to `until` that has not been hashed is measured. */
static void hash_until(struct reader *reader, size_t until)
{
    sha256_update(&reader->sha, reader->buffer + reader->hashed, until - reader->hashed);
    reader->hashed = until;
}

/* Make `length` bytes from the current record on available; returns 1, 0 at the file's end, or an error. */
static int reader_need(struct reader *reader, size_t length)
{
    if (reader->end - reader->at >= length)
        return 1;

    hash_until(reader, reader->at);
    memmove(reader->buffer, reader->buffer + reader->at, reader->end - reader->at);
    reader->buffer_start += reader->at;
    reader->end -= reader->at;
    reader->at = reader->hashed = 0;
    while (reader->end < BUFFER_SIZE) {
        ssize_t got = pread(reader->fd, reader->buffer + reader->end, BUFFER_SIZE - reader->end,
                            (off_t)(reader->buffer_start + reader->end));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return diag_set(reader->diag, -errno, TEEMATE_STEP_READ, errno,
                            reader->buffer_start + reader->end, "cannot read the image: %s", strerror(errno));
        if (got == 0)
            break;
        reader->end += (size_t)got;
    }
    return reader->end >= length;
}

static int refuse_truncated(struct reader *reader, size_t length)
{
    return refuse(reader, TEEMATE_BAD_TRUNCATED,
                  "the file ends at byte %" PRIu64 ", inside the record at byte %" PRIu64
                  " that takes %zu bytes: the image is truncated",
                  reader->buffer_start + reader->end, record_offset(reader), length);
}

/* ---- pages -------------------------------------------------------------------- */

static int flush_run(struct reader *reader)
{
    struct sgxs_run *run = &reader->run;
    int result = 0;

    if (run->size && reader->consumer)
        result = reader->consumer->pages(reader->consumer->context, run, reader->diag);
    run->size = 0;
    return result;
}

static bool run_takes(const struct sgxs_run *run, const struct sgxs_run *page)
{
    return run->size && run->offset + run->size == page->offset &&
           run->secinfo_flags == page->secinfo_flags && run->measured == page->measured &&
           !run->partly && !page->partly && !run->data == !page->data &&
           (page->secinfo_flags & 0xff00) != SGX_SECINFO_PT(SGX_PT_TCS) &&
           (!run->data || run->size < (uint64_t)STAGING_PAGES * SGX_PAGE);
}

/* Where the data of the open page goes: behind the run that it may become a part of. */
static uint8_t *page_data(struct reader *reader)
{
    return reader->staging + (reader->run.data ? reader->run.size : 0);
}

/* All data records of the page have been read. */
static int finish_page(struct reader *reader)
{
    const struct page *page = &reader->page;
    uint8_t *data = page_data(reader);
    struct sgxs_run single = {
        .record = page->record,
        .offset = page->offset,
        .size = SGX_PAGE,
        .secinfo_flags = page->secinfo_flags,
        .data = page->present ? reader->staging : NULL,
        .measured = page->measured == ALL_CHUNKS && page->ascending,
    };
    int result;

    if (!page->open)
        return 0;
    reader->page.open = false;
    if (!reader->consumer)
        return 0;
    single.partly = page->measured && !single.measured;
    if (page->present && page->present != ALL_CHUNKS)
        for (unsigned chunk = 0; chunk < SGXS_CHUNKS; chunk++)
            if (!(page->present & 1u << chunk))
                memset(data + chunk * SGXS_DATA, 0, SGXS_DATA);

    if (run_takes(&reader->run, &single)) {
        reader->run.size += SGX_PAGE;
        return 0;
    }
    result = flush_run(reader);
    if (result < 0)
        return result;
    if (page->present && data != reader->staging)
        memcpy(reader->staging, data, SGX_PAGE);
    reader->run = single;
    return 0;
}

static int add_to_segments(struct reader *reader, uint64_t offset, uint64_t secinfo_flags)
{
    struct sgxs_image *image = reader->image;
    uint32_t type = (secinfo_flags >> 8) & 0xff;
    uint32_t prot = 0;
    struct teemate_segment *last = image->segment_count ? &image->segments[image->segment_count - 1] : NULL;

    prot |= secinfo_flags & SGX_SECINFO_R ? PROT_READ : 0;
    prot |= secinfo_flags & SGX_SECINFO_W ? PROT_WRITE : 0;
    prot |= secinfo_flags & SGX_SECINFO_X ? PROT_EXEC : 0;
    if (type == SGX_PT_TCS)
        prot = PROT_READ | PROT_WRITE; /* what Linux lets a TCS be mapped with */
    if (last && last->offset + last->size == offset && last->type == type && last->prot == prot) {
        last->size += SGX_PAGE;
        return 0;
    }
    if (image->segment_count == SGXS_SEGMENTS_MAX)
        return refuse(reader, TEEMATE_BAD_LIMIT,
                      "the image has more than %u runs of pages with different permissions: too many to map",
                      SGXS_SEGMENTS_MAX);
    if (image->segment_count == reader->segment_capacity) {
        size_t capacity = reader->segment_capacity ? 2 * reader->segment_capacity : 16;
        struct teemate_segment *grown = realloc(image->segments, capacity * sizeof(*grown));
        if (!grown)
            return diag_set(reader->diag, -ENOMEM, TEEMATE_STEP_READ, ENOMEM, record_offset(reader),
                            "no memory for the image's segments");
        image->segments = grown;
        reader->segment_capacity = capacity;
    }
    image->segments[image->segment_count++] =
        (struct teemate_segment){.offset = offset, .size = SGX_PAGE, .prot = prot, .type = type};
    return 0;
}

/* ---- records ------------------------------------------------------------------- */

static int read_ecreate(struct reader *reader, const uint8_t *record)
{
    struct teemate_image_info *info = &reader->image->info;
    uint64_t tag = read_u64(record);
    uint32_t ssa_frame_pages = read_u32(record + 8);
    uint64_t size = read_u64(record + 12);

    if (tag == TAG_UNSIZED)
        return refuse(reader, TEEMATE_BAD_UNSIZED,
                      "the stream starts with UNSIZED: give it a size (sgxs-append) before it is measured");
    if (tag != TAG_ECREATE)
        return refuse(reader, TEEMATE_BAD_TAG, "the stream does not start with an ECREATE record: not an SGXS file");
    if (!is_zero(record + 20, SGXS_RECORD - 20))
        return refuse(reader, TEEMATE_BAD_RESERVED, "reserved bytes of the ECREATE record are not zero");
    /* SDM 3D, ECREATE: a power of two; two pages are the least that Linux and the SDM take. */
    if (size < 2 * SGX_PAGE || size > SGXS_SIZE_MAX || (size & (size - 1)))
        return refuse(reader, TEEMATE_BAD_SIZE,
                      "the enclave's size 0x%" PRIx64 " is not a power of two from 0x%x to 0x%llx", size,
                      2 * SGX_PAGE, SGXS_SIZE_MAX);
    if (!ssa_frame_pages || ssa_frame_pages >= size / SGX_PAGE)
        return refuse(reader, TEEMATE_BAD_SIZE, "SSA frames of %u pages do not fit an enclave of %" PRIu64 " pages",
                      ssa_frame_pages, size / SGX_PAGE);
    info->size = size;
    info->ssa_frame_pages = ssa_frame_pages;
    return reader->consumer ? reader->consumer->begin(reader->consumer->context, size, ssa_frame_pages, reader->diag)
                            : 0;
}

/* What EADD refuses (SDM 3D, EADD), and Linux before it (sgx_validate_secinfo). */
static int check_secinfo(struct reader *reader, uint64_t offset, const uint8_t *secinfo)
{
    uint64_t flags = read_u64(secinfo);
    uint64_t type = flags & 0xff00;

    if (!is_zero(secinfo + 8, 40))
        return refuse(reader, TEEMATE_BAD_RESERVED, "page 0x%" PRIx64 ": reserved bytes of SECINFO are not zero",
                      offset);
    if (flags & ~(uint64_t)(SGX_SECINFO_R | SGX_SECINFO_W | SGX_SECINFO_X | 0xff00))
        return refuse(reader, TEEMATE_BAD_SECINFO,
                      "page 0x%" PRIx64 ": SECINFO flags 0x%" PRIx64 " have bits that EADD does not take", offset,
                      flags);
    if (type != SGX_SECINFO_PT(SGX_PT_REG) && type != SGX_SECINFO_PT(SGX_PT_TCS))
        return refuse(reader, TEEMATE_BAD_SECINFO,
                      "page 0x%" PRIx64 ": type %" PRIu64 " is neither a TCS (1) nor a regular page (2)", offset,
                      type >> 8);
    if ((flags & SGX_SECINFO_W) && !(flags & SGX_SECINFO_R))
        return refuse(reader, TEEMATE_BAD_SECINFO, "page 0x%" PRIx64 " is writable but not readable", offset);
    if (type == SGX_SECINFO_PT(SGX_PT_TCS) && (flags & 0xff))
        return refuse(reader, TEEMATE_BAD_SECINFO, "page 0x%" PRIx64 ": a TCS has no permissions, but this one has",
                      offset);
    return 0;
}

static int read_eadd(struct reader *reader, const uint8_t *record)
{
    struct teemate_image_info *info = &reader->image->info;
    uint64_t offset = read_u64(record + 8);
    uint64_t flags = read_u64(record + 16);
    int result;

    if (offset % SGX_PAGE)
        return refuse(reader, TEEMATE_BAD_ALIGNMENT, "EADD: offset 0x%" PRIx64 " is not a multiple of 4096", offset);
    if (offset >= info->size)
        return refuse(reader, TEEMATE_BAD_RANGE,
                      "EADD: page 0x%" PRIx64 " lies outside of the enclave, whose size is 0x%" PRIx64, offset,
                      info->size);
    if (info->pages && offset == reader->page.offset)
        return refuse(reader, TEEMATE_BAD_OVERLAP, "EADD: page 0x%" PRIx64 " is added twice", offset);
    if (info->pages && offset < reader->page.offset)
        return refuse(reader, TEEMATE_BAD_ORDER,
                      "EADD: page 0x%" PRIx64 " comes after page 0x%" PRIx64 ": pages must ascend", offset,
                      reader->page.offset);
    result = check_secinfo(reader, offset, record + 16);
    if (result < 0)
        return result;
    if (info->pages == SGXS_PAGES_MAX)
        return refuse(reader, TEEMATE_BAD_LIMIT, "the image has more than %llu pages", SGXS_PAGES_MAX);
    result = finish_page(reader);
    if (result == 0)
        result = add_to_segments(reader, offset, flags);
    if (result < 0)
        return result;
    info->pages++;
    if ((flags & 0xff00) == SGX_SECINFO_PT(SGX_PT_TCS))
        info->tcs_count++;
    reader->page = (struct page){
        .open = true,
        .ascending = true,
        .record = record_offset(reader),
        .offset = offset,
        .secinfo_flags = flags,
    };
    return 0;
}

/* EEXTEND or UNMEASRD with its data. */
static int read_data(struct reader *reader, const uint8_t *record, bool measured)
{
    struct page *page = &reader->page;
    struct teemate_image_info *info = &reader->image->info;
    uint64_t offset = read_u64(record + 8);
    const char *name = measured ? "EEXTEND" : "UNMEASRD";
    unsigned chunk = (unsigned)(offset % SGX_PAGE / SGXS_DATA);

    if (!is_zero(record + 16, SGXS_RECORD - 16))
        return refuse(reader, TEEMATE_BAD_RESERVED, "reserved bytes of the %s record are not zero", name);
    if (offset % SGXS_DATA)
        return refuse(reader, TEEMATE_BAD_ALIGNMENT, "%s: offset 0x%" PRIx64 " is not a multiple of 256", name,
                      offset);
    if (offset >= info->size)
        return refuse(reader, TEEMATE_BAD_RANGE,
                      "%s: offset 0x%" PRIx64 " lies outside of the enclave, whose size is 0x%" PRIx64, name, offset,
                      info->size);
    if (!page->open || (offset & ~(uint64_t)(SGX_PAGE - 1)) != page->offset)
        return refuse(reader, TEEMATE_BAD_ORDER, "%s: data at 0x%" PRIx64 " does not follow the EADD of its page",
                      name, offset);
    if (page->present & 1u << chunk)
        return refuse(reader, TEEMATE_BAD_OVERLAP, "%s: data at 0x%" PRIx64 " comes twice", name, offset);

    if (page->present >> chunk)
        page->ascending = false;
    page->present |= (uint16_t)(1u << chunk);
    if (measured) {
        page->measured |= (uint16_t)(1u << chunk);
        info->measured_bytes += SGXS_DATA;
    }
    if (reader->consumer)
        memcpy(page_data(reader) + chunk * SGXS_DATA, record + SGXS_RECORD, SGXS_DATA);
    if (offset == 0 && measured) {
        memcpy(info->header, record + SGXS_RECORD, sizeof(info->header));
        reader->image->header_measured = true;
        reader->image->header_record = record_offset(reader);
    }
    return 0;
}

/* The record at the cursor; returns its length. */
static int read_record(struct reader *reader)
{
    const uint8_t *record = reader->buffer + reader->at;
    uint64_t tag = read_u64(record);
    size_t length = SGXS_RECORD;
    int result;

    if (!reader->image->info.size) {
        result = read_ecreate(reader, record);
    } else if (tag == TAG_EADD) {
        result = read_eadd(reader, record);
    } else if (tag == TAG_EEXTEND || tag == TAG_UNMEASRD) {
        length += SGXS_DATA;
        result = reader_need(reader, length);
        if (result == 0)
            return refuse_truncated(reader, length);
        if (result < 0)
            return result;
        if (tag == TAG_UNMEASRD)
            hash_until(reader, reader->at);
        result = read_data(reader, reader->buffer + reader->at, tag == TAG_EEXTEND);
        if (tag == TAG_UNMEASRD)
            reader->hashed = reader->at + length;
    } else if (tag == TAG_ECREATE || tag == TAG_UNSIZED) {
        return refuse(reader, TEEMATE_BAD_TAG, "a second ECREATE or UNSIZED record: only the first may be one");
    } else {
        return refuse(reader, TEEMATE_BAD_TAG, "unknown record with tag 0x%016" PRIx64 ": not SGXS", tag);
    }
    return result < 0 ? result : (int)length;
}

static int read_stream(struct reader *reader)
{
    int result;

    for (;;) {
        result = reader_need(reader, SGXS_RECORD);
        if (result <= 0)
            break;
        result = read_record(reader);
        if (result < 0)
            return result;
        reader->at += (size_t)result;
    }
    if (result < 0)
        return result;
    if (reader->at != reader->end || !reader->image->info.size)
        return refuse_truncated(reader, SGXS_RECORD);
    hash_until(reader, reader->at);
    result = finish_page(reader);
    return result < 0 ? result : flush_run(reader);
}

int sgxs_read(int fd, const struct sgxs_consumer *consumer, struct sgxs_image *image, struct teemate_diag *diag)
{
    struct reader reader = {.fd = fd, .consumer = consumer, .diag = diag, .image = image};
    int result;

    *image = (struct sgxs_image){0};
    sha256_init(&reader.sha);
    reader.buffer = malloc(BUFFER_SIZE);
    /* One page more than a run may have: the page that follows it. */
    reader.staging = consumer ? aligned_alloc(SGX_PAGE, (STAGING_PAGES + 1) * SGX_PAGE) : NULL;
    if (!reader.buffer || (consumer && !reader.staging))
        result = diag_set(diag, -ENOMEM, TEEMATE_STEP_READ, ENOMEM, 0, "no memory to read the image with");
    else
        result = read_stream(&reader);

    if (result == 0) {
        sha256_final(&reader.sha, image->info.mrenclave);
        image->info.file_bytes = record_offset(&reader);
        image->info.segment_count = (uint32_t)image->segment_count;
    } else {
        free(image->segments);
        *image = (struct sgxs_image){0};
    }
    free(reader.buffer);
    free(reader.staging);
    return result;
}
