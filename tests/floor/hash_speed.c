/* SPDX-License-Identifier: Apache-2.0 */
/* Hash 4 KiB blocks for a second of processor time, as `openssl speed -bytes 4096` does; prints MB/s. */
#include <stdio.h>
#include <time.h>

#include "crypto.h"

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

int main(void)
{
    static uint8_t block[4096];
    uint8_t digest[32];
    double start = now(), end;
    unsigned long blocks = 0;

    do {
        for (unsigned i = 0; i < 1000; i++) {
            struct sha256 sha;
            sha256_init(&sha);
            sha256_update(&sha, block, sizeof(block));
            sha256_final(&sha, digest);
        }
        blocks += 1000;
        end = now();
    } while (end - start < 1);
    printf("%.1f\n", (double)blocks * sizeof(block) / (end - start) / 1e6);
    return 0;
}
