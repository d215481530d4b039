/* SPDX-License-Identifier: Apache-2.0 */
#include "memory.h"

#define FINE_MOST 1024u    /* up to here classes lie 16 bytes apart */
#define FINE_CLASSES 64u
#define STEPS 8u           /* beyond: so many to a power of two */
#define SMALL_MOST 65536u  /* and beyond that blocks of the heap */
#define CHUNK_FIRST 65536u
#define CHUNK_MOST (256u << 10)
_Static_assert(FINE_CLASSES + 6 * STEPS == MEMORY_CLASSES, "1 KiB to 64 KiB are six powers");

struct chunk {
    struct chunk *next, **before; /* how we are reached */
    uint64_t size;
    uint64_t reserved;
};

/* Before every block: how many bytes it has. */
struct head {
    uint64_t size;
};

static struct memory *mine(void)
{
    return &local_self()->memory;
}

static uint64_t round_size(uint64_t size, unsigned *class)
{
    unsigned power, step;

    if (size <= FINE_MOST) {
        size = size ? (size + 15) & ~15ull : 16;
        *class = (unsigned)(size / 16 - 1);
        return size;
    }
    power = 63u - (unsigned)__builtin_clzll(size - 1); /* 2^power < size, or = */
    step = (unsigned)((size - 1) >> (power - 3)) & (STEPS - 1);
    *class = FINE_CLASSES + (power - 10) * STEPS + step;
    return ((uint64_t)(STEPS + step + 1)) << (power - 3);
}

/* A block of the heap, within the limit. */
static void *take(struct memory *memory, uint64_t size)
{
    struct chunk *chunk;

    memory->heap_full = false;
    if (size + sizeof(*chunk) > memory->limit - memory->used)
        return NULL;
    chunk = tm_alloc(size + sizeof(*chunk));
    if (!chunk) {
        memory->heap_full = true;
        return NULL;
    }
    chunk->size = size + sizeof(*chunk);
    chunk->next = memory->chunks;
    chunk->before = &memory->chunks;
    if (chunk->next)
        chunk->next->before = &chunk->next;
    memory->chunks = chunk;
    memory->used += chunk->size;
    if (memory->used > memory->most)
        memory->most = memory->used;
    return chunk + 1;
}

static void give(struct memory *memory, void *data)
{
    struct chunk *chunk = (struct chunk *)data - 1;

    *chunk->before = chunk->next;
    if (chunk->next)
        chunk->next->before = chunk->before;
    memory->used -= chunk->size;
    tm_free(chunk);
}

/* A new chunk half as large as all so far; what is left of the last one is lost to larger blocks only. */
static void *cut(struct memory *memory, uint64_t size)
{
    uint64_t room = memory->used / 2 < CHUNK_FIRST ? CHUNK_FIRST : memory->used / 2;
    void *result;

    if ((uint64_t)(memory->end - memory->next) < size) {
        uint64_t left = memory->limit - memory->used;

        room = room < CHUNK_MOST ? room : CHUNK_MOST;
        room = room + sizeof(struct chunk) <= left ? room : left > sizeof(struct chunk) ? (left - sizeof(struct chunk)) & ~15ull : 0;
        memory->heap_full = false;
        if (room < size || !(memory->next = take(memory, room))) {
            memory->end = memory->next;
            return NULL;
        }
        memory->end = memory->next + room;
    }
    result = memory->next;
    memory->next += size;
    return result;
}

/* At the limit: a free block that is larger than it need be.  What a large statement has left is so of use to small ones. */
static struct head *larger(struct memory *memory, unsigned class)
{
    while (++class < MEMORY_CLASSES) {
        struct head *head = memory->free[class];

        if (head) {
            memory->free[class] = *(void **)(head + 1);
            return head;
        }
    }
    return NULL;
}

static void *memory_malloc(int wanted)
{
    struct memory *memory = mine();
    uint64_t size = (uint64_t)wanted + sizeof(struct head);
    struct head *head;
    unsigned class;

    if (wanted < 0)
        return NULL;
    if (size > SMALL_MOST) {
        size = (size + 15) & ~15ull;
        head = take(memory, size);
    } else {
        size = round_size(size, &class);
        head = memory->free[class];
        if (head)
            memory->free[class] = *(void **)(head + 1);
        else if (!(head = cut(memory, size)) && (head = larger(memory, class)))
            return head + 1;
    }
    if (!head)
        return NULL;
    head->size = size - sizeof(*head);
    return head + 1;
}

static void memory_free(void *data)
{
    struct memory *memory = mine();
    struct head *head = (struct head *)data - 1;
    uint64_t size = head->size + sizeof(*head);
    unsigned class;

    if (size > SMALL_MOST) {
        give(memory, head);
        return;
    }
    round_size(size, &class);
    *(void **)data = memory->free[class];
    memory->free[class] = head;
}

static int memory_size(void *data)
{
    return data ? (int)((struct head *)data - 1)->size : 0;
}

static int memory_round(int size)
{
    unsigned class;

    if ((uint64_t)size + sizeof(struct head) > SMALL_MOST)
        return (int)(((uint64_t)size + sizeof(struct head) + 15) & ~15ull) - (int)sizeof(struct head);
    return (int)(round_size((uint64_t)size + sizeof(struct head), &class) - sizeof(struct head));
}

static void *memory_realloc(void *old, int size)
{
    void *new;

    if (memory_round(size) == memory_size(old))
        return old;
    new = memory_malloc(size);
    if (!new)
        return NULL;
    memcpy(new, old, (size_t)(memory_size(old) < size ? memory_size(old) : size));
    memory_free(old);
    return new;
}

static int memory_init(void *unused)
{
    (void)unused;
    return SQLITE_OK;
}

static void memory_shutdown(void *unused)
{
    (void)unused;
}

const sqlite3_mem_methods memory_methods = {
    .xMalloc = memory_malloc,
    .xFree = memory_free,
    .xRealloc = memory_realloc,
    .xSize = memory_size,
    .xRoundup = memory_round,
    .xInit = memory_init,
    .xShutdown = memory_shutdown,
};

void memory_close(struct memory *memory)
{
    while (memory->chunks)
        give(memory, memory->chunks + 1);
    memset(memory->free, 0, sizeof(memory->free));
    memory->next = memory->end = NULL;
}
