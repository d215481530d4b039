/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The least that building an enclave without hardware can cost: as many pages of memory,
 * zeroed and present, and the measured bytes hashed once.  What builds enclaves is
 * compared with this, so it must not be slow on purpose.
 *
 * Usage: create_floor PAGES MEASURED_BYTES [REPEAT]
 * Prints the milliseconds of each of REPEAT rounds, one per line.
 *
 * Pages are 4 KiB pages of a memfd, as those of the sim are, since they are to be
 * shared with other processes; fallocate() allocates and clears them without a page
 * fault for each.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "crypto.h"

#define PAGE 4096u
#define CHUNK (256u << 10)

static double now_ms(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec / 1e6;
}

static void hash(const uint8_t *chunk, uint64_t bytes)
{
    struct sha256 sha;
    uint8_t digest[32];

    sha256_init(&sha);
    for (; bytes > CHUNK; bytes -= CHUNK)
        sha256_update(&sha, chunk, CHUNK);
    sha256_update(&sha, chunk, bytes);
    sha256_final(&sha, digest);
    __asm__ volatile("" : : "r"(digest) : "memory");
}

/* Returns the fd of `pages` pages that are there, or -1. */
static int allocate(uint64_t pages)
{
    int fd = memfd_create("create-floor", MFD_CLOEXEC);

    if (fd >= 0 && pages && fallocate(fd, 0, 0, (off_t)(pages * PAGE))) {
        close(fd);
        return -1;
    }
    return fd;
}

int main(int argc, char **argv)
{
    uint64_t pages = argc > 2 ? strtoull(argv[1], NULL, 0) : 0;
    uint64_t measured = argc > 2 ? strtoull(argv[2], NULL, 0) : 0;
    unsigned long repeat = argc > 3 ? strtoul(argv[3], NULL, 0) : 1;
    uint8_t *chunk = malloc(CHUNK);

    if (argc < 3 || argc > 4 || !chunk) {
        fprintf(stderr, "usage: %s PAGES MEASURED_BYTES [REPEAT]\n", argv[0]);
        return 2;
    }
    /* fallocate() on a memfd would go on until somebody is killed for want of memory. */
    if (pages > (uint64_t)sysconf(_SC_PHYS_PAGES) / 2) {
        fprintf(stderr, "create_floor: %" PRIu64 " pages are more than half of this machine's memory\n", pages);
        return 1;
    }
    memset(chunk, 0x5a, CHUNK);
    for (; repeat; repeat--) {
        double start = now_ms();
        int fd = allocate(pages);

        if (fd < 0) {
            perror("create_floor: cannot allocate the pages");
            return 1;
        }
        hash(chunk, measured);
        printf("%.3f\n", now_ms() - start);
        close(fd);
    }
    free(chunk);
    return 0;
}
