/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The two requests that are answered without Python, and their answers (client/protocol.cddl: hello, attach).
 *
 * Everything that is not what our own clients send is not plain, and Python's to judge: other keys, longer
 * heads than need be, more slots than one, somebody who resumes.
 */
#ifndef TEEMATE_DOOR_PLAIN_H
#define TEEMATE_DOOR_PLAIN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PLAIN_REQUEST_MAX 256u
#define PLAIN_TOKEN_SIZE 32u
#define PLAIN_SLOT_SIZE 192u /* more than a reply's `slots` takes */

struct plain_request {
    uint64_t id;
    const uint8_t *name; /* in the message */
    size_t name_size;
};

/* Whether the message is a plain attach, with one slot. */
bool plain_parse(const uint8_t *untrusted, size_t size, struct plain_request *request);

struct plain_hello {
    uint64_t id;
    const uint8_t *name, *session; /* in the message; NULL: none */
    size_t name_size;
    bool counts;
};

/* Whether the message is the first hello of a client that speaks our version. */
bool plain_parse_hello(const uint8_t *untrusted, size_t size, struct plain_hello *hello);

struct plain_slot {
    uint64_t grant, slot, tcs, generation;
    uint8_t key[16];
    uint8_t bind[88];
};

struct plain_counts {
    uint64_t total, free, used, withheld, quarantined, waiting, clients;
};

/*
 * What the replies of one enclave have in common, encoded: `info`, the pairs of its enclave-info without
 * slots and clients; `rest`, the pairs `segments` and `arena`.
 */
struct plain_text {
    const uint8_t *info, *rest;
    size_t info_size, rest_size;
    uint64_t info_pairs;
};

/* Encodes the reply; returns its size, 0 when it does not fit. */
size_t plain_reply(const struct plain_text *text, const struct plain_counts *counts, uint64_t id,
                   const struct plain_slot *slot, uint8_t *out, size_t room);

/* What hello is answered: pairs of a map, with a token of 32 bytes between, or NULL. */
struct plain_welcome {
    const uint8_t *before, *behind;
    size_t before_size, behind_size;
    uint64_t pairs;
};

/* Encodes that; returns its size, 0 when it does not fit. */
size_t plain_greet(const struct plain_welcome *welcome, uint64_t id, const uint8_t *token, uint8_t *out,
                   size_t room);

#endif
