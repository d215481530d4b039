/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Make a thumbnail of an image: QOI in, QOI out (the "Quite OK Image Format", qoiformat.org), at most SIDE pixels
 * wide and high (argument, 64 without one), with the image's proportions.  Each pixel is the mean of those that it
 * covers; colours count as much as they are opaque.
 */
#include "function.h"

#define PIXELS_MAX (1u << 24)
#define HEADER 14
#define END 8

struct pixel {
    uint8_t r, g, b, a;
};

struct image {
    uint32_t width, height;
    uint8_t channels, space; /* told by the file, and handed on */
    struct pixel *pixels;
};

static const uint8_t end_mark[END] = {0, 0, 0, 0, 0, 0, 0, 1};

static uint32_t get_uint32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static unsigned slot_of(struct pixel p)
{
    return (p.r * 3u + p.g * 5u + p.b * 7u + p.a * 11u) % 64;
}

static int same(struct pixel one, struct pixel two)
{
    return one.r == two.r && one.g == two.g && one.b == two.b && one.a == two.a;
}

static struct image decode(struct bytes file)
{
    struct pixel seen[64] = {0}, pixel = {0, 0, 0, 255};
    struct image image;
    size_t at = HEADER, end, count;

    if (file.length < HEADER + END || memcmp(file.data, "qoif", 4) != 0)
        fail(1, "the payload is not a QOI image");
    image.width = get_uint32(file.data + 4);
    image.height = get_uint32(file.data + 8);
    image.channels = file.data[12];
    image.space = file.data[13];
    if (!image.width || !image.height || image.width > PIXELS_MAX / image.height)
        fail(1, "the image has no pixels, or more than 16 million");
    if ((image.channels != 3 && image.channels != 4) || image.space > 1)
        fail(1, "the image's header is wrong");
    end = file.length - END;
    count = (size_t)image.width * image.height;
    image.pixels = allocate(count * sizeof(struct pixel));
    for (size_t i = 0; i < count;) {
        size_t run = 1;

        if (at >= end)
            fail(1, "the image ends too early");
        uint8_t tag = file.data[at++];

        if (tag >= 0xfe) { /* all of it, with or without alpha */
            size_t bytes = tag == 0xff ? 4 : 3;

            if (end - at < bytes)
                fail(1, "the image ends too early");
            pixel = (struct pixel){file.data[at], file.data[at + 1], file.data[at + 2],
                                   bytes == 4 ? file.data[at + 3] : pixel.a};
            at += bytes;
        } else if (tag >> 6 == 0) { /* one that was there */
            pixel = seen[tag];
        } else if (tag >> 6 == 1) { /* nearly the last one */
            pixel.r = (uint8_t)(pixel.r + (tag >> 4 & 3) - 2);
            pixel.g = (uint8_t)(pixel.g + (tag >> 2 & 3) - 2);
            pixel.b = (uint8_t)(pixel.b + (tag & 3) - 2);
        } else if (tag >> 6 == 2) { /* as far as green, and a bit */
            if (at >= end)
                fail(1, "the image ends too early");
            int green = (tag & 63) - 32;
            uint8_t rest = file.data[at++];

            pixel.r = (uint8_t)(pixel.r + green + (rest >> 4) - 8);
            pixel.g = (uint8_t)(pixel.g + green);
            pixel.b = (uint8_t)(pixel.b + green + (rest & 15) - 8);
        } else { /* the last one again */
            run = (tag & 63) + 1u;
        }
        seen[slot_of(pixel)] = pixel;
        if (run > count - i)
            fail(1, "the image has more pixels than its header says");
        while (run--)
            image.pixels[i++] = pixel;
    }
    if (at != end || memcmp(file.data + end, end_mark, END) != 0)
        fail(1, "the image does not end where it should");
    return image;
}

static struct bytes encode(struct image image)
{
    struct pixel seen[64] = {0}, last = {0, 0, 0, 255};
    struct bytes file = {0};
    size_t count = (size_t)image.width * image.height;
    unsigned run = 0;

    bytes_add(&file, "qoif", 4);
    for (int shift = 24; shift >= 0; shift -= 8)
        bytes_put(&file, (uint8_t)(image.width >> shift));
    for (int shift = 24; shift >= 0; shift -= 8)
        bytes_put(&file, (uint8_t)(image.height >> shift));
    bytes_put(&file, image.channels);
    bytes_put(&file, image.space);
    for (size_t i = 0; i < count; i++) {
        struct pixel pixel = image.pixels[i];

        if (same(pixel, last)) {
            if (++run == 62 || i + 1 == count) {
                bytes_put(&file, (uint8_t)(0xc0 | (run - 1)));
                run = 0;
            }
            continue;
        }
        if (run) {
            bytes_put(&file, (uint8_t)(0xc0 | (run - 1)));
            run = 0;
        }
        int r = (int8_t)(pixel.r - last.r), g = (int8_t)(pixel.g - last.g), b = (int8_t)(pixel.b - last.b);
        int rg = r - g, bg = b - g;

        if (same(pixel, seen[slot_of(pixel)])) {
            bytes_put(&file, (uint8_t)slot_of(pixel));
        } else if (pixel.a != last.a) {
            bytes_add(&file, (uint8_t[]){0xff, pixel.r, pixel.g, pixel.b, pixel.a}, 5);
        } else if (r >= -2 && r < 2 && g >= -2 && g < 2 && b >= -2 && b < 2) {
            bytes_put(&file, (uint8_t)(0x40 | (r + 2) << 4 | (g + 2) << 2 | (b + 2)));
        } else if (g >= -32 && g < 32 && rg >= -8 && rg < 8 && bg >= -8 && bg < 8) {
            bytes_put(&file, (uint8_t)(0x80 | (g + 32)));
            bytes_put(&file, (uint8_t)((rg + 8) << 4 | (bg + 8)));
        } else {
            bytes_add(&file, (uint8_t[]){0xfe, pixel.r, pixel.g, pixel.b}, 4);
        }
        seen[slot_of(pixel)] = pixel;
        last = pixel;
    }
    bytes_add(&file, end_mark, END);
    return file;
}

/* The mean of a rectangle, ends excluded, rounded. */
static struct pixel mean(const struct image *image, uint32_t left, uint32_t right, uint32_t top, uint32_t bottom)
{
    uint64_t r = 0, g = 0, b = 0, a = 0, count = (uint64_t)(right - left) * (bottom - top);

    for (uint32_t y = top; y < bottom; y++)
        for (uint32_t x = left; x < right; x++) {
            struct pixel p = image->pixels[(size_t)y * image->width + x];

            r += (uint64_t)p.r * p.a, g += (uint64_t)p.g * p.a, b += (uint64_t)p.b * p.a, a += p.a;
        }
    if (!a)
        return (struct pixel){0};
    return (struct pixel){(uint8_t)((r + a / 2) / a), (uint8_t)((g + a / 2) / a), (uint8_t)((b + a / 2) / a),
                          (uint8_t)((a + count / 2) / count)};
}

static struct image shrink(const struct image *image, uint32_t side)
{
    uint32_t longer = image->width > image->height ? image->width : image->height;
    struct image small = *image;

    if (longer <= side)
        return small;
    small.width = (uint32_t)((uint64_t)image->width * side / longer);
    small.height = (uint32_t)((uint64_t)image->height * side / longer);
    small.width += !small.width;
    small.height += !small.height;
    small.pixels = allocate((size_t)small.width * small.height * sizeof(struct pixel));
    for (uint32_t y = 0; y < small.height; y++)
        for (uint32_t x = 0; x < small.width; x++)
            small.pixels[(size_t)y * small.width + x] =
                mean(image, (uint32_t)((uint64_t)x * image->width / small.width),
                     (uint32_t)((uint64_t)(x + 1) * image->width / small.width),
                     (uint32_t)((uint64_t)y * image->height / small.height),
                     (uint32_t)((uint64_t)(y + 1) * image->height / small.height));
    return small;
}

int main(int argc, char **argv)
{
    long side = argc > 1 ? strtol(argv[1], NULL, 10) : 64;

    if (side < 1 || side > 4096)
        fail(2, "SIDE is a number from 1 to 4096");
    struct image image = decode(read_input()), small = shrink(&image, (uint32_t)side);
    struct bytes file = encode(small);

    fprintf(stderr, "%u x %u -> %u x %u, %zu bytes\n", (unsigned)image.width, (unsigned)image.height,
            (unsigned)small.width, (unsigned)small.height, file.length);
    write_output(file.data, file.length);
    return 0;
}
