/* SPDX-License-Identifier: Apache-2.0 */
#include "table_inside.h"

struct table table;

static uint64_t rotate(uint64_t x, int bits)
{
    return x << bits | x >> (64 - bits);
}

struct sip {
    uint64_t a, b, c, d;
};

static void sip_round(struct sip *s)
{
    s->a += s->b;
    s->c += s->d;
    s->b = rotate(s->b, 13) ^ s->a;
    s->d = rotate(s->d, 16) ^ s->c;
    s->a = rotate(s->a, 32);
    s->c += s->b;
    s->a += s->d;
    s->b = rotate(s->b, 17) ^ s->c;
    s->d = rotate(s->d, 21) ^ s->a;
    s->c = rotate(s->c, 32);
}

static void sip_update(struct sip *s, const uint8_t *bytes, size_t length)
{
    while (length) {
        uint64_t word = 0;
        size_t some = length < 8 ? length : 8;

        for (size_t i = 0; i < some; i++)
            word |= (uint64_t)bytes[i] << (8 * i);
        s->d ^= word;
        sip_round(s);
        sip_round(s);
        s->a ^= word;
        bytes += some;
        length -= some;
    }
}

/* SipHash-2-4 (Aumasson, Bernstein 2012) over principal, space and length, and the key. */
static uint64_t sip_of(const struct place *place)
{
    struct sip s = {table.seed[0] ^ 0x736f6d6570736575ull, table.seed[1] ^ 0x646f72616e646f6dull,
                    table.seed[0] ^ 0x6c7967656e657261ull, table.seed[1] ^ 0x7465646279746573ull};
    uint64_t tail = (uint64_t)place->space << 16 | place->key_length;

    sip_update(&s, place->principal, sizeof(place->principal));
    sip_update(&s, place->key, place->key_length);
    sip_update(&s, (const uint8_t *)&tail, sizeof(tail));
    s.c ^= 0xff;
    for (int i = 0; i < 4; i++)
        sip_round(&s);
    return s.a ^ s.b ^ s.c ^ s.d;
}

uint64_t table_hash(const struct place *place)
{
    struct place whose = {.space = place->space};

    if (!table.limits)
        return sip_of(place);
    memcpy(whose.principal, place->principal, sizeof(whose.principal));
    return sip_of(place) / SHARDS * SHARDS + sip_of(&whose) % SHARDS;
}

int table_start(const struct table_limits *limits)
{
    const struct tm_image_header *image = (const void *)tm_enclave_base();
    struct entry **heads;
    struct tm_txn txn;
    uint64_t buckets = BUCKETS_MIN;

    if (table.heads)
        return 0; /* a warden died after this and tm_on_start() came again */
    /* A bucket for 8 KiB of heap: chains stay short, the table stays below a thousandth. */
    while (buckets < BUCKETS_MAX && buckets * SHARDS * 8192 < image->heap_size)
        buckets *= 2;
    heads = tm_alloc(buckets * SHARDS * sizeof(*heads));
    if (!heads)
        return TM_E_NOMEM;
    tm_random(table.seed, sizeof(table.seed));
    table.buckets = buckets;
    table.limits = limits;
    tm_txn_begin(&txn);
    tm_txn_keep(&txn, heads);
    tm_txn_set_ptr(&txn, &table.heads, heads);
    tm_txn_commit(&txn);
    return 0;
}

static struct shard *shard_of(uint64_t hash)
{
    return &table.shards[hash % SHARDS];
}

/* Buckets of one shard lie side by side. */
static struct entry **bucket_of(uint64_t hash)
{
    return &table.heads[hash % SHARDS * table.buckets + (hash / SHARDS & (table.buckets - 1))];
}

int shard_lock(struct shard *shard)
{
    int status = tm_lock(&shard->mutex);

    /* All changes are whole transactions: nothing to put right. */
    if (status == TM_E_OWNERDEAD) {
        tm_mutex_consistent(&shard->mutex);
        status = 0;
    }
    return status;
}

/* The link that points to the key's entry, or to where the chain ends. */
static struct entry **find(uint64_t hash, const struct place *place)
{
    struct entry **link = bucket_of(hash);

    for (; *link; link = &(*link)->next)
        if ((*link)->hash == hash && (*link)->key_length == place->key_length && is_at(*link, place) &&
            !memcmp((*link)->bytes, place->key, place->key_length))
            break;
    return link;
}

int table_read(const struct place *place, struct value *value, size_t offset, void *buffer, size_t room)
{
    uint64_t hash = table_hash(place);
    struct shard *shard = shard_of(hash);
    struct entry *entry;
    int status = shard_lock(shard);

    if (status)
        return status;
    entry = *find(hash, place);
    if (!entry || is_over(entry)) {
        status = VAULT_NOT_FOUND;
    } else {
        size_t left = offset < entry->value_length ? entry->value_length - offset : 0;

        *value = (struct value){
            .version = entry->version, .expires = entry->expires, .length = entry->value_length};
        memcpy(buffer, entry->bytes + entry->key_length + (left ? offset : 0), left < room ? left : room);
    }
    tm_unlock(&shard->mutex);
    return status;
}

static uint64_t size_of(const struct entry *entry)
{
    return entry ? sizeof(*entry) + entry->key_length + entry->value_length : 0;
}

/* The link that points to the principal's account, or to where the list ends. */
static struct account **account_of(struct shard *shard, const uint8_t principal[32])
{
    struct account **link = &shard->accounts;

    while (*link && memcmp((*link)->principal, principal, sizeof((*link)->principal)))
        link = &(*link)->next;
    return link;
}

/* Under the lock: may `fresh` come in the place of `old`? */
static bool fits(struct shard *shard, const struct entry *fresh, const struct entry *old)
{
    const struct account *account;
    struct table_usage usage = {0};
    uint64_t all = 0;

    if (!table.limits)
        return true;
    account = *account_of(shard, fresh->principal);
    if (account)
        usage = account->usage;
    for (unsigned i = 0; i < SHARDS; i++)
        all += *(volatile uint64_t *)&table.shards[i].bytes;
    return usage.keys + !old <= table.limits->keys &&
           usage.bytes + size_of(fresh) - size_of(old) <= table.limits->bytes &&
           all + size_of(fresh) - size_of(old) <= table.limits->all_bytes;
}

/*
 * A part of exchange(): *spare is an account for who has none, and becomes that of who has nothing any more.
 * Returns where the last version is that was given out.
 */
static uint64_t *account_for(struct tm_txn *txn, struct shard *shard, const struct entry *fresh, const struct entry *old,
                        struct account **spare)
{
    struct account **link = account_of(shard, (fresh ? fresh : old)->principal);
    struct account *account = *link;
    uint64_t keys;

    if (!account) {
        account = *spare;
        *spare = NULL;
        memcpy(account->principal, fresh->principal, sizeof(account->principal));
        /* Anywhere: who had something before must not see the same ones again. */
        tm_random(&account->version, sizeof(account->version));
        account->version >>= 16;
        tm_txn_keep(txn, account);
        tm_txn_set_ptr(txn, link, account);
    }
    keys = account->usage.keys + !!fresh - !!old;
#if defined(TM_TEST_COUNT_APART) /* Test build: it is counted before it happens. */
    account->usage.keys = keys;
    account->usage.bytes += size_of(fresh) - size_of(old);
#elif !defined(TM_TEST_NO_ACCOUNTS) /* Test build: nobody counts. */
    tm_txn_set(txn, &account->usage.keys, keys);
    tm_txn_set(txn, &account->usage.bytes, account->usage.bytes + size_of(fresh) - size_of(old));
    tm_txn_set(txn, &shard->bytes, shard->bytes + size_of(fresh) - size_of(old));
#endif
#ifdef TM_TEST_STAY_IN_CHANGE /* Test build: who would have so many keys stays here, to be killed. */
    while (keys == TM_TEST_STAY_IN_CHANGE)
        __asm__ volatile("pause");
#endif
    if (!keys) {
        tm_txn_set_ptr(txn, link, account->next);
        tm_txn_own(txn, account);
        *spare = account;
    }
    return &account->version;
}

/* Under the lock: put `fresh` (or nothing) where *link points, tell what was there. */
static void exchange(struct shard *shard, struct entry **link, struct entry *fresh, struct account **spare)
{
    struct entry *old = *link;
    uint64_t *version = &shard->version;
    struct tm_txn txn;

    tm_txn_begin(&txn);
    if (table.limits)
        version = account_for(&txn, shard, fresh, old, spare);
    if (fresh) {
        fresh->next = old ? old->next : NULL;
        fresh->version = *version + 1;
        tm_txn_set(&txn, version, fresh->version);
        tm_txn_keep(&txn, fresh);
        tm_txn_set_ptr(&txn, link, fresh);
    } else {
        tm_txn_set_ptr(&txn, link, old->next);
    }
    if (old)
        tm_txn_own(&txn, old);
    tm_txn_commit(&txn);
}

int table_put(const struct place *place, struct value *value, uint64_t *compare)
{
    uint64_t hash = table_hash(place);
    struct shard *shard = shard_of(hash);
    struct entry *fresh, *old, **link;
    struct account *spare = NULL;
    void *block;
    int status = tm_try_alloc(sizeof(*fresh) + place->key_length + value->length, &block);

    if (status)
        return status;
    fresh = block;
    if (table.limits) {
        status = tm_try_alloc(sizeof(*spare), &block);
        if (status) {
            tm_free(fresh);
            return status;
        }
        spare = block;
    }
    fresh->hash = hash;
    fresh->expires = value->expires;
    fresh->value_length = value->length;
    fresh->key_length = place->key_length;
    fresh->space = place->space;
    memcpy(fresh->principal, place->principal, sizeof(fresh->principal));
    memcpy(fresh->bytes, place->key, place->key_length);
    memcpy(fresh->bytes + place->key_length, value->bytes, value->length);
    status = shard_lock(shard);
    if (status)
        goto out;
    link = find(hash, place);
    old = *link;
    if (compare) {
        uint64_t present = old && !is_over(old) ? old->version : 0;

        if (present != *compare) {
            *compare = present;
            status = VAULT_CHANGED;
        }
    }
    if (!status && !fits(shard, fresh, old))
        status = VAULT_FULL;
    if (!status) {
        exchange(shard, link, fresh, &spare);
        value->version = fresh->version;
        fresh = old; /* what is to be freed now */
    }
    tm_unlock(&shard->mutex);
out:
    tm_free(fresh);
    tm_free(spare);
    return status;
}

int table_delete(const struct place *place)
{
    uint64_t hash = table_hash(place);
    struct shard *shard = shard_of(hash);
    struct account *spare = NULL;
    struct entry *old, **link;
    bool over;
    int status = shard_lock(shard);

    if (status)
        return status;
    link = find(hash, place);
    old = *link;
    over = !old || is_over(old);
    if (old)
        exchange(shard, link, NULL, &spare);
    tm_unlock(&shard->mutex);
    tm_free(old);
    tm_free(spare);
    return over ? VAULT_NOT_FOUND : 0;
}

int table_usage(const struct place *place, struct table_usage *usage)
{
    struct shard *shard = shard_of(table_hash(place));
    const struct account *account;
    int status = shard_lock(shard);

    if (status)
        return status;
    account = *account_of(shard, place->principal);
    *usage = account ? account->usage : (struct table_usage){0};
    tm_unlock(&shard->mutex);
    return 0;
}

int table_clear(const struct place *place)
{
    uint64_t number = table_hash(place) % SHARDS;
    struct shard *shard = &table.shards[number];

    for (uint64_t bucket = 0; bucket < table.buckets; bucket++) {
        struct entry **link = &table.heads[number * table.buckets + bucket];
        int status = shard_lock(shard);

        if (status)
            return status;
        while (*link) {
            struct account *spare = NULL;
            struct entry *old = *link;

            if (!is_at(old, place)) {
                link = &old->next;
                continue;
            }
            exchange(shard, link, NULL, &spare);
            tm_free(old);
            tm_free(spare);
        }
        tm_unlock(&shard->mutex);
    }
    return 0;
}

uint64_t table_version(void)
{
    uint64_t version = 0;

    for (size_t i = 0; i < SHARDS; i++) {
        if (table.shards[i].version > version)
            version = table.shards[i].version;
    }
    return version;
}

int table_raise(uint64_t version)
{
    for (size_t i = 0; i < SHARDS; i++) {
        struct shard *shard = &table.shards[i];
        int status = shard_lock(shard);

        if (status)
            return status;
        if (shard->version < version) {
            struct tm_txn txn;

            tm_txn_begin(&txn);
            tm_txn_set(&txn, &shard->version, version);
            tm_txn_commit(&txn);
        }
        tm_unlock(&shard->mutex);
    }
    return 0;
}
