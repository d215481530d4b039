/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "floor.h"

double floor_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

void floor_fail(const char *what, int error)
{
    fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what, strerror(error));
    exit(1);
}

static const struct floor *floor_find(const struct floor *floors, unsigned count, const char *what)
{
    for (unsigned i = 0; i < count; i++)
        if (strcmp(floors[i].what, what) == 0)
            return &floors[i];
    return NULL;
}

int floor_serve(const struct floor *floors, unsigned count)
{
    char line[128];

    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin) != NULL) {
        char what[32];
        unsigned long times, pause_us;
        const struct floor *floor;

        if (sscanf(line, "%31s %lu %lu", what, &times, &pause_us) != 3)
            floor_fail("a line is WHAT COUNT PAUSE", EINVAL);
        floor = floor_find(floors, count, what);
        if (floor == NULL)
            floor_fail(what, EINVAL);
        for (; times; times--) {
            if (pause_us)
                usleep((useconds_t)pause_us);
            printf("%.0f ", floor->once(floor->state));
        }
        putchar('\n');
        fflush(stdout);
    }
    return 0;
}
