/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The least that building an enclave without hardware can cost: as many pages of memory,
 * zeroed and present, and the measured bytes hashed once.
 *
 *   teemate-floor create PAGES MEASURED_BYTES      answers to "create"
 *
 * Pages are 4 KiB pages of a memfd, as those of the sim are, since they are to be
 * shared with other processes; fallocate() allocates and clears them without a page
 * fault for each.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "floor.h"
#include "teemate.h"

#define PAGE 4096u
#define CHUNK (256u << 10)

struct creation {
    uint64_t pages;
    uint64_t measured;
    uint8_t *chunk;
};

static void hash(const uint8_t *chunk, uint64_t bytes)
{
    uint8_t digest[32];

    for (; bytes > CHUNK; bytes -= CHUNK)
        teemate_sha256(chunk, CHUNK, digest);
    teemate_sha256(chunk, bytes, digest);
}

static double create_once(void *state)
{
    const struct creation *creation = state;
    double start = floor_now_ns();
    double end;
    int fd = memfd_create("teemate-floor", MFD_CLOEXEC);

    if (fd < 0)
        floor_fail("memfd_create", errno);
    if (creation->pages && fallocate(fd, 0, 0, (off_t)(creation->pages * PAGE)))
        floor_fail("cannot allocate the pages", errno);
    hash(creation->chunk, creation->measured);
    end = floor_now_ns();
    close(fd);
    return end - start;
}

int floor_create(int argc, char **argv)
{
    struct creation creation = {0};
    const struct floor floors[] = {{create_once, "create", &creation}};

    if (argc != 3) {
        fprintf(stderr, "usage: teemate-floor create PAGES MEASURED_BYTES\n");
        return 2;
    }
    creation.pages = strtoull(argv[1], NULL, 0);
    creation.measured = strtoull(argv[2], NULL, 0);
    /* fallocate() on a memfd would go on until somebody is killed for want of memory. */
    if (creation.pages > (uint64_t)sysconf(_SC_PHYS_PAGES) / 2) {
        fprintf(stderr, "teemate-floor: %" PRIu64 " pages are more than half of this machine's memory\n",
                creation.pages);
        return 1;
    }
    creation.chunk = malloc(CHUNK);
    if (creation.chunk == NULL)
        floor_fail("malloc", ENOMEM);
    memset(creation.chunk, 0x5a, CHUNK);
    return floor_serve(floors, 1);
}
