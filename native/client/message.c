/* SPDX-License-Identifier: Apache-2.0 */
#include "message.h"

#include <cbor.h>
#include <string.h>

/* ---- writing ---------------------------------------------------------------- */

static void written(struct writer *writer, size_t size)
{
    if (size == 0)
        writer->full = true;
    writer->at += size;
}

#define ROOM(writer) (writer)->at, (size_t)((writer)->end - (writer)->at)

void write_map(struct writer *writer, size_t pairs)
{
    written(writer, cbor_encode_map_start(pairs, ROOM(writer)));
}

void write_array(struct writer *writer, size_t items)
{
    written(writer, cbor_encode_array_start(items, ROOM(writer)));
}

static void write_raw(struct writer *writer, const void *data, size_t size)
{
    if (size > (size_t)(writer->end - writer->at)) {
        writer->full = true;
        return;
    }
    memcpy(writer->at, data, size);
    writer->at += size;
}

void write_text(struct writer *writer, const char *text)
{
    size_t size = strlen(text);

    written(writer, cbor_encode_string_start(size, ROOM(writer)));
    write_raw(writer, text, size);
}

void write_bytes(struct writer *writer, const void *data, size_t size)
{
    written(writer, cbor_encode_bytestring_start(size, ROOM(writer)));
    write_raw(writer, data, size);
}

void write_uint(struct writer *writer, uint64_t value)
{
    written(writer, cbor_encode_uint(value, ROOM(writer)));
}

void write_bool(struct writer *writer, bool value)
{
    written(writer, cbor_encode_bool(value, ROOM(writer)));
}

void write_seconds(struct writer *writer, uint32_t milliseconds)
{
    if (milliseconds % 1000 == 0)
        write_uint(writer, milliseconds / 1000);
    else
        written(writer, cbor_encode_double(milliseconds / 1000.0, ROOM(writer)));
}

/* ---- reading ---------------------------------------------------------------- */

/* What libcbor's decoder tells of one item: it calls one of these with the item as its context. */

static void item_uint(void *context, enum value_kind kind, uint64_t number)
{
    struct value *value = context;

    value->kind = kind;
    value->number = number;
}

static void on_uint8(void *context, uint8_t number) { item_uint(context, VALUE_UINT, number); }
static void on_uint16(void *context, uint16_t number) { item_uint(context, VALUE_UINT, number); }
static void on_uint32(void *context, uint32_t number) { item_uint(context, VALUE_UINT, number); }
static void on_uint64(void *context, uint64_t number) { item_uint(context, VALUE_UINT, number); }
static void on_negative8(void *context, uint8_t number) { item_uint(context, VALUE_NEGATIVE, number); }
static void on_negative16(void *context, uint16_t number) { item_uint(context, VALUE_NEGATIVE, number); }
static void on_negative32(void *context, uint32_t number) { item_uint(context, VALUE_NEGATIVE, number); }
static void on_negative64(void *context, uint64_t number) { item_uint(context, VALUE_NEGATIVE, number); }
static void on_array(void *context, size_t items) { item_uint(context, VALUE_ARRAY, items); }
static void on_map(void *context, size_t pairs) { item_uint(context, VALUE_MAP, pairs); }
static void on_bool(void *context, bool value) { item_uint(context, VALUE_BOOL, value); }
static void on_null(void *context) { item_uint(context, VALUE_NULL, 0); }

static void on_bytes(void *context, cbor_data data, size_t size)
{
    *(struct value *)context = (struct value){.kind = VALUE_BYTES, .data = data, .size = size};
}

static void on_text(void *context, cbor_data data, size_t size)
{
    *(struct value *)context = (struct value){.kind = VALUE_TEXT, .data = data, .size = size};
}

static void on_double(void *context, double number)
{
    *(struct value *)context = (struct value){.kind = VALUE_NUMBER, .real = number};
}

static void on_float(void *context, float number) { on_double(context, (double)number); }

/* Tags, indefinite lengths, `undefined`: the value stays VALUE_NONE. */
static void on_other(void *context) { (void)context; }
static void on_tag(void *context, uint64_t tag) { (void)context, (void)tag; }

static const struct cbor_callbacks callbacks = {
    .uint8 = on_uint8,
    .uint16 = on_uint16,
    .uint32 = on_uint32,
    .uint64 = on_uint64,
    .negint8 = on_negative8,
    .negint16 = on_negative16,
    .negint32 = on_negative32,
    .negint64 = on_negative64,
    .byte_string = on_bytes,
    .byte_string_start = on_other,
    .string = on_text,
    .string_start = on_other,
    .array_start = on_array,
    .indef_array_start = on_other,
    .map_start = on_map,
    .indef_map_start = on_other,
    .tag = on_tag,
    .float2 = on_float,
    .float4 = on_float,
    .float8 = on_double,
    .undefined = on_other,
    .null = on_null,
    .boolean = on_bool,
    .indef_break = on_other,
};

/* The item at *at, without what a container holds.  VALUE_NONE: what the protocol does not have. */
static bool item_at(const uint8_t **at, const uint8_t *end, struct value *value)
{
    struct cbor_decoder_result result;

    *value = (struct value){0};
    if (*at >= end)
        return false;
    result = cbor_stream_decode(*at, (size_t)(end - *at), &callbacks, value);
    if (result.status != CBOR_DECODER_FINISHED || result.read == 0 || value->kind == VALUE_NONE)
        return false;
    *at += result.read;
    if (value->kind == VALUE_ARRAY || value->kind == VALUE_MAP) {
        value->data = *at;
        value->size = (size_t)(end - *at);
    }
    return true;
}

/* Well formed UTF-8 (RFC 3629): shortest forms, no surrogates, nothing above U+10FFFF. */
static bool is_utf8(const uint8_t *at, size_t size)
{
    const uint8_t *end = at + size;

    while (at < end) {
        uint32_t least, code, length;

        if (*at < 0x80) {
            at++;
            continue;
        }
        if (*at >= 0xc2 && *at < 0xe0)
            length = 1, least = 0x80, code = *at & 0x1f;
        else if (*at >= 0xe0 && *at < 0xf0)
            length = 2, least = 0x800, code = *at & 0x0f;
        else if (*at >= 0xf0 && *at < 0xf5)
            length = 3, least = 0x10000, code = *at & 0x07;
        else
            return false;
        if ((size_t)(end - at) <= length)
            return false;
        for (at++; length != 0; length--, at++) {
            if ((*at & 0xc0) != 0x80)
                return false;
            code = code << 6 | (*at & 0x3f);
        }
        if (code < least || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
            return false;
    }
    return true;
}

bool message_check(const uint8_t *data, size_t size, struct value *map, const char **reason)
{
    struct { uint64_t left; bool map; } open[MESSAGE_DEPTH + 1] = {{.left = 1}};
    const uint8_t *at = data, *end = data + size;
    struct value value;
    int depth = 0;

    for (;;) {
        while (open[depth].left == 0) {
            if (depth == 0) {
                *reason = "bytes behind the message";
                return at == end;
            }
            depth--;
        }
        *reason = "it ends too early, or has an item that the protocol does not have";
        if (!item_at(&at, end, &value))
            return false;
        if (depth == 0) {
            *reason = "it is not a map";
            if (value.kind != VALUE_MAP)
                return false;
            *map = value;
        } else if (open[depth].map && open[depth].left % 2 == 0 && value.kind != VALUE_TEXT) {
            *reason = "a key that is not text";
            return false;
        }
        *reason = "text that is not UTF-8";
        if (value.kind == VALUE_TEXT && !is_utf8(value.data, value.size))
            return false;
        open[depth].left--;
        if (value.kind != VALUE_ARRAY && value.kind != VALUE_MAP)
            continue;
        *reason = "containers nested too deep";
        if (depth == MESSAGE_DEPTH)
            return false;
        /* Every item takes a byte: a count that cannot be true is not counted down. */
        *reason = "more items announced than bytes follow";
        if (value.number > (size_t)(end - at))
            return false;
        depth++;
        open[depth].map = value.kind == VALUE_MAP;
        open[depth].left = value.kind == VALUE_MAP ? 2 * value.number : value.number;
    }
}

/*
 * The head of the item at *at, of bytes that message_check() has seen: libcbor has found them well formed, and
 * this is what its decoder tells, without a call for each.  Only the end is looked at again.
 */
static bool head_at(const uint8_t **at, const uint8_t *end, struct value *value)
{
    static const uint8_t kinds[8] = {VALUE_UINT, VALUE_NEGATIVE, VALUE_BYTES, VALUE_TEXT, VALUE_ARRAY, VALUE_MAP};
    const uint8_t *from = *at;
    unsigned int major, info, width;
    uint64_t number;

    if (from >= end)
        return false;
    major = *from >> 5;
    info = *from++ & 31;
    if (major >= 6 || info > 27) /* simple values and floating point are few */
        return item_at(at, end, value);
    number = info;
    if (info >= 24) {
        width = 1u << (info - 24);
        if ((size_t)(end - from) < width)
            return false;
        for (number = 0; width != 0; width--)
            number = number << 8 | *from++;
    }
    *value = (struct value){.kind = kinds[major], .number = number};
    if (major == 2 || major == 3) {
        if (number > (size_t)(end - from))
            return false;
        *value = (struct value){.kind = kinds[major], .data = from, .size = (size_t)number};
        from += number;
    } else if (major >= 4) {
        value->data = from;
        value->size = (size_t)(end - from);
    }
    *at = from;
    return true;
}

struct items items_of(const struct value *container)
{
    uint64_t each = container->kind == VALUE_MAP ? 2 : container->kind == VALUE_ARRAY ? 1 : 0;

    return (struct items){container->data, container->data + container->size, each * container->number, 0};
}

bool items_next(struct items *items, struct value *value)
{
    for (; items->skip != 0; items->skip--) {
        if (!head_at(&items->at, items->end, value))
            return false;
        items->skip += items_of(value).left;
    }
    if (items->left == 0 || !head_at(&items->at, items->end, value))
        return false;
    items->left--;
    items->skip = items_of(value).left;
    return true;
}

bool value_is_text(const struct value *value, const char *text)
{
    return value->kind == VALUE_TEXT && value->size == strlen(text) && memcmp(value->data, text, value->size) == 0;
}

struct value map_value(const struct value *map, const char *key)
{
    struct items items = items_of(map);
    struct value name, value;

    if (map->kind == VALUE_MAP)
        while (items_next(&items, &name) && items_next(&items, &value))
            if (value_is_text(&name, key))
                return value;
    return (struct value){0};
}

/* ---- a map as a structure ---------------------------------------------------- */

static bool field_set(const struct field *field, const struct value *value, void *into)
{
    uint8_t *member = (uint8_t *)into + field->offset;
    uint32_t small = (uint32_t)value->number;
    uint16_t smaller = (uint16_t)value->number;
    double seconds;

    switch ((enum field_kind)field->kind) {
    case FIELD_U64:
        memcpy(member, &value->number, sizeof(value->number));
        return value->kind == VALUE_UINT;
    case FIELD_U32:
        memcpy(member, &small, sizeof(small));
        return value->kind == VALUE_UINT && value->number <= UINT32_MAX;
    case FIELD_U16:
        memcpy(member, &smaller, sizeof(smaller));
        return value->kind == VALUE_UINT && value->number <= UINT16_MAX;
    case FIELD_BOOL:
        memcpy(member, &small, sizeof(small));
        return value->kind == VALUE_BOOL;
    case FIELD_TEXT:
        if (value->kind != VALUE_TEXT)
            return false;
        text_copy((char *)member, field->size, value->data, value->size);
        return true;
    case FIELD_BYTES:
        if (value->kind != VALUE_BYTES || value->size != field->size)
            return false;
        memcpy(member, value->data, field->size);
        return true;
    case FIELD_MILLISECONDS:
        seconds = value->kind == VALUE_UINT ? (double)value->number : value->real;
        if ((value->kind != VALUE_UINT && value->kind != VALUE_NUMBER) || !(seconds >= 0))
            return false;
        small = seconds < 4000000 ? (uint32_t)(seconds * 1000) : 4000000000u;
        memcpy(member, &small, sizeof(small));
        return true;
    case FIELD_VALUE:
        memcpy(member, value, sizeof(*value));
        return true;
    }
    return false;
}

const char *map_read(const struct value *map, const struct field *fields, size_t count, void *into)
{
    struct items items = items_of(map);
    struct value key, value;
    uint32_t found = 0;
    size_t next = 0; /* the broker says them in the order of our tables, so the first look hits */

    if (map->kind != VALUE_MAP)
        return "map";
    while (items_next(&items, &key) && items_next(&items, &value)) {
        for (size_t i = 0; i < count; i++) {
            const struct field *field = &fields[next];
            uint32_t bit = 1u << next;

            next = next + 1 < count ? next + 1 : 0;
            if (!value_is_text(&key, field->key))
                continue;
            if (!(field->optional && value.kind == VALUE_NULL) && !field_set(field, &value, into))
                return field->key;
            found |= bit;
            break;
        }
    }
    for (size_t i = 0; i < count; i++)
        if (!fields[i].optional && !(found & 1u << i))
            return fields[i].key;
    return NULL;
}

void text_copy(char *into, size_t size, const uint8_t *text, size_t length)
{
    size_t copied = length < size - 1 ? length : size - 1;

    /* Not in the middle of a character. */
    while (copied < length && copied > 0 && (text[copied] & 0xc0) == 0x80)
        copied--;
    for (size_t i = 0; i < copied; i++)
        into[i] = text[i] < 0x20 || text[i] == 0x7f ? '?' : (char)text[i];
    into[copied] = 0;
}
