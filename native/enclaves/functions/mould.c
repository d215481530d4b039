/* SPDX-License-Identifier: Apache-2.0 */
#include "mould.h"

#include "slot.h"

/* For what making a module ready allocates, all of it, once: of small ones, and for each byte of others. */
#define ROOM (128u << 10)
#define ROOM_FACTOR 16u
/* What is kept at most: a slot keeps no more ready than this (slot.h). */
#define MOULD_MAX (WARM_BYTES / 2)
#define WORD sizeof(uint64_t)

/*
 * How far apart the two are is a multiple of this and this: none of the three low bytes of an address is the same
 * in both.  So a word of which one of these bytes is a number is never taken for a pointer, whatever is left over of one in the
 * bytes beside it, which a module's author may know.
 */
#define APART 0x10000u
#define APART_ODD 0x0110u

/* Of the stack, while a module is made ready; of 256 KiB. */
#define STACK_USED (128u << 10)
/* So many engines may be made by other slots between our two. */
#define NUMBERS_APART 256u

/* A piece that is in use: where it was, and where it comes to lie. */
struct place {
    uint64_t from, size, to;
};

struct making {
    const uint8_t *module;
    size_t length;
    uint32_t grants;
    struct region first, second;
    uint64_t distance;
    uint8_t *root;
    struct place *places;
    size_t count;
    /* The engine numbers its instances; each number is in many words. */
    bool numbered;
    uint32_t number_first, number_second;
};

size_t mould_size(const struct mould *mould)
{
    return sizeof(*mould) + mould->length + (mould->length / WORD + 63) / 64 * WORD;
}

struct preparing {
    struct making *making;
    void *prepared;
    struct engine_text why;
};

static int prepare(void *argument)
{
    struct preparing *it = argument;

    it->prepared = engine_prepare(it->making->module, it->making->length, it->making->grants, &it->why);
    return it->prepared ? 0 : 1;
}

/* So that what is left over there is the same for both: it gets into what values do not use of themselves. */
static __attribute__((noinline)) void wipe_stack(void)
{
    uint8_t below[STACK_USED];

    tm_wipe(below, sizeof(below));
}

/* Make the module ready with all that is allocated in `region`. */
static uint8_t *prepare_in(struct making *making, struct region *region)
{
    struct preparing it = {.making = making};
    struct slot *slot = slot_self();
    uint32_t refused;
    int status;

    wipe_stack();
    slot->arena.region = region;
    status = slot_engine(slot, prepare, &it, &it.why, &refused);
    slot->arena.region = NULL;
    return status ? NULL : it.prepared;
}

/* ---- what is in use, and where it goes ------------------------------------------------ */

/* Both regions alike, or it is not understood. */
static bool list_places(struct making *making)
{
    const uint8_t *at = making->first.start;
    uint64_t to = 0;

    if (making->first.next - making->first.start != making->second.next - making->second.start)
        return false;
    while (at < making->first.next) {
        const struct piece *piece = (const struct piece *)at;
        const struct piece *other = (const struct piece *)(at + making->distance);

        if (piece->size != other->size || piece->used != other->used)
            return false;
        at = (const uint8_t *)(piece + 1);
        if (piece->used) {
            making->places[making->count++] = (struct place){(uint64_t)at, piece->size, to};
            to += (piece->size + 15) & ~15ull;
        }
        at += (piece->size + 15) & ~15ull;
    }
    return making->count != 0;
}

/* Where `address` will be; false when it is in nothing that is used. */
static bool moved(const struct making *making, uint64_t address, uint64_t *to)
{
    size_t low = 0, high = making->count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct place *place = &making->places[middle];

        if (address < place->from)
            high = middle;
        else if (address - place->from > place->size) /* the end of one belongs to it */
            low = middle + 1;
        else {
            *to = place->to + (address - place->from);
            return true;
        }
    }
    return false;
}

/* ---- words ------------------------------------------------------------------------------ */

/* Bytes `from` to `end` of an unaligned word. */
static uint64_t part(const uint8_t *word, unsigned from, unsigned end)
{
    uint64_t value = 0;

    memcpy(&value, word + from, end - from);
    return value;
}

/*
 * Is this byte, which differs, of an address that is left over?  What is not written to of a value has what was there before,
 * on the stack where it was made: an address of either region, at any place, with numbers over its first bytes or
 * its last.
 */
static bool is_left_over(const struct making *making, const uint8_t *bytes, uint64_t size, uint64_t at)
{
    uint64_t start = (uint64_t)making->first.start;

    for (uint64_t word = at < 7 ? 0 : at - 7; word <= at; word++)
        for (unsigned from = 0; from <= at - word; from++)
            for (unsigned end = size - word < 8 ? (unsigned)(size - word) : 8; end > at - word && end >= from + 2; end--) {
                uint64_t mask = ~0ull >> (64 - 8 * (end - from)), apart = making->distance >> 8 * from;
                uint64_t first = part(bytes + word, from, end), second = part(bytes + making->distance + word, from, end);
                uint64_t differ = (second - first) & mask;

                if ((differ == (apart & mask) || differ == ((apart + 1) & mask)) &&
                    ((first - (start >> 8 * from)) & mask) <= apart + 1)
                    return true;
            }
    return false;
}

/* Or of the number of an engine, of which each has another? */
static bool is_number(struct making *making, const uint8_t *bytes, uint64_t size, uint64_t at)
{
    for (uint64_t from = at < 3 ? 0 : at - 3; from <= at && from + 4 <= size; from++) {
        uint32_t first = (uint32_t)part(bytes + from, 0, 4);
        uint32_t second = (uint32_t)part(bytes + making->distance + from, 0, 4);

        if (!making->numbered && from % 4 == 0 && second - first - 1 < NUMBERS_APART) {
            making->numbered = true;
            making->number_first = first;
            making->number_second = second;
        }
        if (making->numbered && first == making->number_first && second == making->number_second)
            return true;
    }
    return false;
}

/* What is no pointer is the same for both, or has no meaning. */
static bool is_understood(struct making *making, const uint8_t *bytes, uint64_t size, uint64_t from, uint64_t end)
{
    for (uint64_t at = from; at < end; at++)
        if (bytes[at] != bytes[making->distance + at] && !is_number(making, bytes, size, at) &&
            !is_left_over(making, bytes, size, at))
            return false;
    return true;
}

static bool copy_place(struct making *making, const struct place *place, struct mould *mould)
{
    uint8_t *to = (uint8_t *)(mould + 1);
    uint64_t *bits = (uint64_t *)(to + mould->length);
    const uint8_t *bytes = (const uint8_t *)place->from;
    uint64_t at = 0;

    memcpy(to + place->to, bytes, place->size);
    for (; at + WORD <= place->size; at += WORD) {
        uint64_t first = part(bytes + at, 0, 8), second = part(bytes + making->distance + at, 0, 8);
        uint64_t index = (place->to + at) / WORD, offset;

        if (first == second)
            continue;
        /* One to what was freed is left over. */
        if (second - first == making->distance && moved(making, first, &offset)) {
            ((uint64_t *)to)[index] = offset;
            bits[index / 64] |= 1ull << index % 64;
        } else if (!is_understood(making, bytes, place->size, at, at + WORD)) {
            return false;
        }
    }
    return is_understood(making, bytes, place->size, at, place->size);
}

static struct mould *fill(struct making *making)
{
    const struct place *last = &making->places[making->count - 1];
    struct mould head = {.length = last->to + ((last->size + 15) & ~15ull)}, *mould;
    void *block;

    if (mould_size(&head) > MOULD_MAX || !moved(making, (uint64_t)making->root, &head.root) ||
        share_alloc(mould_size(&head), &block))
        return NULL;
    mould = block;
    *mould = head;
    for (size_t i = 0; i < making->count; i++)
        if (!copy_place(making, &making->places[i], mould)) {
            tm_free(mould);
            return NULL;
        }
    return mould;
}

/* ---- both ------------------------------------------------------------------------------- */

static size_t count_pieces(const struct region *region)
{
    size_t count = 0;

    for (const uint8_t *at = region->start; at < region->next; count++)
        at += sizeof(struct piece) + ((((const struct piece *)at)->size + 15) & ~15ull);
    return count;
}

struct mould *mould_make(const uint8_t *module, size_t length, uint32_t grants)
{
    struct making making = {.module = module, .length = length, .grants = grants};
    struct mould *mould = NULL;
    void *block, *places;
    uint8_t *root;

    making.distance = ((ROOM + ROOM_FACTOR * length) / APART | 1) * APART + APART_ODD;
    if (share_alloc(2 * making.distance, &block))
        return NULL;
    making.first.start = making.first.next = block;
    making.first.end = making.first.start + making.distance;
    making.second.start = making.second.next = making.first.end;
    making.second.end = making.second.start + making.distance;
    making.root = prepare_in(&making, &making.first);
    root = making.root ? prepare_in(&making, &making.second) : NULL;
    if (root && root - making.root == (ptrdiff_t)making.distance &&
        !share_alloc(count_pieces(&making.first) * sizeof(struct place), &places)) {
        making.places = places;
        if (list_places(&making))
            mould = fill(&making);
        tm_free(places);
    }
    tm_free(block);
    return mould;
}

void *mould_cast(struct mould *copy)
{
    uint8_t *bytes = (uint8_t *)(copy + 1);
    const uint64_t *bits = (const uint64_t *)(bytes + copy->length);
    size_t count = (copy->length / WORD + 63) / 64;

    for (size_t i = 0; i < count; i++)
        for (uint64_t left = bits[i]; left; left &= left - 1)
            ((uint64_t *)bytes)[64 * i + (uint64_t)__builtin_ctzll(left)] += (uint64_t)bytes;
    return bytes + copy->root;
}
