/* SPDX-License-Identifier: Apache-2.0 */
#include "slot.h"

int escape_run(struct escape *escape, int (*body)(void *), void *argument);
__attribute__((noreturn)) void escape_leave(struct escape *escape, int status);

struct slot *slot_self(void)
{
    return tm_slot_data();
}

void slot_forget(struct slot *slot)
{
    arena_drop(&slot->arena);
    memset(slot->warm, 0, sizeof(slot->warm));
}

void slot_trim(struct slot *slot)
{
    /* Interrupted in the engine, and gone on with by nobody: the slot would have been reset. */
    tm_assert(!slot->escape);
    if (slot->arena.used > WARM_BYTES)
        slot_forget(slot);
}

void slot_begin(struct slot *slot, uint64_t budget)
{
    slot->arena.budget = slot->arena.used + budget;
    slot->arena.refused = 0;
}

int slot_engine(struct slot *slot, int (*body)(void *), void *argument, struct engine_text *why, uint32_t *refused)
{
    struct escape escape;
    int status;

    slot->escape = &escape;
    slot->why = why;
    status = escape_run(&escape, body, argument);
    slot->escape = NULL;
    slot->why = NULL;
    *refused = slot->arena.refused;
    if (status == -1)
        slot_forget(slot);
    return status;
}

void fn_escape(const uint8_t *text, size_t length)
{
    struct slot *slot = slot_self();
    struct engine_text *why = slot->why;

    tm_assert(slot->escape);
    why->length = (uint32_t)(length < sizeof(why->bytes) ? length : sizeof(why->bytes));
    memcpy(why->bytes, text, why->length);
    escape_leave(slot->escape, -1);
}

void *fn_alloc(size_t size, bool zeroed)
{
    return arena_alloc(&slot_self()->arena, size, zeroed);
}

void *fn_realloc(void *old, size_t old_size, size_t size)
{
    return arena_realloc(&slot_self()->arena, old, old_size, size);
}

void fn_free(void *memory, size_t size)
{
    arena_free(&slot_self()->arena, memory, size);
}

struct warm *slot_warm(struct slot *slot, uint64_t number)
{
    for (unsigned i = 0; i < WARM_MAX; i++)
        if (slot->warm[i].number == number)
            return &slot->warm[i];
    return NULL;
}

void slot_claim(struct slot *slot, const uint8_t owner[32], bool fits)
{
    bool some = false;

    for (unsigned i = 0; i < WARM_MAX; i++)
        some |= slot->warm[i].number && !memcmp(slot->warm[i].owner, owner, sizeof(slot->warm[i].owner));
    if (!some || !fits)
        slot_forget(slot);
}

void slot_make_room(struct slot *slot)
{
    if (!slot->warm[WARM_MAX - 1].number)
        return;
    engine_forget(slot->warm[0].prepared);
    memmove(slot->warm, slot->warm + 1, sizeof(slot->warm) - sizeof(slot->warm[0]));
    slot->warm[WARM_MAX - 1].number = 0;
}

void slot_keep(struct slot *slot, uint64_t number, void *prepared)
{
    for (unsigned i = 0; i < WARM_MAX; i++)
        if (!slot->warm[i].number) {
            slot->warm[i] = (struct warm){.number = number, .prepared = prepared};
            return;
        }
}

void slot_keep_ahead(struct slot *slot, uint64_t number, const uint8_t owner[32], void *prepared)
{
    struct warm *warm;

    slot_keep(slot, number, prepared);
    warm = slot_warm(slot, number);
    memcpy(warm->owner, owner, sizeof(warm->owner));
    warm->unused = true;
}

/* What rustc calls to compare for equality. */
int bcmp(const void *a, const void *b, size_t length);
int bcmp(const void *a, const void *b, size_t length)
{
    return memcmp(a, b, length);
}
