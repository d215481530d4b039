/* SPDX-License-Identifier: Apache-2.0 */
/* What the attendant's fuzzers share: messages that are nearly right, the same ones for a seed everywhere. */
#ifndef FUZZING_H
#define FUZZING_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REQUIRE(condition)                                                          \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                \
        }                                                                           \
    } while (0)

static uint64_t state;

/* xorshift64*: what matters is that a seed gives the same run everywhere. */
static uint64_t draw(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717ull;
}

/* Changes a message of `size` bytes, with room for 1,300, in up to three places; returns its new size. */
static size_t mutate(uint8_t *message, size_t size)
{
    for (uint64_t changes = draw() % 4; changes > 0; changes--) {
        size_t at = draw() % (size + 1);

        switch (draw() % 6) {
        case 0:
        case 1:
            message[at % size] ^= (uint8_t)(1u << draw() % 8);
            break;
        case 2:
            message[at % size] = (uint8_t)draw();
            break;
        case 3: /* shorter */
            if (at != 0)
                size = at;
            break;
        case 4: /* something in between */
            memmove(message + at + 1, message + at, size - at);
            message[at] = (uint8_t)draw();
            size++;
            break;
        default: /* longer, rarely by much */
            memset(message + size, (int)draw(), 300);
            size += draw() % 64 == 0 ? 300 : draw() % 4;
        }
        if (size == 0 || size > 1000)
            size = 1;
    }
    return size;
}

#endif
