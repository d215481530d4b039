/* SPDX-License-Identifier: Apache-2.0 */
#include "registry.h"

#include "arena.h"
#include "popular.h"

#define BUCKETS 256u

struct log {
    struct log *next; /* newer */
    struct fn_log head;
    uint8_t text[];
};

struct function {
    struct function *next;
    struct fn_info info;
    uint64_t number; /* no other deployment in this enclave has it */
    uint64_t effort; /* of preparing it; UINT64_MAX: not ahead of an invocation */
    bool suspect;    /* the last warden that did so ahead died */
    struct log *oldest, *newest;
    uint64_t log_count, log_bytes;
    uint8_t *module; /* a kept block: never changed, since code that was validated runs unchecked */
    uint8_t name[FN_NAME_MAX + 1];
    uint8_t env[];
};

static struct {
    struct tm_mutex mutex;
    uint64_t number; /* the last that was given out */
    struct function *heads[BUCKETS];
} registry;

static uint64_t heap_share(uint64_t part)
{
    return ((const volatile struct tm_image_header *)tm_enclave_base())->heap_size / part;
}

uint64_t registry_memory_max(void)
{
    return heap_share(FN_MEMORY_SHARE) & ~65535ull;
}

static int lock(void)
{
    int status = tm_lock(&registry.mutex);

    /* All changes are whole transactions: nothing to put right. */
    if (status == TM_E_OWNERDEAD) {
        tm_mutex_consistent(&registry.mutex);
        status = 0;
    }
    return status;
}

static void unlock(void)
{
    tm_unlock(&registry.mutex);
}

/* FNV-1a: who makes names collide has few names, and slows nobody down by more than those. */
static struct function **bucket_of(const struct registry_key *key)
{
    uint32_t hash = 2166136261u;

    for (unsigned i = 0; i < sizeof(key->owner); i++)
        hash = (hash ^ key->owner[i]) * 16777619u;
    for (uint32_t i = 0; i < key->name_length; i++)
        hash = (hash ^ key->name[i]) * 16777619u;
    return &registry.heads[hash % BUCKETS];
}

/* Where popular.c finds it again. */
static uint64_t place_of(const struct registry_key *key, const struct function *function)
{
    return function->number * BUCKETS + (uint64_t)(bucket_of(key) - registry.heads);
}

static bool owns(const struct function *function, const uint8_t owner[32])
{
#ifdef TM_TEST_NO_OWNERS
    /* Test build: everybody's functions are everybody's. */
    (void)function, (void)owner;
    return true;
#endif
    return !memcmp(function->info.owner, owner, sizeof(function->info.owner));
}

/* The link to the function, or to where the chain ends. */
static struct function **find(const struct registry_key *key)
{
    struct function **link = bucket_of(key);

#ifdef TM_TEST_NO_OWNERS
    for (unsigned i = 0; i < BUCKETS; i++)
        for (link = &registry.heads[i]; *link; link = &(*link)->next)
            if ((*link)->info.name_length == key->name_length && !memcmp((*link)->name, key->name, key->name_length))
                return link;
#endif
    for (; *link; link = &(*link)->next)
        if ((*link)->info.name_length == key->name_length && owns(*link, key->owner) &&
            !memcmp((*link)->name, key->name, key->name_length))
            break;
    return link;
}

/* Modules and environments; and what else is kept of them. */
struct sum {
    uint64_t count, bytes, logs;
};

/* Under the lock: what `owner` has (everybody, when NULL). */
static struct sum sum(const uint8_t *owner)
{
    struct sum all = {0};

    for (unsigned i = 0; i < BUCKETS; i++)
        for (const struct function *function = registry.heads[i]; function; function = function->next)
            if (!owner || owns(function, owner)) {
                all.count++;
                all.bytes += function->info.size + function->info.env_length;
                all.logs += function->log_bytes + function->log_count * sizeof(struct log);
            }
    return all;
}

/* Under the lock, one step: the oldest log is nobody's but the slot's. */
static struct log *unlink_oldest(struct function *function)
{
    struct log *log = function->oldest;
    struct tm_txn txn;

    tm_txn_begin(&txn);
    tm_txn_set_ptr(&txn, &function->oldest, log->next);
    if (!log->next)
        tm_txn_set_ptr(&txn, &function->newest, NULL);
    tm_txn_set(&txn, &function->log_count, function->log_count - 1);
    tm_txn_set(&txn, &function->log_bytes, function->log_bytes - log->head.text_length);
    tm_txn_own(&txn, log);
    tm_txn_commit(&txn);
    return log;
}

/* Under the lock: forget them one by one, so that a death in between loses none. */
static void drop_logs(struct function *function)
{
    while (function->oldest)
        tm_free(unlink_oldest(function));
}

int registry_deploy(const struct registry_new *new, bool replace, struct fn_info *info)
{
    struct function *fresh, *old, **link;
    uint64_t size = new->module_length + new->env_length;
    struct sum own, all;
    struct tm_txn txn;
    void *block, *module;
    int status = share_alloc(sizeof(*fresh) + new->env_length, &block);

    if (status)
        return status;
    fresh = block;
    status = share_alloc(new->module_length, &module);
    if (status) {
        tm_free(fresh);
        return status;
    }
    memcpy(module, new->module, new->module_length);
    memcpy(fresh->env, new->env, new->env_length);
    memcpy(fresh->name, new->key.name, new->key.name_length);
    fresh->module = module;
    fresh->effort = new->effort;
    fresh->info = (struct fn_info){.size = new->module_length,
                                   .deployed = tm_time(),
                                   .limits = new->limits,
                                   .name_length = (uint16_t)new->key.name_length,
                                   .flags = new->grants,
                                   .env_length = new->env_length};
    memcpy(fresh->info.digest, new->digest, sizeof(fresh->info.digest));
    memcpy(fresh->info.owner, new->key.owner, sizeof(fresh->info.owner));
    status = lock();
    if (status)
        goto out;
    link = find(&new->key);
    old = *link;
    own = sum(new->key.owner);
    all = sum(NULL);
    if (old) {
        uint64_t less = old->info.size + old->info.env_length;

        own.bytes -= less;
        all.bytes -= less;
        own.count--;
    }
    if (old && !replace)
        status = FN_EXISTS;
    else if (own.count >= FN_OWNER_FUNCTIONS || own.bytes + own.logs + size > heap_share(FN_OWNER_SHARE) ||
             all.bytes + all.logs + size > heap_share(FN_ALL_SHARE))
        status = FN_QUOTA;
    if (status) {
        unlock();
        goto out;
    }
    if (old)
        drop_logs(old);
    fresh->number = registry.number + 1;
    /* Its owner's alone: it does not tell how much others deploy. */
    fresh->info.version = old ? old->info.version + 1 : 1;
    fresh->next = old ? old->next : NULL;
    *info = fresh->info;
    tm_txn_begin(&txn);
    tm_txn_set(&txn, &registry.number, fresh->number);
    tm_txn_keep(&txn, fresh);
    tm_txn_keep(&txn, module);
    tm_txn_set_ptr(&txn, link, fresh);
    if (old) {
        tm_txn_own(&txn, old->module);
        tm_txn_own(&txn, old);
    }
    tm_txn_commit(&txn);
    unlock();
    if (old) {
        tm_free(old->module);
        tm_free(old);
    }
    return 0;
out:
    tm_free(module);
    tm_free(fresh);
    return status;
}

int registry_remove(const struct registry_key *key)
{
    struct function *old, **link;
    struct tm_txn txn;
    int status = lock();

    if (status)
        return status;
    link = find(key);
    old = *link;
    if (old) {
        drop_logs(old);
        tm_txn_begin(&txn);
        tm_txn_set_ptr(&txn, link, old->next);
        tm_txn_own(&txn, old->module);
        tm_txn_own(&txn, old);
        tm_txn_commit(&txn);
    }
    unlock();
    if (!old)
        return FN_NOT_FOUND;
    tm_free(old->module);
    tm_free(old);
    return 0;
}

int registry_describe(const struct registry_key *key, struct fn_info *info)
{
    struct function *function;
    int status = lock();

    if (status)
        return status;
    function = *find(key);
    if (function)
        *info = function->info;
    unlock();
    return function ? 0 : FN_NOT_FOUND;
}

int registry_limit(const struct registry_key *key, const struct fn_limits *limits, struct fn_info *info)
{
    struct function *function;
    struct tm_txn txn;
    int status = lock();

    if (status)
        return status;
    function = *find(key);
    if (function) {
        struct fn_limits *is = &function->info.limits;

        tm_txn_begin(&txn);
        tm_txn_set(&txn, &is->memory, limits->memory ? limits->memory : is->memory);
        tm_txn_set(&txn, &is->fuel, limits->fuel ? limits->fuel : is->fuel);
        tm_txn_set(&txn, &is->time_ns, limits->time_ns ? limits->time_ns : is->time_ns);
        tm_txn_set(&txn, &is->output, limits->output ? limits->output : is->output);
        tm_txn_commit(&txn);
        *info = function->info;
    }
    unlock();
    return function ? 0 : FN_NOT_FOUND;
}

/* Is that deployment there still?  0, FN_NOT_FOUND or TM_E_*. */
static int look_again(const struct registry_key *key, uint64_t number)
{
#ifdef TM_TEST_COPY_UNCHECKED
    /* Test build: what was copied is believed. */
    (void)key, (void)number;
    return 0;
#else
    const struct function *function;
    int status = lock();

    if (status)
        return status;
    function = *find(key);
    status = function && function->number == number ? 0 : FN_NOT_FOUND;
    unlock();
    return status;
#endif
}

static void copy_module(uint8_t *to, const uint8_t *module, uint64_t length)
{
#ifdef TM_TEST_COPY_LOCKED /* Test build: everybody waits for it. */
    tm_assert(!lock());
#endif
#ifdef TM_TEST_STAY_IN_COPY
    /* Test build: who copies the first deployment that there was stays in the middle of it until there is another. */
    memcpy(to, module, length / 2);
    while (*(volatile uint64_t *)&registry.number == 1)
        __asm__ volatile("pause");
    to += length / 2;
    module += length / 2;
    length -= length / 2;
#endif
    memcpy(to, module, length);
#ifdef TM_TEST_COPY_LOCKED
    unlock();
#endif
}

/*
 * Copied without the lock, which millisecond-long copies would make everybody wait for.  Nobody has to be kept from
 * freeing it meanwhile (and a reader that dies keeps nothing): it is looked at once more, and where that deployment is
 * gone, what was copied may be anything, and goes unread.
 */
int registry_take(const struct registry_key *key, bool (*ready)(uint64_t number), struct registry_function *taken)
{
    for (;;) {
        const struct function *function;
        const uint8_t *env = NULL, *module = NULL;
        uint64_t needed;
        void *block;
        int status = lock();

        taken->copy = NULL;
        if (status)
            return status;
        function = *find(key);
        if (function) {
            taken->number = function->number;
            taken->version = function->info.version;
            taken->limits = function->info.limits;
            taken->grants = function->info.flags;
            taken->env_length = function->info.env_length;
            taken->module_length = ready(taken->number) ? 0 : function->info.size;
            env = function->env;
            module = function->module;
        }
        unlock();
        if (!function)
            return FN_NOT_FOUND;
        needed = taken->env_length + taken->module_length;
        if (!needed)
            return 0;
        status = share_alloc(needed, &block);
        if (status)
            return status;
        taken->copy = block;
        memcpy(taken->copy, env, taken->env_length);
        copy_module(taken->copy + taken->env_length, module, taken->module_length);
        status = look_again(key, taken->number);
        if (!status)
            return 0;
        share_free(taken->copy, needed);
        taken->copy = NULL;
        if (status != FN_NOT_FOUND)
            return status;
    }
}

int registry_ended(const struct registry_key *key, const struct registry_end *end)
{
    size_t length = end->text_length < FN_LOG_MAX ? end->text_length : FN_LOG_MAX;
    struct function *function;
    struct log *log = NULL;
    struct tm_txn txn;
    void *block;
    int status;

    /* Where there is no room for a log the invocation has still ended as it did. */
    if ((length || end->status) && !tm_try_alloc(sizeof(*log) + length, &block)) {
        log = block;
        log->head = (struct fn_log){.time = tm_time(),
                                    .status = end->status,
                                    .limit = end->limit,
                                    .exit_code = end->exit_code,
                                    .text_length = (uint32_t)length,
                                    .dropped = end->dropped};
        memcpy(log->text, end->text + (end->text_length - length), length);
    }
    status = lock();
    if (status) {
        tm_free(log);
        return status;
    }
    function = *find(key);
    if (function && function->number == end->number) {
        struct fn_info *info = &function->info;

#ifndef TM_TEST_TRIM_LATE /* Test build: more than there may be is there for a while. */
        /* Room first: at every instruction there are no more than there may be, whoever dies there. */
        while (log && function->oldest &&
               (function->log_count >= FN_LOGS_COUNT || function->log_bytes + length > FN_LOGS_BYTES))
            tm_free(unlink_oldest(function));
#endif
        tm_txn_begin(&txn);
        tm_txn_set(&txn, &info->invocations, info->invocations + 1);
        tm_txn_set(&txn, &info->failures, info->failures + (end->status != 0));
        tm_txn_set(&txn, &info->fuel, info->fuel + end->fuel);
        if (end->starts && function->effort <= REGISTRY_EFFORT_MAX)
            popular_note(&txn, place_of(key, function));
        if (log) {
            log->head.invocation = info->invocations + 1;
            tm_txn_keep(&txn, log);
            tm_txn_set_ptr(&txn, function->newest ? (void *)&function->newest->next : (void *)&function->oldest, log);
            tm_txn_set_ptr(&txn, &function->newest, log);
            tm_txn_set(&txn, &function->log_count, function->log_count + 1);
            tm_txn_set(&txn, &function->log_bytes, function->log_bytes + length);
        }
        tm_txn_commit(&txn);
        log = NULL;
#ifdef TM_TEST_STAY_IN_LOG
        /* Test build: who has invoked a function so often stays here, to be killed. */
        while (info->invocations == TM_TEST_STAY_IN_LOG)
            __asm__ volatile("pause");
#endif
    }
    unlock();
    tm_free(log);
    return 0;
}

/* Does `a` come before `b` by name? */
static bool before(const struct function *a, const struct function *b)
{
    uint32_t common = a->info.name_length < b->info.name_length ? a->info.name_length : b->info.name_length;
    int order = memcmp(a->name, b->name, common);

    return order ? order < 0 : a->info.name_length < b->info.name_length;
}

int registry_list(const uint8_t owner[32], uint8_t **result, size_t *length)
{
    const struct function *found[FN_OWNER_FUNCTIONS];
    size_t room = FN_OWNER_FUNCTIONS * (sizeof(struct fn_info) + FN_NAME_MAX);
    unsigned count = 0;
    void *block;
    uint8_t *at;
    int status = share_alloc(room, &block);

    if (status)
        return status;
    status = lock();
    if (status) {
        tm_free(block);
        return status;
    }
    for (unsigned i = 0; i < BUCKETS; i++)
        for (const struct function *function = registry.heads[i]; function; function = function->next)
            if (owns(function, owner) && count < FN_OWNER_FUNCTIONS) {
                unsigned place = count++;

                for (; place && before(function, found[place - 1]); place--)
                    found[place] = found[place - 1];
                found[place] = function;
            }
    at = block;
    for (unsigned i = 0; i < count; i++) {
        memcpy(at, &found[i]->info, sizeof(found[i]->info));
        memcpy(at + sizeof(found[i]->info), found[i]->name, found[i]->info.name_length);
        at += sizeof(found[i]->info) + found[i]->info.name_length;
    }
    unlock();
    *result = block;
    *length = (size_t)(at - (uint8_t *)block);
    return 0;
}

int registry_logs(const struct registry_key *key, uint64_t after, uint8_t **result, size_t *length)
{
    size_t room = FN_LOGS_BYTES + FN_LOGS_COUNT * sizeof(struct fn_log);
    struct function *function;
    void *block;
    uint8_t *at;
    int status = share_alloc(room, &block);

    if (status)
        return status;
    at = block;
    status = lock();
    if (!status) {
        function = *find(key);
        if (!function)
            status = FN_NOT_FOUND;
        for (const struct log *log = function ? function->oldest : NULL; log; log = log->next)
            if (log->head.invocation > after) {
                if (sizeof(log->head) + log->head.text_length > room - (size_t)(at - (uint8_t *)block))
                    break; /* registry_ended() keeps no more than fit */
                memcpy(at, &log->head, sizeof(log->head));
                memcpy(at + sizeof(log->head), log->text, log->head.text_length);
                at += sizeof(log->head) + log->head.text_length;
            }
        unlock();
    }
    if (status) {
        tm_free(block);
        return status;
    }
    *result = block;
    *length = (size_t)(at - (uint8_t *)block);
    return 0;
}

int registry_usage(const uint8_t owner[32], struct fn_usage *usage)
{
    struct tm_heap_stats heap;
    struct share_sum ready;
    struct sum own;
    int status = lock();

    if (status)
        return status;
    own = sum(owner);
    unlock();
    usage->functions = own.count;
    usage->bytes = own.bytes;
    status = tm_heap_check(&heap);
    if (status)
        return status;
    usage->bytes_max = heap_share(FN_OWNER_SHARE);
    ready = share_ready_sum();
    usage->heap = heap.size;
    usage->heap_used = heap.used;
    usage->heap_owned = heap.owned > ready.blocks ? heap.owned - ready.blocks : 0;
    usage->heap_ready = ready.bytes;
    return 0;
}

/* Under the lock. */
static struct function *at_place(uint64_t place)
{
    struct function *function = registry.heads[place % BUCKETS];

    while (function && function->number != place / BUCKETS)
        function = function->next;
    return function;
}

/* Who waits for a lock that a warden has is not woken: so it is kept for a few instructions only. */
static int lock_at_once(void)
{
    int status = tm_trylock(&registry.mutex);

    if (status == TM_E_OWNERDEAD) {
        tm_mutex_consistent(&registry.mutex);
        status = 0;
    }
    return status;
}

int registry_find(uint64_t place, struct registry_ahead *ahead)
{
    struct function *function;
    int status = lock_at_once();

    if (status)
        return status;
    function = at_place(place);
    if (function) {
        *ahead = (struct registry_ahead){.number = function->number,
                                         .grants = function->info.flags,
                                         .module = function->module,
                                         .length = function->info.size,
                                         .effort = function->effort,
                                         .suspect = function->suspect};
        memcpy(ahead->owner, function->info.owner, sizeof(ahead->owner));
    }
    unlock();
    return function ? 0 : FN_NOT_FOUND;
}

void registry_spoil(uint64_t place)
{
    struct function *function;

    if (lock_at_once())
        return;
    function = at_place(place);
    if (function)
        function->effort = UINT64_MAX;
    unlock();
}

void registry_suspect(uint64_t place, bool died)
{
    struct function *function;

    if (lock_at_once())
        return;
    function = at_place(place);
    if (function) {
        if (died && function->suspect)
            function->effort = UINT64_MAX;
        function->suspect = died;
    }
    unlock();
}
