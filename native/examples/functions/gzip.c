/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Compress the payload as gzip does (RFC 1951, RFC 1952); `gunzip` and every zlib read the result.
 *
 * LZ77 with chains of equal hashes, and for each block of symbols its own two Huffman codes.
 */
#include "function.h"

#define WINDOW 32768u
#define MATCH_MIN 3u
#define MATCH_MAX 258u
#define HASH_BITS 15
#define CHAIN 64 /* places that are tried for a match: more is smaller, and slower */
#define BLOCK 32768u /* symbols that share their codes */
#define LITERALS 286
#define DISTANCES 30
#define LENGTHS 19 /* symbols in which the codes themselves are told */

/* A literal (distance 0), or a match of `value` bytes. */
struct symbol {
    uint16_t value, distance;
};

struct code {
    uint8_t length[LITERALS];
    uint16_t bits[LITERALS]; /* the first one lowest */
};

static struct bytes output;
static uint64_t pending; /* bits that are no byte yet */
static int pending_count;

static void put_bits(uint32_t bits, int count)
{
    pending |= (uint64_t)bits << pending_count;
    for (pending_count += count; pending_count >= 8; pending_count -= 8, pending >>= 8)
        bytes_put(&output, (uint8_t)pending);
}

static void put_uint32(uint32_t value)
{
    for (int i = 0; i < 4; i++)
        bytes_put(&output, (uint8_t)(value >> 8 * i));
}

static uint32_t crc32(const uint8_t *data, size_t length)
{
    uint32_t crc = 0xffffffff, table[256];

    for (uint32_t byte = 0; byte < 256; byte++) {
        table[byte] = byte;
        for (int bit = 0; bit < 8; bit++)
            table[byte] = table[byte] >> 1 ^ (0xedb88320 & -(table[byte] & 1));
    }
    for (size_t i = 0; i < length; i++)
        crc = crc >> 8 ^ table[(crc ^ data[i]) & 255];
    return ~crc;
}

/* ---- lengths and distances as RFC 1951, 3.2.5 has them ---- */

/* Lengths 3 to 10 have symbols of their own; from then on each group of four has one bit more. */
static int length_symbol(unsigned length, int *extra, unsigned *rest)
{
    unsigned value = length - MATCH_MIN;

    *extra = 0, *rest = 0;
    if (length == MATCH_MAX)
        return 285;
    while (value >> *extra >= 8)
        ++*extra;
    *rest = value & ((1u << *extra) - 1);
    return (int)(257 + 4 * (unsigned)*extra + (value >> *extra));
}

static int distance_symbol(unsigned distance, int *extra, unsigned *rest)
{
    unsigned value = distance - 1;

    *extra = 0;
    while (value >> *extra >= 4)
        ++*extra;
    *rest = value & ((1u << *extra) - 1);
    return (int)(2 * (unsigned)*extra + (value >> *extra));
}

/* ---- Huffman codes ---- */

/* Lengths of a code for symbols that occur `count` times, none longer than `most`. */
static void code_lengths(const uint32_t *count, int symbols, int most, uint8_t *length)
{
    uint32_t weight[2 * LITERALS], scaled[LITERALS];
    int parent[2 * LITERALS], open[LITERALS];

    memcpy(scaled, count, sizeof(scaled[0]) * (size_t)symbols);
    for (;;) {
        int nodes = symbols, left = 0, longest = 0;

        memset(length, 0, (size_t)symbols);
        for (int i = 0; i < symbols; i++) {
            weight[i] = scaled[i];
            if (scaled[i])
                open[left++] = i;
        }
        /* One symbol alone still needs a bit, and some decoders want a second one. */
        for (int i = 0; left < 2 && i < symbols; i++)
            if (!scaled[i]) {
                weight[i] = 1;
                open[left++] = i;
            }
        int used = left;
        int leaves[LITERALS];

        memcpy(leaves, open, sizeof(open[0]) * (size_t)used);
        while (left > 1) {
            int pair[2];

            for (int k = 0; k < 2; k++) {
                int best = 0;

                for (int i = 1; i < left; i++)
                    if (weight[open[i]] < weight[open[best]])
                        best = i;
                pair[k] = open[best];
                open[best] = open[--left];
            }
            weight[nodes] = weight[pair[0]] + weight[pair[1]];
            parent[pair[0]] = parent[pair[1]] = nodes;
            open[left++] = nodes++;
        }
        for (int i = 0; i < used; i++) {
            int depth = 0;

            for (int node = leaves[i]; node != nodes - 1; node = parent[node])
                depth++;
            length[leaves[i]] = (uint8_t)depth;
            longest = depth > longest ? depth : longest;
        }
        if (longest <= most)
            return;
        for (int i = 0; i < symbols; i++) /* flatter weights give a flatter tree; a rare symbol stays one */
            scaled[i] = (scaled[i] + 1) / 2;
    }
}

/* The bits follow from the lengths: shorter ones first, equal ones by number (RFC 1951, 3.2.2). */
static void make_code(const uint32_t *count, int symbols, int most, struct code *code)
{
    uint16_t next[17] = {0};
    uint16_t of_length[17] = {0};

    code_lengths(count, symbols, most, code->length);
    for (int i = 0; i < symbols; i++)
        of_length[code->length[i]]++;
    of_length[0] = 0;
    for (int length = 1; length <= 15; length++)
        next[length + 1] = (uint16_t)((next[length] + of_length[length]) << 1);
    for (int i = 0; i < symbols; i++) {
        uint16_t bits = code->length[i] ? next[code->length[i]]++ : 0, turned = 0;

        for (int bit = 0; bit < code->length[i]; bit++)
            turned |= (uint16_t)((bits >> bit & 1) << (code->length[i] - 1 - bit));
        code->bits[i] = turned;
    }
}

static void put_code(const struct code *code, int symbol)
{
    put_bits(code->bits[symbol], code->length[symbol]);
}

/* ---- blocks ---- */

/* Tell both codes' lengths, without the run lengths that RFC 1951, 3.2.7 also has: some 50 bytes more a block. */
static void put_codes(const struct code *literals, const struct code *distances)
{
    static const uint8_t order[LENGTHS] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint32_t count[LENGTHS] = {0};
    struct code lengths;

    for (int i = 0; i < LITERALS; i++)
        count[literals->length[i]]++;
    for (int i = 0; i < DISTANCES; i++)
        count[distances->length[i]]++;
    make_code(count, LENGTHS, 7, &lengths);
    put_bits(LITERALS - 257, 5);
    put_bits(DISTANCES - 1, 5);
    put_bits(LENGTHS - 4, 4);
    for (int i = 0; i < LENGTHS; i++)
        put_bits(lengths.length[order[i]], 3);
    for (int i = 0; i < LITERALS; i++)
        put_code(&lengths, literals->length[i]);
    for (int i = 0; i < DISTANCES; i++)
        put_code(&lengths, distances->length[i]);
}

static void put_block(const struct symbol *symbols, size_t length, int last)
{
    uint32_t literal_count[LITERALS] = {0}, distance_count[DISTANCES] = {0};
    struct code literals, distances;
    unsigned rest;
    int extra;

    literal_count[256] = 1; /* the block's end */
    for (size_t i = 0; i < length; i++) {
        if (!symbols[i].distance) {
            literal_count[symbols[i].value]++;
            continue;
        }
        literal_count[length_symbol(symbols[i].value, &extra, &rest)]++;
        distance_count[distance_symbol(symbols[i].distance, &extra, &rest)]++;
    }
    make_code(literal_count, LITERALS, 15, &literals);
    make_code(distance_count, DISTANCES, 15, &distances);
    put_bits((uint32_t)last, 1);
    put_bits(2, 2);
    put_codes(&literals, &distances);
    for (size_t i = 0; i < length; i++) {
        if (!symbols[i].distance) {
            put_code(&literals, symbols[i].value);
            continue;
        }
        put_code(&literals, length_symbol(symbols[i].value, &extra, &rest));
        put_bits(rest, extra);
        put_code(&distances, distance_symbol(symbols[i].distance, &extra, &rest));
        put_bits(rest, extra);
    }
    put_code(&literals, 256);
}

/* ---- LZ77 ---- */

static uint32_t newest[1u << HASH_BITS]; /* place + 1 of the last three bytes with this hash, 0: none */
static uint32_t older[WINDOW];           /* the one before, by place modulo the window */

static uint32_t hash(const uint8_t *at)
{
    return (uint32_t)((at[0] << 16 | at[1] << 8 | at[2]) * 2654435761u) >> (32 - HASH_BITS);
}

static void remember(const struct bytes *input, size_t place)
{
    if (place + MATCH_MIN > input->length)
        return;
    uint32_t *head = &newest[hash(input->data + place)];

    older[place % WINDOW] = *head;
    *head = (uint32_t)place + 1;
}

static struct symbol find(const struct bytes *input, size_t place)
{
    struct symbol best = {input->data[place], 0};
    size_t most = input->length - place < MATCH_MAX ? input->length - place : MATCH_MAX, longest = MATCH_MIN - 1;

    if (most < MATCH_MIN)
        return best;
    uint32_t candidate = newest[hash(input->data + place)];

    for (int tried = 0; candidate && place - (candidate - 1) < WINDOW && tried < CHAIN; tried++) {
        const uint8_t *one = input->data + candidate - 1, *two = input->data + place;
        size_t length = 0;

        while (length < most && one[length] == two[length])
            length++;
        if (length > longest) {
            longest = length;
            best = (struct symbol){(uint16_t)length, (uint16_t)(place - (candidate - 1))};
            if (length == most)
                break;
        }
        candidate = older[(candidate - 1) % WINDOW];
    }
    return best;
}

int main(void)
{
    static const uint8_t head[10] = {0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255}; /* deflate, no name, no time, any system */
    static struct symbol symbols[BLOCK];
    struct bytes input = read_input();
    size_t place = 0, count = 0;

    bytes_add(&output, head, sizeof(head));
    while (place < input.length) {
        struct symbol symbol = find(&input, place);
        size_t length = symbol.distance ? symbol.value : 1;

        symbols[count++] = symbol;
        while (length--)
            remember(&input, place++);
        if (count == BLOCK) {
            put_block(symbols, count, 0);
            count = 0;
        }
    }
    put_block(symbols, count, 1);
    put_bits(0, (8 - pending_count) % 8);
    put_uint32(crc32(input.data, input.length));
    put_uint32((uint32_t)input.length);
    write_output(output.data, output.length);
    return 0;
}
