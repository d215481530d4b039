/* SPDX-License-Identifier: Apache-2.0 */
/* Measuring images, and what an SDK image says of itself. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "crypto.h"
#include "sgxs.h"
#include "teemate_abi.h"

/* [offset, offset + count * stride - (stride - size)) lies in an enclave of `limit` bytes. */
static bool fits(uint64_t offset, uint64_t count, uint64_t stride, uint64_t size, uint64_t limit)
{
    uint64_t spread, last;

    if (!count)
        return true;
    return !__builtin_mul_overflow(count - 1, stride, &spread) && !__builtin_add_overflow(offset, spread, &last) &&
           !__builtin_add_overflow(last, size, &last) && last <= limit;
}

/* Are all pages of the range added, with this type? */
static bool covered(const struct sgxs_image *image, uint64_t offset, uint64_t size, uint32_t type)
{
    for (size_t i = 0; i < image->segment_count && size; i++) {
        const struct teemate_segment *segment = &image->segments[i];
        uint64_t end = segment->offset + segment->size;
        if (offset >= segment->offset && offset < end && segment->type == type) {
            uint64_t part = end - offset < size ? end - offset : size;
            offset += part;
            size -= part;
        }
    }
    return size == 0;
}

/*
 * The warden and the broker find slots by the header, so what it says must be so.
 * The SDK inside checks nothing of it: it is measured.
 */
static int check_header(const struct sgxs_image *image, struct teemate_diag *diag)
{
    const struct teemate_image_info *info = &image->info;
    struct tm_image_header header;
    uint64_t slots, frames;
    const char *wrong = NULL;

    memcpy(&header, info->header, sizeof(header));
    slots = (uint64_t)TM_WARDEN_SLOTS + header.io_slots + header.client_slots;
    frames = slots * header.nssa; /* not used before both factors are known to be small */
    if (header.abi_version != TM_ABI_VERSION)
        wrong = "its ABI version is not ours: build the image with this version's SDK";
    else if (header.size != info->size)
        wrong = "its size is not ECREATE's";
    else if (slots > TM_MAX_SLOTS || slots != info->tcs_count)
        wrong = "its number of slots is not that of the TCS pages, or more than 4096";
    else if (!header.nssa || header.nssa > 0xffff)
        wrong = "its number of SSA frames is 0 or above 65535";
    else if (header.ssa_frame_size != (uint64_t)info->ssa_frame_pages * SGX_PAGE)
        wrong = "its SSA frame size is not ECREATE's";
    else if (header.tcs_offset % SGX_PAGE || !fits(header.tcs_offset, slots, SGX_PAGE, SGX_PAGE, info->size) ||
             !covered(image, header.tcs_offset, slots * SGX_PAGE, SGX_PT_TCS))
        wrong = "tcs_offset does not point to its TCS pages";
    else if (!fits(header.ssa_offset, frames, header.ssa_frame_size, header.ssa_frame_size, info->size))
        wrong = "its SSA frames lie outside of the enclave";
    else if (!fits(header.td_offset, slots, header.td_stride, SGX_PAGE, info->size))
        wrong = "its thread data lies outside of the enclave";
    else if (!fits(header.stack_offset, slots, header.stack_stride, header.stack_size, info->size))
        wrong = "its stacks lie outside of the enclave";
    else if (!fits(header.heap_offset, 1, 0, header.heap_size, info->size))
        wrong = "its heap lies outside of the enclave";
    else if (!fits(header.rela_offset, header.rela_count, 24, 24, info->size))
        wrong = "its relocations lie outside of the enclave";
    if (wrong)
        return diag_set(diag, -EBADMSG, TEEMATE_STEP_PARSE, TEEMATE_BAD_HEADER, image->header_record,
                        "the SDK's image header contradicts the image: %s", wrong);
    return 0;
}

int image_read(int fd, const struct sgxs_consumer *consumer, struct sgxs_image *image, struct teemate_diag *diag)
{
    uint64_t magic;
    int result = sgxs_read(fd, consumer, image, diag);

    if (result < 0)
        return result;
    memcpy(&magic, image->info.header, sizeof(magic));
    if (!image->header_measured || magic != TM_IMAGE_MAGIC) {
        memset(image->info.header, 0, sizeof(image->info.header));
        return 0;
    }
    result = check_header(image, diag);
    if (result < 0) {
        free(image->segments);
        *image = (struct sgxs_image){0};
        return result;
    }
    image->info.sdk = 1;
    return 0;
}

int teemate_image_measure(int fd, struct teemate_image_info *info, struct teemate_diag *diag)
{
    struct sgxs_image image;
    int result = image_read(fd, NULL, &image, diag);

    if (result < 0)
        return result;
    *info = image.info;
    free(image.segments);
    return 0;
}

void teemate_sha256(const void *data, size_t length, uint8_t *digest)
{
    struct sha256 sha;

    sha256_init(&sha);
    sha256_update(&sha, data, length);
    sha256_final(&sha, digest);
}
