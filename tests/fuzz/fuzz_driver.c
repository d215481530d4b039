/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs a libFuzzer target without libFuzzer: a fixed number of mutations of the files of
 * a corpus, the same for the same seed.
 *
 * Usage: fuzz_driver SEED ITERATIONS FILE...
 * The input in hand is in `crash-input` of the working directory when something fails.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define INPUT_MAX (1u << 20)
#define FILES_MAX 64

static struct {
    uint8_t *data;
    size_t size;
} corpus[FILES_MAX];

static uint64_t state;

/* xorshift64*: what matters is that a seed gives the same run everywhere. */
static uint64_t draw(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717ull;
}

static size_t draw_below(size_t limit)
{
    return limit ? draw() % limit : 0;
}

/* Numbers at which arithmetic goes wrong. */
static uint64_t draw_number(void)
{
    static const uint64_t edges[] = {0, 1, 255, 256, 4095, 4096, 0x7fffffff, 0xffffffff, 1ull << 32, 1ull << 47,
                                     1ull << 63, ~0ull, ~0xffull, ~0xfffull, 0x201, 0x203, 0x100};
    return draw() % 2 ? edges[draw_below(sizeof(edges) / sizeof(edges[0]))] : draw();
}

#define SIGSTRUCT 1808u

static size_t record_length(const uint8_t *record)
{
    return memcmp(record, "EEXTEND", 7) == 0 || memcmp(record, "UNMEASRD", 8) == 0 ? 320 : 64;
}

/* Where a record starts: mutations that keep to them get further than blind ones. */
static size_t draw_record(const uint8_t *data, size_t size)
{
    size_t count = 0, at;

    for (at = SIGSTRUCT; at + 64 <= size; at += record_length(data + at))
        count++;
    count = draw_below(count);
    for (at = SIGSTRUCT; count && at + 64 <= size; at += record_length(data + at))
        count--;
    return at < size ? at : size;
}

static size_t mutate(uint8_t *data, size_t size)
{
    size_t from = draw_below(size), to = draw_below(size), length = draw_below(320);
    uint64_t number = draw_number();

    if (draw() % 8) {
        from = draw_record(data, size);
        to = draw_record(data, size);
        if (to < size && draw() % 2)
            length = record_length(data + to);
    }
    switch (draw() % 8) {
    case 0: /* one bit */
        if (size)
            data[draw_below(size)] ^= (uint8_t)(1u << draw() % 8);
        break;
    case 1: /* one byte */
        if (size)
            data[draw_below(size)] = (uint8_t)draw();
        break;
    case 2: /* a number in a record */
        from += draw() % 3 * 8;
        if (from + 8 <= size)
            memcpy(data + from, &number, 8);
        break;
    case 3: /* cut */
        return from;
    case 4: /* take a piece out */
        if (from < size && length <= size - from) {
            memmove(data + from, data + from + length, size - from - length);
            return size - length;
        }
        break;
    case 5: /* put a piece in, from elsewhere */
        if (from <= size && to <= size && length <= size - to && size + length <= INPUT_MAX) {
            uint8_t piece[512];
            memcpy(piece, data + to, length);
            memmove(data + from + length, data + from, size - from);
            memcpy(data + from, piece, length);
            return size + length;
        }
        break;
    case 6: /* copy a piece over another */
        if (from <= size && to <= size && length <= size - to && length <= size - from)
            memmove(data + from, data + to, length);
        break;
    default: /* a tag */
        if (from + 8 <= size) {
            static const char tags[5][8] = {"ECREATE", "EADD", "EEXTEND", {'U', 'N', 'M', 'E', 'A', 'S', 'R', 'D'}, "UNSIZED"};
            memcpy(data + from, tags[draw() % 5], 8);
        }
    }
    return size;
}

static int load(const char *path)
{
    FILE *file = fopen(path, "rb");
    static int count;

    if (!file || count == FILES_MAX) {
        fprintf(stderr, "cannot take %s\n", path);
        return -1;
    }
    corpus[count].data = malloc(INPUT_MAX);
    if (!corpus[count].data)
        return -1;
    corpus[count].size = fread(corpus[count].data, 1, INPUT_MAX, file);
    fclose(file);
    return ++count;
}

int main(int argc, char **argv)
{
    uint64_t iterations = argc > 2 ? strtoull(argv[2], NULL, 0) : 0;
    int files = 0;
    int fd = open("crash-input", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    uint8_t *shared;

    if (argc < 4 || fd < 0 || ftruncate(fd, INPUT_MAX)) {
        fprintf(stderr, "usage: %s SEED ITERATIONS FILE...\n", argv[0]);
        return 2;
    }
    /* A shared mapping outlives an abort(), so the last input needs no handler to be kept. */
    shared = mmap(NULL, INPUT_MAX, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared == MAP_FAILED)
        return 2;
    for (int i = 3; i < argc; i++)
        if ((files = load(argv[i])) < 0)
            return 2;

    state = strtoull(argv[1], NULL, 0) * 2 + 1;
    for (uint64_t i = 0; i < iterations; i++) {
        int chosen = (int)draw_below((size_t)files);
        size_t size = corpus[chosen].size;
        uint8_t *exact;

        memcpy(shared, corpus[chosen].data, size);
        if (i >= (uint64_t)files)
            for (uint64_t times = 1 + draw() % 6; times; times--)
                size = mutate(shared, size);
        /* A block of its own, so that the sanitizer sees a read behind its end. */
        exact = malloc(size ? size : 1);
        if (!exact)
            return 2;
        memcpy(exact, shared, size);
        LLVMFuzzerTestOneInput(exact, size);
        free(exact);
    }
    unlink("crash-input");
    printf("%" PRIu64 " inputs, seed %s\n", iterations, argv[1]);
    return 0;
}
