/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A store for its owner, in the enclave's memory: `put KEY` keeps the payload, `get KEY` gives it back, `delete KEY`
 * forgets it, and `list [PREFIX]` names the keys, each on a line of its own.  To be deployed with --grant keys.
 */
#include "function.h"
#include "keys.h"

#define VALUE_MAX 65536

static _Noreturn void refused(int error)
{
    switch (error) {
    case ENOENT:
        fail(4, "there is no such key");
    case ENOSPC:
        fail(5, "there are too many keys, or too much in them: delete some");
    case EINVAL:
        fail(1, "a key has 1 to 256 bytes, a value at most 65536");
    case ENOMEM:
        fail(3, "the enclave's memory is full");
    default:
        fail(6, "somebody is in the middle of a change: try again");
    }
}

static void list(const char *prefix)
{
    uint32_t length, room = 4096;
    uint8_t *page = allocate(room);
    uint64_t cursor = 0;
    int error;

    do {
        error = keys_list(prefix, strlen(prefix), page, room, &cursor, &length);
        if (error == ERANGE) {
            room = length;
            page = allocate(room);
            length = 0;
        } else if (error) {
            refused(error);
        }
        for (uint32_t at = 0; at < length;) {
            struct keys_record record;

            memcpy(&record, page + at, sizeof(record));
            at += sizeof(record);
            write_output(page + at, record.key_length);
            write_output("\n", 1);
            at += record.key_length;
        }
    } while (cursor || error == ERANGE);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "", *key = argc > 2 ? argv[2] : "";
    static uint8_t value[VALUE_MAX];
    uint32_t length = 0;
    int error;

    if (!strcmp(what, "list") && argc <= 3) {
        list(key);
        return 0;
    }
    if (argc != 3)
        fail(2, "put KEY, get KEY, delete KEY or list [PREFIX]");
    if (!strcmp(what, "put")) {
        struct bytes input = read_input();

        error = keys_put(key, strlen(key), input.data, input.length);
    } else if (!strcmp(what, "get")) {
        error = keys_get(key, strlen(key), value, sizeof(value), &length);
    } else if (!strcmp(what, "delete")) {
        error = keys_delete(key, strlen(key));
    } else {
        fail(2, "put KEY, get KEY, delete KEY or list [PREFIX]");
    }
    if (error)
        refused(error);
    write_output(value, length);
    return 0;
}
