/* SPDX-License-Identifier: Apache-2.0 */
/* A backend whose SGX2 calls answer by a script, under native/lib/sgx2.c as it is. */
#include <errno.h>
#include <stdint.h>

#include "../../native/lib/enclave.h"
#include "../../native/lib/sgx2.h"

struct answer {
    int error;
    uint64_t done, result;
};

static const struct answer *script;
static unsigned answers, calls;
static uint64_t last_offset, last_length, last_argument;

uint64_t fork_process(void)
{
    return 1;
}

static int answer(uint64_t offset, uint64_t length, uint64_t argument, uint64_t *result, uint64_t *count)
{
    const struct answer *now = &script[calls < answers ? calls : answers - 1];

    calls++;
    last_offset = offset;
    last_length = length;
    last_argument = argument;
    *result = now->result;
    *count = now->done;
    return now->error;
}

static int change(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t argument,
                  uint64_t *result, uint64_t *count)
{
    (void)enclave;
    return answer(offset, length, argument, result, count);
}

static int remove_pages(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t *count)
{
    uint64_t result;

    (void)enclave;
    return answer(offset, length, 0, &result, count);
}

static const struct backend scripted = {
    .restrict_permissions = change, .modify_types = change, .remove_pages = remove_pages};

/* which: 0 restrict, 1 modify, 2 remove.  `seen`: calls, and offset, length and argument of the last. */
int play(int which, const struct answer *answered, unsigned count, int forked, uint64_t offset, uint64_t length,
         uint64_t argument, uint64_t *result, uint64_t *done, uint64_t seen[4])
{
    struct teemate_enclave enclave = {.backend = &scripted, .process = forked ? 2 : 1};
    int error;

    script = answered;
    answers = count;
    calls = 0;
    *result = 0;
    if (which == 0)
        error = enclave_restrict_permissions(&enclave, offset, length, argument, result, done);
    else if (which == 1)
        error = enclave_modify_types(&enclave, offset, length, argument, result, done);
    else
        error = enclave_remove_pages(&enclave, offset, length, done);
    seen[0] = calls;
    seen[1] = last_offset;
    seen[2] = last_length;
    seen[3] = last_argument;
    return error;
}
