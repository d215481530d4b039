/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the example functions share: all of the input, a buffer that grows, and an honest end.
 *
 * A function is an ordinary C program.  Its payload is standard input, its result standard output, what it writes to
 * standard error is its log, and an exit status other than 0 says that it failed.  Whatever it allocates goes with
 * its instance, so nothing here frees.
 */
#ifndef FUNCTION_H
#define FUNCTION_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct bytes {
    uint8_t *data;
    size_t length, room;
};

/* Say why in the log and end with `status`: 1 is a bad payload, 2 bad arguments, 3 not enough memory. */
static _Noreturn inline void fail(int status, const char *why)
{
    fprintf(stderr, "%s\n", why);
    exit(status);
}

static inline void *allocate(size_t size)
{
    void *memory = malloc(size ? size : 1);

    if (!memory)
        fail(3, "not enough memory: raise the function's limit");
    return memory;
}

/* Make room for `more` bytes behind what is there. */
static inline uint8_t *bytes_reserve(struct bytes *bytes, size_t more)
{
    size_t room = bytes->room ? bytes->room : 4096;

    if (more > SIZE_MAX / 4 - bytes->length)
        fail(3, "not enough memory: the data are too large");
    while (room < bytes->length + more)
        room *= 2;
    if (room != bytes->room) {
        uint8_t *data = realloc(bytes->data, room);

        if (!data)
            fail(3, "not enough memory: raise the function's limit");
        bytes->data = data;
        bytes->room = room;
    }
    return bytes->data + bytes->length;
}

static inline void bytes_add(struct bytes *bytes, const void *data, size_t length)
{
    uint8_t *end = bytes_reserve(bytes, length);

    if (length)
        memcpy(end, data, length);
    bytes->length += length;
}

static inline void bytes_put(struct bytes *bytes, uint8_t byte)
{
    *bytes_reserve(bytes, 1) = byte;
    bytes->length++;
}

/* Read standard input to its end. */
static inline struct bytes read_input(void)
{
    struct bytes input = {0};
    ssize_t got;

    do {
        uint8_t *end = bytes_reserve(&input, 1);

        got = read(STDIN_FILENO, end, input.room - input.length);
        if (got > 0)
            input.length += (size_t)got;
    } while (got > 0);
    if (got < 0)
        fail(1, "the payload cannot be read");
    return input;
}

static inline void write_output(const void *data, size_t length)
{
    const uint8_t *next = data;

    while (length) {
        ssize_t put = write(STDOUT_FILENO, next, length);

        if (put <= 0)
            fail(1, "the result cannot be written: it is larger than the function may return");
        next += put;
        length -= (size_t)put;
    }
}

#endif
