/* SPDX-License-Identifier: Apache-2.0 */
#include "plain.h"

#include <math.h>
#include <string.h>

#define MAX_ID 9007199254740991ull /* as in broker/connections/requests.py */
#define MAX_NAME 64u
#define VERSION 1 /* as in broker/connections/operations.py */

/* ---- reading ------------------------------------------------------------------------ */

struct reader {
    const uint8_t *at, *end;
};

/* A head of RFC 8949, section 3, in its shortest form. */
static bool head(struct reader *reader, unsigned int major, uint64_t *value)
{
    static const uint64_t least[] = {24, 0x100, 0x10000, 0x100000000ull};
    unsigned int info, width;

    if (reader->at == reader->end || *reader->at >> 5 != major)
        return false;
    info = *reader->at++ & 31;
    if (info < 24) {
        *value = info;
        return true;
    }
    if (info > 27)
        return false;
    width = 1u << (info - 24);
    if ((size_t)(reader->end - reader->at) < width)
        return false;
    *value = 0;
    for (unsigned int i = 0; i < width; i++)
        *value = *value << 8 | *reader->at++;
    return *value >= least[info - 24];
}

static bool text(struct reader *reader, const char *expected)
{
    size_t size = strlen(expected);
    uint64_t length;

    if (!head(reader, 3, &length) || length != size || (size_t)(reader->end - reader->at) < size ||
        memcmp(reader->at, expected, size) != 0)
        return false;
    reader->at += size;
    return true;
}

/* A time that broker/connections/requests.py would take: finite, and not negative. */
static bool seconds(struct reader *reader)
{
    uint64_t bits = 0;
    double value;

    if (reader->at == reader->end)
        return false;
    if (*reader->at != 0xfb) /* what is no double of 64 bits */
        return head(reader, 0, &bits) && bits <= MAX_ID;
    if (reader->end - reader->at < 9)
        return false;
    for (int i = 1; i <= 8; i++)
        bits = bits << 8 | reader->at[i];
    reader->at += 9;
    memcpy(&value, &bits, sizeof(value));
    return isfinite(value) && value >= 0;
}

bool plain_parse(const uint8_t *untrusted, size_t size, struct plain_request *request)
{
    struct reader reader = {untrusted, untrusted + size};
    uint64_t pairs, args, length, slots = 1;

    if (!head(&reader, 5, &pairs) || pairs != 3)
        return false;
    if (!text(&reader, "id") || !head(&reader, 0, &request->id) || request->id > MAX_ID)
        return false;
    if (!text(&reader, "op") || !text(&reader, "attach") || !text(&reader, "args"))
        return false;
    if (!head(&reader, 5, &args) || args < 1 || args > 3)
        return false;
    if (!text(&reader, "enclave") || !head(&reader, 3, &length) || length < 1 || length > MAX_NAME ||
        (size_t)(reader.end - reader.at) < length)
        return false;
    request->name = reader.at;
    request->name_size = (size_t)length;
    reader.at += length;
    if (args > 1 && (!text(&reader, "slots") || !head(&reader, 0, &slots)))
        return false;
    if (args > 2 && (!text(&reader, "wait") || !seconds(&reader)))
        return false;
    return slots == 1 && reader.at == reader.end;
}

static bool flag(struct reader *reader, bool *value)
{
    if (reader->at == reader->end || (*reader->at != 0xf4 && *reader->at != 0xf5))
        return false;
    *value = *reader->at++ == 0xf5;
    return true;
}

/* Bytes or ASCII text without control characters, which stay in the message. */
static bool span(struct reader *reader, unsigned int major, const uint8_t **at, uint64_t *size)
{
    if (!head(reader, major, size) || (size_t)(reader->end - reader->at) < *size)
        return false;
    *at = reader->at;
    reader->at += *size;
    for (uint64_t i = 0; major == 3 && i < *size; i++)
        if ((*at)[i] < ' ' || (*at)[i] > '~')
            return false;
    return true;
}

/* One pair of the arguments; each may be there once, and `seen` says which were. */
static bool hello_pair(struct reader *reader, struct plain_hello *hello, unsigned int *seen)
{
    static const char *const keys[] = {"version", "counters", "client", "session"};
    const uint8_t *start = reader->at;
    uint64_t value;
    unsigned int which = 0;

    while (which < 4 && !text(reader, keys[which])) {
        reader->at = start;
        which++;
    }
    if (which == 4 || (*seen & 1u << which))
        return false;
    *seen |= 1u << which;
    switch (which) {
    case 0:
        return head(reader, 0, &value) && value == VERSION;
    case 1:
        return flag(reader, &hello->counts);
    case 2:
        if (!span(reader, 3, &hello->name, &value) || value > MAX_NAME)
            return false;
        hello->name_size = (size_t)value;
        return true;
    default:
        return span(reader, 2, &hello->session, &value) && value == PLAIN_TOKEN_SIZE;
    }
}

bool plain_parse_hello(const uint8_t *untrusted, size_t size, struct plain_hello *hello)
{
    struct reader reader = {untrusted, untrusted + size};
    uint64_t pairs, args;
    unsigned int seen = 0;

    *hello = (struct plain_hello){0};
    if (!head(&reader, 5, &pairs) || pairs != 3)
        return false;
    if (!text(&reader, "id") || !head(&reader, 0, &hello->id) || hello->id > MAX_ID)
        return false;
    if (!text(&reader, "op") || !text(&reader, "hello") || !text(&reader, "args"))
        return false;
    if (!head(&reader, 5, &args) || args > 4)
        return false;
    for (; args > 0; args--)
        if (!hello_pair(&reader, hello, &seen))
            return false;
    return (seen & 1) != 0 && reader.at == reader.end;
}

/* ---- writing ------------------------------------------------------------------------ */

struct writer {
    uint8_t *at, *end;
    bool full;
};

static void put(struct writer *writer, const void *data, size_t size)
{
    if ((size_t)(writer->end - writer->at) < size) {
        writer->full = true;
        return;
    }
    memcpy(writer->at, data, size);
    writer->at += size;
}

static void put_head(struct writer *writer, unsigned int major, uint64_t value)
{
    unsigned int width = value < 24 ? 0 : value < 0x100 ? 1 : value < 0x10000 ? 2 : value < 0x100000000ull ? 4 : 8;
    unsigned int info = width == 0 ? (unsigned int)value : 23u + (unsigned int)__builtin_ctz(width) + 1;
    uint8_t bytes[9] = {(uint8_t)(major << 5 | info)};

    for (unsigned int i = 0; i < width; i++)
        bytes[1 + i] = (uint8_t)(value >> 8 * (width - 1 - i));
    put(writer, bytes, 1 + width);
}

static void put_text(struct writer *writer, const char *key)
{
    put_head(writer, 3, strlen(key));
    put(writer, key, strlen(key));
}

static void put_uint(struct writer *writer, const char *key, uint64_t value)
{
    put_text(writer, key);
    put_head(writer, 0, value);
}

static void put_bytes(struct writer *writer, const char *key, const uint8_t *bytes, size_t size)
{
    put_text(writer, key);
    put_head(writer, 2, size);
    put(writer, bytes, size);
}

/* The order of everything is that of broker/slots/granting.py and broker/enclaves/enclave.py. */
size_t plain_reply(const struct plain_text *common, const struct plain_counts *counts, uint64_t id,
                   const struct plain_slot *slot, uint8_t *out, size_t room)
{
    struct writer writer = {out, out + room, false};

    put_head(&writer, 5, 2);
    put_uint(&writer, "id", id);
    put_text(&writer, "ok");
    put_head(&writer, 5, 5);
    put_uint(&writer, "grant", slot->grant);
    put_text(&writer, "enclave");
    put_head(&writer, 5, common->info_pairs + 2);
    put(&writer, common->info, common->info_size);
    put_text(&writer, "slots");
    put_head(&writer, 5, 6);
    put_uint(&writer, "total", counts->total);
    put_uint(&writer, "free", counts->free);
    put_uint(&writer, "used", counts->used);
    put_uint(&writer, "withheld", counts->withheld);
    put_uint(&writer, "quarantined", counts->quarantined);
    put_uint(&writer, "waiting", counts->waiting);
    put_uint(&writer, "clients", counts->clients);
    put(&writer, common->rest, common->rest_size);
    put_text(&writer, "slots");
    put_head(&writer, 4, 1);
    put_head(&writer, 5, 5);
    put_uint(&writer, "slot", slot->slot);
    put_uint(&writer, "tcs", slot->tcs);
    put_uint(&writer, "generation", slot->generation);
    put_bytes(&writer, "key", slot->key, sizeof(slot->key));
    put_bytes(&writer, "bind", slot->bind, sizeof(slot->bind));
    return writer.full ? 0 : (size_t)(writer.at - out);
}

size_t plain_greet(const struct plain_welcome *welcome, uint64_t id, const uint8_t *token, uint8_t *out,
                   size_t room)
{
    struct writer writer = {out, out + room, false};

    put_head(&writer, 5, 2);
    put_uint(&writer, "id", id);
    put_text(&writer, "ok");
    put_head(&writer, 5, welcome->pairs);
    put(&writer, welcome->before, welcome->before_size);
    if (token != NULL)
        put_bytes(&writer, "token", token, PLAIN_TOKEN_SIZE);
    put(&writer, welcome->behind, welcome->behind_size);
    return writer.full ? 0 : (size_t)(writer.at - out);
}
