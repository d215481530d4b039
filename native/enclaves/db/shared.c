/* SPDX-License-Identifier: Apache-2.0 */
#include "shared.h"

#define TIE_SPINS 2000u

static struct tm_mutex list_mutex;
static struct database *list;

static int lock(struct tm_mutex *mutex)
{
    int status = tm_lock(mutex);

    /* Everything under these is one tm_txn: right before and after it. */
    if (status == TM_E_OWNERDEAD) {
        tm_mutex_consistent(mutex);
        status = 0;
    }
    return status;
}

static struct database *find(const char *name)
{
    struct database *database = __atomic_load_n(&list, __ATOMIC_ACQUIRE);

    while (database && strcmp(database->name, name))
        database = database->next;
    return database;
}

struct database *database_known(const char *name)
{
    return find(name);
}

bool database_is(const struct database *database, const char *name)
{
    return !strcmp(database->name, name);
}

const struct root *database_root(const struct database *database)
{
    return &database->roots[database->root % 2];
}

void database_wipe(struct database *database)
{
    database->ready = 0;
    database->root = 0;
    database->frames_needed = 0;
    memset(database->roots, 0, sizeof(database->roots));
    for (uint32_t index = 0; index < REGIONS_MOST; index++)
        if (database->regions[index])
            memset(database->regions[index], 0, REGION_SIZE);
    for (enum file_kind kind = 0; kind < FILE_KINDS; kind++) {
        for (uint32_t chunk = 0; chunk < CHUNKS_MOST; chunk++)
            if (database->files[kind].tags[chunk])
                memset(database->files[kind].tags[chunk], 0, TAGS_IN_CHUNK * sizeof(uint64_t));
        database->files[kind].records = 0;
        database->files[kind].cut = 0;
        for (uint32_t slot = 0; slot < SLOTS_MOST; slot++)
            database->pending[kind][slot].count = 0;
        for (uint32_t word = 0; word < SLOTS_MOST / 64; word++)
            database->writing[kind][word] = 0;
    }
}

/*
 * Under the list's mutex: one that has no database and nobody at it, for another name.  Else everybody who asks for
 * names that there are not would take memory that never comes back.
 */
static struct database *reuse(const char *name)
{
    struct database *database = list, *found = NULL;
    uint64_t words[sizeof(database->name_words) / 8] = {0};
    struct tm_txn txn;

    memcpy(words, name, strlen(name));
    for (; database && !found; database = database->next) {
        uint64_t others = HOLDS_SETUP | HOLDS_OPEN;

        if (database->ready || database_holds(database) || database_held(database, others) ||
            !database_hold(database, HOLDS_SETUP, others))
            continue;
        if (!database->ready) {
            database_wipe(database);
            tm_txn_begin(&txn);
            for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++)
                tm_txn_set(&txn, &database->name_words[i], words[i]);
            tm_txn_commit(&txn);
            found = database;
        }
        database_drop(database, HOLDS_SETUP);
    }
    return found;
}

int database_find(const char *name, struct database **database)
{
    struct database *new = NULL;
    struct tm_txn txn;
    int status;

    *database = find(name);
    if (*database)
        return 0;
    /* Before the lock: while one is held the heap's is not waited for.  Without memory there may be one to take over. */
    status = tm_try_alloc(sizeof(*new), (void **)&new);
    if (lock(&list_mutex)) {
        tm_free(new);
        return TM_E_BUSY;
    }
    *database = find(name);
    if (!*database)
        *database = reuse(name);
    if (!*database && new) {
        memcpy(new->name, name, strlen(name));
        new->next = list;
        tm_txn_begin(&txn);
        tm_txn_keep(&txn, new);
        tm_txn_set_ptr(&txn, &list, new);
        tm_txn_commit(&txn);
        *database = new;
        new = NULL;
    }
    tm_unlock(&list_mutex);
    tm_free(new);
    return *database ? 0 : status;
}

void databases_forget(uint32_t slot)
{
    struct database *database = __atomic_load_n(&list, __ATOMIC_ACQUIRE);

    for (; database; database = database->next)
        database->words[slot] = 0;
}

/* ---- locks ------------------------------------------------------------------- */

static _Atomic uint64_t *word(const struct database *database)
{
    return (_Atomic uint64_t *)&database->words[thread_self()->fixed.index];
}

uint64_t database_holds(const struct database *database)
{
    return *word(database);
}

bool database_held(const struct database *database, uint64_t bits)
{
    uint32_t count = slot_count(), self = (uint32_t)thread_self()->fixed.index;

    for (uint32_t slot = 0; slot < count; slot++)
        if (slot != self && database->words[slot] & bits)
            return true;
    return false;
}

bool database_hold(struct database *database, uint64_t bits, uint64_t against)
{
    uint32_t count = slot_count(), self = (uint32_t)thread_self()->fixed.index;
    uint64_t before = *word(database);

    *word(database) = before | bits; /* a full barrier: what is read below is read after it */
    for (uint32_t slot = 0; slot < count; slot++) {
        uint32_t spins = 0;

        if (slot == self)
            continue;
        /* Both of two may find the other on the way: the one with the higher number goes back at once. */
        while (database->words[slot] & against && slot > self && spins++ < TIE_SPINS)
            __builtin_ia32_pause();
        if (database->words[slot] & against) {
            *word(database) = before;
            return false;
        }
    }
    return true;
}

void database_drop(struct database *database, uint64_t bits)
{
    *word(database) &= ~bits;
}

/* ---- what is added -------------------------------------------------------------- */

/* A block of zeros for *place, once, whoever comes first. */
static int add(struct database *database, void *place, size_t size)
{
    struct tm_txn txn;
    void *block;
    int status = tm_try_alloc(size, &block);

    if (status)
        return status;
    status = lock(&database->mutex);
    if (!status) {
        if (!*(void **)place) {
            tm_txn_begin(&txn);
            tm_txn_keep(&txn, block);
            tm_txn_set_ptr(&txn, place, block);
            tm_txn_commit(&txn);
            block = NULL;
        }
        tm_unlock(&database->mutex);
    }
    tm_free(block);
    return status;
}

int database_region(struct database *database, uint32_t index, bool make, void **region)
{
    int status = 0;

    *region = NULL;
    if (index >= REGIONS_MOST)
        return TM_E_NOMEM;
    if (!database->regions[index] && make)
        status = add(database, &database->regions[index], REGION_SIZE);
    *region = __atomic_load_n(&database->regions[index], __ATOMIC_ACQUIRE);
    return status;
}

/* ---- freshness ------------------------------------------------------------------- */

static uint64_t *tag_of(struct database *database, enum file_kind kind, uint64_t record)
{
    uint64_t *chunk = NULL;

    if (record < (uint64_t)TAGS_IN_CHUNK * CHUNKS_MOST)
        chunk = __atomic_load_n(&database->files[kind].tags[record / TAGS_IN_CHUNK], __ATOMIC_ACQUIRE);
    return chunk ? &chunk[record % TAGS_IN_CHUNK] : NULL;
}

int known_reserve(struct database *database, enum file_kind kind, uint64_t record)
{
    if (record >= (uint64_t)TAGS_IN_CHUNK * CHUNKS_MOST)
        return TM_E_NOMEM;
    if (tag_of(database, kind, record))
        return 0;
    return add(database, &database->files[kind].tags[record / TAGS_IN_CHUNK], TAGS_IN_CHUNK * sizeof(uint64_t));
}

uint64_t known_tag(struct database *database, enum file_kind kind, uint64_t record)
{
    uint64_t *known = tag_of(database, kind, record);

    return known ? __atomic_load_n(known, __ATOMIC_SEQ_CST) : 0;
}

bool known_is_right(struct database *database, enum file_kind kind, uint64_t record, uint64_t tag)
{
    uint64_t value = known_tag(database, kind, record);
    uint32_t count = slot_count();

#ifdef DB_TEST_NO_FRESHNESS
    /* Test build: any record that was once right is. */
    return true;
#endif
    if (!value || value == tag)
        return true;
    for (uint32_t slot = 0; slot < count; slot++) {
        const struct pending *pending = &database->pending[kind][slot];
        uint64_t some = pending->count;

        if (record - pending->first < some &&
            __atomic_load_n(&pending->tags[record - pending->first], __ATOMIC_SEQ_CST) == tag)
            return true;
    }
    return false;
}

static bool is_pending(const struct pending *pending, uint64_t record)
{
    uint64_t place = record - pending->first;

    return place < pending->count && __atomic_load_n(&pending->tags[place], __ATOMIC_SEQ_CST);
}

bool known_is_settled(struct database *database, enum file_kind kind, uint64_t record, uint64_t tag)
{
    const struct known_file *file = &database->files[kind];
    uint64_t cut = file->cut;

    if (record >= file->records || (cut && record >= cut - 1) || known_tag(database, kind, record) != tag)
        return false;
    for (uint32_t word = 0; word < SLOTS_MOST / 64; word++)
        for (uint64_t slots = database->writing[kind][word]; slots; slots &= slots - 1)
            if (is_pending(&database->pending[kind][word * 64 + (uint32_t)__builtin_ctzll(slots)], record))
                return false;
    return true;
}

void known_writing(struct database *database, enum file_kind kind)
{
    uint64_t index = thread_self()->fixed.index;

    database->writing[kind][index / 64] |= 1ull << index % 64;
}

void known_written(struct database *database, enum file_kind kind, uint32_t slot)
{
    database->pending[kind][slot].count = 0;
    database->writing[kind][slot / 64] &= ~(1ull << slot % 64);
}

bool known_is_left_open(const struct database *database, enum file_kind kind, uint32_t *slot)
{
    for (uint32_t word = 0; word < SLOTS_MOST / 64; word++) {
        uint64_t slots = database->writing[kind][word];

        *slot = word * 64 + (slots ? (uint32_t)__builtin_ctzll(slots) : 0);
        if (slots)
            return true;
    }
    return false;
}

bool known_is_unknown(struct database *database, enum file_kind kind, uint64_t record)
{
    return !known_tag(database, kind, record);
}

bool known_first(struct database *database, enum file_kind kind, uint64_t record, uint64_t tag)
{
    uint64_t *known = tag_of(database, kind, record), nothing = 0;

    return !known ||
           __atomic_compare_exchange_n(known, &nothing, tag, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) ||
           nothing == tag;
}

void known_set(struct database *database, enum file_kind kind, uint64_t record, uint64_t tag)
{
    uint64_t *known = tag_of(database, kind, record);

    if (known)
        __atomic_store_n(known, tag, __ATOMIC_SEQ_CST);
}

void known_cut(struct database *database, enum file_kind kind, uint64_t count)
{
    for (uint64_t record = count; record < database->files[kind].records; record++)
        known_set(database, kind, record, 0);
    database->files[kind].records = count;
}
