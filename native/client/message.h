/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One message on the wire: CBOR, written and read in place with libcbor's stream functions, which
 * allocate nothing.  The rules are those of client/protocol.cddl: one map of at most 64 KiB, text
 * keys, no tags, no indefinite lengths, depth at most 8, valid UTF-8, nothing behind it.  A key that comes
 * twice is not noticed: which of its values is taken does not matter, since both were the broker's.
 */
#ifndef TEEMATE_MESSAGE_H
#define TEEMATE_MESSAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MESSAGE_MAX 65536u
#define MESSAGE_DEPTH 8
#define MESSAGE_FDS 4

/* ---- writing ---- */

struct writer {
    uint8_t *start;
    uint8_t *at;
    uint8_t *end;
    bool full; /* something did not fit: what is there is no message */
};

void write_map(struct writer *writer, size_t pairs);
void write_array(struct writer *writer, size_t items);
void write_text(struct writer *writer, const char *text);
void write_bytes(struct writer *writer, const void *data, size_t size);
void write_uint(struct writer *writer, uint64_t value);
void write_bool(struct writer *writer, bool value);
/* Milliseconds as the wire's seconds. */
void write_seconds(struct writer *writer, uint32_t milliseconds);

/* ---- reading ---- */

enum value_kind { VALUE_NONE, VALUE_UINT, VALUE_NEGATIVE, VALUE_BYTES, VALUE_TEXT, VALUE_ARRAY, VALUE_MAP,
                  VALUE_BOOL, VALUE_NULL, VALUE_NUMBER };

/* One item, in the buffer that it was read from. */
struct value {
    enum value_kind kind;
    uint64_t number;     /* UINT; BOOL: 0 or 1; ARRAY, MAP: how many items or pairs */
    double real;         /* NUMBER */
    const uint8_t *data; /* BYTES, TEXT: the content; ARRAY, MAP: the first item */
    size_t size;         /* BYTES, TEXT: bytes; ARRAY, MAP: from `data` to the end of the buffer */
};

/*
 * Look through `size` bytes and return the map that they are.  False when they are not one message as
 * the protocol has it; *reason says why.  Only values of a message that was checked may be given to
 * what follows.
 */
bool message_check(const uint8_t *data, size_t size, struct value *map, const char **reason);

/* The items of an array, or keys and values of a map, one after the other. */
struct items {
    const uint8_t *at;
    const uint8_t *end;
    uint64_t left;
    uint64_t skip; /* items inside of the last one, passed over when the next one is asked for */
};
struct items items_of(const struct value *container);
/* False at the end. */
bool items_next(struct items *items, struct value *value);

bool value_is_text(const struct value *value, const char *text);

/* What a map holds under `key`; VALUE_NONE when there is no such key. */
struct value map_value(const struct value *map, const char *key);

/* ---- a map as a structure ---- */

enum field_kind { FIELD_U64, FIELD_U32, FIELD_U16, FIELD_BOOL, FIELD_TEXT, FIELD_BYTES, FIELD_MILLISECONDS, FIELD_VALUE };

/* `offset` and `size` are of a member: U64, U32 (BOOL too), U16, char[] (terminated), bytes of just that
 * number, U32 (MILLISECONDS, from seconds), struct value. */
struct field {
    const char *key;
    uint8_t kind;
    bool optional;
    uint16_t offset;
    uint16_t size;
};
#define FIELD(kind, type, member, key, optional) \
    {key, kind, optional, offsetof(type, member), sizeof(((type *)0)->member)}

/*
 * Copy what `fields` (32 at most) name out of `map`; keys that they do not name are ignored, and optional
 * ones that are not there leave their member as it was.  NULL, or the key that is missing, or of
 * another type or length.
 */
const char *map_read(const struct value *map, const struct field *fields, size_t count, void *into);

/* Text for people: cut to `size` with its end, control characters replaced. */
void text_copy(char *into, size_t size, const uint8_t *text, size_t length);

#endif
