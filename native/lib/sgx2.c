/* SPDX-License-Identifier: Apache-2.0 */
#include "sgx2.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "enclave.h"

/* 50 us, 100 us, ... 12.8 ms, and so on: a second in all without any progress. */
#define WAIT_FIRST_NS 50000ull
#define WAIT_LONGEST_NS 12800000ull
#define WAIT_TOTAL_NS 1000000000ull

struct work {
    uint64_t offset;
    uint64_t length;
    uint64_t argument; /* permissions or type */
    uint64_t result;
    uint64_t done;
};

typedef int work_call(struct teemate_enclave *enclave, struct work *part);

static int restrict_part(struct teemate_enclave *enclave, struct work *part)
{
    return enclave->backend->restrict_permissions(enclave, part->offset, part->length, part->argument, &part->result,
                                                  &part->done);
}

static int modify_part(struct teemate_enclave *enclave, struct work *part)
{
    return enclave->backend->modify_types(enclave, part->offset, part->length, part->argument, &part->result,
                                          &part->done);
}

static int remove_part(struct teemate_enclave *enclave, struct work *part)
{
    return enclave->backend->remove_pages(enclave, part->offset, part->length, &part->done);
}

static int work_through(struct teemate_enclave *enclave, struct work *work, work_call *call)
{
    uint64_t pause = WAIT_FIRST_NS, waited = 0;

    work->done = work->result = 0;
    if (!enclave_is_ours(enclave))
        return -ENOTCONN;
    for (;;) {
        struct work part = {.offset = work->offset + work->done,
                            .length = work->length - work->done,
                            .argument = work->argument};
        int error = call(enclave, &part);

        work->done += part.done;
        work->result = part.result;
        if (error != -EBUSY && error != -EAGAIN)
            return error;
        if (part.done) {
            pause = WAIT_FIRST_NS;
            waited = 0;
        }
        if (waited >= WAIT_TOTAL_NS)
            return -EBUSY;
        /* A signal ends the wait early: its handler has run, and we ask again. */
        nanosleep(&(struct timespec){.tv_nsec = (long)pause}, NULL);
        waited += pause;
        if (pause < WAIT_LONGEST_NS)
            pause *= 2;
    }
}

int enclave_restrict_permissions(struct teemate_enclave *enclave, uint64_t offset, uint64_t length,
                                 uint64_t permissions, uint64_t *result, uint64_t *count)
{
    struct work work = {.offset = offset, .length = length, .argument = permissions};
    int error = work_through(enclave, &work, restrict_part);

    *result = work.result;
    *count = work.done;
    return error;
}

int enclave_modify_types(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t type,
                         uint64_t *result, uint64_t *count)
{
    struct work work = {.offset = offset, .length = length, .argument = type};
    int error = work_through(enclave, &work, modify_part);

    *result = work.result;
    *count = work.done;
    return error;
}

int enclave_remove_pages(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t *count)
{
    struct work work = {.offset = offset, .length = length};
    int error = work_through(enclave, &work, remove_part);

    *count = work.done;
    return error;
}
