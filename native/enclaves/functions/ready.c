/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Modules that are made ready in a slot which waits for its next holder, so that who starts a function that others have
 * just started finds it compiled.  Nobody knows who that will be: it is the functions that start most often now
 * (popular.h), whoever owns them.  As ever a module is found by its owner's name only, so what is ready here of other
 * owners' is memory that the slot's holder cannot get at; it goes when none of it is his (slot_claim), or with
 * the slot.
 *
 * A warden does it (tm_on_slot_armed), so it is short: modules whose preparing takes no more effort than a usual one of
 * REGISTRY_EFFORT_MAX bytes, EFFORT_SLOT in all, about 1 ms for each 64 KiB.  And it is little: READY_BYTES for each, and
 * for all slots together FN_READY_SHARE of the heap, as long as the heap has plenty.  What is more than that, or makes the
 * engine give up, or was being prepared when two wardens died one after the other, is left for its first invocation
 * from then on.  One death says little: wardens are killed from outside, and end with their broker.
 */
#include "functions.h"
#include "popular.h"
#include "registry.h"
#include "slot.h"

#define EFFORT_SLOT (2 * REGISTRY_EFFORT_MAX)
#define READY_BYTES (256u << 10)

/* The place of what a warden prepares; when the next one finds it still there, it died of that perhaps. */
static _Atomic uint64_t under_way;

struct preparation {
    const uint8_t *module;
    struct registry_ahead function;
    struct engine_text text;
};

static int prepare(void *argument)
{
    struct preparation *it = argument;
    void *prepared;

#ifdef TM_TEST_READY_TROUBLE
    /*
     * Test build: the engine gives up or faults, or a warden stays here to be killed, always or the first time only, by
     * the length of the module.
     */
    static unsigned stayed;
    uint64_t trouble = it->function.length % 5;

    if (trouble == 0)
        fn_escape(it->text.bytes, 0);
    tm_assert(trouble != 1);
    if (trouble == 2 || (trouble == 3 && !stayed++))
        for (;;)
            __asm__ volatile("pause");
#endif
    prepared = engine_prepare(it->module, it->function.length, it->function.grants, &it->text);
    if (!prepared)
        return FN_CRASHED;
    slot_keep_ahead(slot_self(), it->function.number, it->function.owner, prepared);
    return 0;
}

static bool has_room(void)
{
    const volatile struct tm_image_header *image = tm_enclave_base();

    return share_ready_sum().bytes + slot_self()->arena.used + READY_BYTES <= image->heap_size / FN_READY_SHARE &&
           tm_heap_room() >= image->heap_size / FN_READY_FREE;
}

/*
 * The module is read without the lock, for which others would wait: while the deployment is there nobody changes it,
 * and its number is never given again.
 */
static bool copy(uint64_t place, struct preparation *it, uint8_t *to)
{
    struct registry_ahead now;

    memcpy(to, it->function.module, it->function.length);
    it->module = to;
    return !registry_find(place, &now);
}

/* Not what is there no more, either: the starts of what was replaced are not those of its successor. */
static bool could_be_ready(uint64_t place)
{
    struct registry_ahead function;

    return !registry_find(place, &function) && function.effort <= REGISTRY_EFFORT_MAX;
}

/* false: not now, and nothing else either. */
static bool make_ready(uint64_t place, uint64_t *effort)
{
    struct slot *slot = slot_self();
    struct preparation it = {0};
    uint32_t refused = 0;
    int status = registry_find(place, &it.function);
    void *block;

    if (status)
        return status == FN_NOT_FOUND;
    if (it.function.effort > REGISTRY_EFFORT_MAX || it.function.effort > *effort)
        return true;
    if (!has_room() || share_alloc(it.function.length, &block))
        return false;
    *effort -= it.function.effort;
    if (copy(place, &it, block)) {
        under_way = place;
        slot_begin(slot, READY_BYTES);
        status = slot_engine(slot, prepare, &it, &it.text, &refused);
        under_way = 0;
        if (status && !(refused & ~ARENA_OVER_BUDGET))
            registry_spoil(place);
        else if (!status && it.function.suspect)
            registry_suspect(place, false);
    }
    share_free(block, it.function.length);
    return !status;
}

bool tm_on_slot_armed(uint32_t index)
{
    uint64_t places[POPULAR_MAX], effort = EFFORT_SLOT;
    unsigned count;

    (void)index;
#ifdef TM_TEST_NOTHING_READY
    /* Test build: who starts first compiles. */
    return false;
#endif
    if (under_way) {
        uint64_t place = under_way;

        under_way = 0;
        registry_suspect(place, true);
    }
    count = popular_now(could_be_ready, places);
    if (!count)
        return false;
    share_ahead();
    for (unsigned i = 0; i < count && make_ready(places[i], &effort); i++)
        ;
    share_ready(&slot_self()->arena);
    return true;
}
