/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How fast the library hashes, to be compared with `openssl speed -evp sha256 -bytes 4096`.
 *
 *   teemate-floor hash      answers to "blocks": nanoseconds of processor time for 1000 blocks of 4 KiB
 */
#include <stdio.h>
#include <time.h>

#include "floor.h"
#include "teemate.h"

static double processor_ns(void)
{
    struct timespec time;

    /* As openssl counts it: what others do on this processor is not the hash's. */
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static double blocks(void *state)
{
    static uint8_t block[4096];
    uint8_t digest[32];
    double start = processor_ns();

    (void)state;
    for (unsigned i = 0; i < 1000; i++)
        teemate_sha256(block, sizeof(block), digest);
    return processor_ns() - start;
}

int floor_hash(int argc, char **argv)
{
    static const struct floor floors[] = {{blocks, "blocks", NULL}};

    (void)argv;
    if (argc != 1) {
        fprintf(stderr, "usage: teemate-floor hash\n");
        return 2;
    }
    return floor_serve(floors, 1);
}
