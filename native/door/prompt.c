/* SPDX-License-Identifier: Apache-2.0 */
#include "prompt.h"

#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RESET_ON_FORK 1 /* SCHED_FLAG_RESET_ON_FORK */

struct attributes { /* struct sched_attr as of its first version; glibc has none before 2.41 */
    uint32_t size;
    uint32_t policy; /* 0: SCHED_OTHER */
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime; /* of SCHED_OTHER: the slice, in ns */
    uint64_t deadline;
    uint64_t period;
};

static int set(int nice, unsigned int slice_us)
{
    const struct attributes attributes = {
        .size = sizeof(attributes),
        .flags = RESET_ON_FORK,
        .nice = nice,
        .runtime = (uint64_t)slice_us * 1000,
    };

    return syscall(SYS_sched_setattr, 0, &attributes, 0) == 0 ? 0 : -errno;
}

int door_be_prompt(int nice, unsigned int slice_us)
{
    int present = getpriority(PRIO_PROCESS, 0);
    int error;

    /* Whoever gave this program another policy (CPUSchedulingPolicy= of a unit, chrt) meant it. */
    if (sched_getscheduler(0) != SCHED_OTHER)
        return 0;
    error = present <= nice ? set(present, slice_us) : set(nice, slice_us);

    if (error != -EPERM && error != -EACCES)
        return error;
    error = set(present, slice_us);
    return error == 0 ? 1 : error;
}
