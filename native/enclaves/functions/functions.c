/* SPDX-License-Identifier: Apache-2.0 */
/* The ECALLs but those of upload.c: what comes in is checked here; registry.c keeps functions, slot.c runs them. */
#include "functions.h"

#include "keys.h"
#include "requests.h"
#include "slot.h"

/* Memory that grows is moved, to a place that may be twice as large as it has to be. */
#define GROW_FACTOR 3u

bool read_key(const struct tm_request *rq, size_t at, uint32_t length, struct registry_key *key)
{
    if (!length || length > FN_NAME_MAX || at + length > rq->in_len)
        return false;
    *key = (struct registry_key){.name = rq->in + at, .name_length = length};
    memcpy(key->owner, tm_caller().identity.principal, sizeof(key->owner));
    for (uint32_t i = 0; i < length; i++) {
        uint8_t c = key->name[i];
        bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');

        if (!plain && (!i || (c != '.' && c != '_' && c != '-')))
            return false;
    }
    return true;
}

/* fn_name and name, with `more` bytes after them. */
static bool read_name(const struct tm_request *rq, size_t more, struct registry_key *key)
{
    struct fn_name name;

    if (rq->in_len < sizeof(name))
        return false;
    memcpy(&name, rq->in, sizeof(name));
    return !name.reserved && !name.reserved2 && rq->in_len == sizeof(name) + name.name_length + more &&
           read_key(rq, sizeof(name), name.name_length, key);
}

bool are_strings(const uint8_t *text, uint32_t length, bool named)
{
    bool has_name = false;

    if (length > FN_STRINGS_MAX || (length && text[length - 1]))
        return false;
    for (uint32_t i = 0; i < length; i++) {
        if (!text[i] && named && !has_name)
            return false;
        has_name = text[i] && (has_name || text[i] == '=');
    }
    return true;
}

bool are_limits(const struct fn_limits *limits)
{
    return limits->memory <= registry_memory_max() && limits->output <= FN_OUTPUT_MAX;
}

int reply_info(struct tm_request *rq, const struct fn_info *info, const struct registry_key *key)
{
    tm_reply(rq, info, sizeof(*info));
    return tm_reply(rq, key->name, key->name_length);
}

/* ---- invoke -------------------------------------------------------------------- */

struct invocation {
    struct registry_function function;
    void *prepared;
    bool warm;
    bool starts; /* the first time through this slot, or once more after it had to make room */
    struct engine_run run;
};

static bool is_ready(uint64_t number)
{
    return slot_warm(slot_self(), number) != NULL;
}

#ifdef TM_TEST_ONE_AT_A_TIME
/* Test build: who invokes waits for whoever does. */
static struct tm_mutex running;
#endif

static int run_module(void *argument)
{
    struct invocation *it = argument;
    struct slot *slot = slot_self();
    struct warm *warm = slot_warm(slot, it->function.number);

    it->warm = warm != NULL;
    it->starts = !warm || warm->unused;
    if (warm) {
        warm->unused = false;
        it->prepared = warm->prepared;
    } else {
        slot_make_room(slot);
        it->prepared = engine_prepare(it->function.copy + it->function.env_length, it->function.module_length,
                                      it->function.grants, &it->run.text);
        if (!it->prepared)
            return FN_CRASHED; /* it could be when it was deployed */
        slot_keep(slot, it->function.number, it->prepared);
    }
#ifdef TM_TEST_ONE_AT_A_TIME
    tm_assert(!tm_lock(&running));
#endif
    engine_run(it->prepared, &it->run);
#ifdef TM_TEST_ONE_AT_A_TIME
    tm_unlock(&running);
#endif
    return 0;
}

static int finish_module(void *argument)
{
    engine_finish(argument);
    return 0;
}

static int status_of(const struct engine_run *run)
{
    switch (run->outcome) {
    case FN_OUTCOME_DONE:
        return 0;
    case FN_OUTCOME_EXITED:
        return FN_FAILED;
    case FN_OUTCOME_LIMIT:
        return FN_LIMIT;
    default:
        return FN_TRAPPED;
    }
}

static uint64_t maximum_of(uint32_t limit, const struct fn_limits *limits, uint64_t time_ns)
{
    switch (limit) {
    case FN_LIMIT_MEMORY:
        return limits->memory;
    case FN_LIMIT_FUEL:
        return limits->fuel;
    case FN_LIMIT_TIME:
        return time_ns;
    case FN_LIMIT_OUTPUT:
        return limits->output;
    default:
        return 0;
    }
}

static void reply_result(struct tm_request *rq, int status, const struct invocation *it, uint64_t time_ns)
{
    const struct engine_run *run = &it->run;
    struct fn_result result = {.limit = run->limit,
                               .exit_code = run->exit_code,
                               .maximum = maximum_of(run->limit, &it->function.limits, time_ns),
                               .fuel = run->fuel_used,
                               .version = it->function.version,
                               .warm = it->warm};
    const uint8_t *text = run->text.bytes;

    result.text_length = run->text.length;
    if (status == FN_FAILED) {
        result.text_length = run->err_length < FN_RESULT_TEXT ? (uint32_t)run->err_length : FN_RESULT_TEXT;
        text = run->err + (run->err_length - result.text_length);
    }
    if (!status)
        result.stdout_length = (uint32_t)run->out_length;
    tm_reply(rq, &result, sizeof(result));
    tm_reply(rq, text, result.text_length);
    tm_reply(rq, run->out, result.stdout_length);
}

static int read_invoke(const struct tm_request *rq, struct fn_invoke *head, struct registry_key *key)
{
    const uint8_t *strings;

    if (rq->in_len < sizeof(*head))
        return TM_E_ARGUMENT;
    memcpy(head, rq->in, sizeof(*head));
    if (head->flags & ~FN_STREAM || head->args_length > FN_STRINGS_MAX || head->env_length > FN_STRINGS_MAX ||
        head->stdin_length > FN_PAYLOAD_MAX ||
        rq->in_len != sizeof(*head) + head->name_length + (uint64_t)head->args_length + head->env_length +
                          head->stdin_length ||
        !read_key(rq, sizeof(*head), head->name_length, key))
        return TM_E_ARGUMENT;
    strings = key->name + key->name_length;
    if (!are_strings(strings, head->args_length, false) ||
        !are_strings(strings + head->args_length, head->env_length, true))
        return TM_E_ARGUMENT;
    return 0;
}

/* Arguments after the name, and both environments: in one block of the slot's own. */
static int join_strings(const struct fn_invoke *head, const struct registry_key *key, struct invocation *it,
                        uint8_t **block)
{
    const uint8_t *strings = key->name + key->name_length;
    size_t args = key->name_length + 1 + head->args_length;
    void *room;
    int status = share_alloc(args + it->function.env_length + head->env_length, &room);

    if (status)
        return status;
    *block = room;
    memcpy(*block, key->name, key->name_length);
    memcpy(*block + key->name_length + 1, strings, head->args_length);
    memcpy(*block + args, it->function.copy, it->function.env_length);
    memcpy(*block + args + it->function.env_length, strings + head->args_length, head->env_length);
    it->run.args = *block;
    it->run.args_length = args;
    it->run.env = *block + args;
    it->run.env_length = it->function.env_length + head->env_length;
    it->run.in = strings + head->args_length + head->env_length;
    it->run.in_length = head->stdin_length;
    return 0;
}

static int run(struct invocation *it)
{
    struct slot *slot = slot_self();
    struct engine_run *run = &it->run;
    uint32_t refused;
    int status;

    slot_begin(slot, ENGINE_BUDGET + GROW_FACTOR * run->memory + run->output + CHECK_FACTOR * it->function.module_length);
    status = slot_engine(slot, run_module, it, &run->text, &refused);
    if (!status) {
        /* Within its limit, and still there was none. */
        if (run->limit == FN_LIMIT_MEMORY && refused & ~ARENA_OVER_BUDGET)
            run->limit = FN_LIMIT_HEAP;
        return status_of(run);
    }
    /* The engine's arena is gone, and what it wrote there. */
    run->out = run->err = NULL;
    run->out_length = run->err_length = 0;
    run->err_dropped = 0;
    run->state = NULL;
    run->fuel_used = 0;
    run->limit = FN_LIMIT_NONE;
    if (status == -1 && refused) {
        run->limit = refused & ~ARENA_OVER_BUDGET ? FN_LIMIT_HEAP : FN_LIMIT_MEMORY;
        run->text.length = 0;
        return FN_LIMIT;
    }
    return FN_CRASHED;
}

TM_ECALL(invoke)
{
    struct invocation it = {0};
    struct registry_end end;
    struct registry_key key;
    struct engine_text why;
    struct fn_invoke head;
    uint64_t time_ns;
    size_t needed;
    uint8_t *block;
    uint32_t refused;
    int status = read_invoke(rq, &head, &key);

    if (status)
        return status;
    slot_trim(slot_self());
    status = registry_take(&key, is_ready, &it.function);
    if (status)
        return status;
    it.run.stream = head.flags & FN_STREAM;
    needed = sizeof(struct fn_result) + FN_RESULT_TEXT + (it.run.stream ? 0 : it.function.limits.output);
    status = tm_reply_room(rq) < needed ? TM_E_SPACE : join_strings(&head, &key, &it, &block);
    if (status) {
        tm_free(it.function.copy);
        if (status == TM_E_SPACE)
            rq->out_len = needed;
        return status;
    }
    time_ns = head.time_ns && head.time_ns < it.function.limits.time_ns ? head.time_ns : it.function.limits.time_ns;
    it.run.memory = it.function.limits.memory;
    it.run.fuel = it.function.limits.fuel;
    it.run.output = it.function.limits.output;
    it.run.time_ns = time_ns;
    status = run(&it);
    reply_result(rq, status, &it, time_ns);
    end = (struct registry_end){.number = it.function.number,
                                .fuel = it.run.fuel_used,
                                .status = (uint32_t)status,
                                .limit = it.run.limit,
                                .starts = it.starts,
                                .exit_code = it.run.exit_code,
                                .text = it.run.err,
                                .text_length = it.run.err_length,
                                .dropped = it.run.err_dropped};
    registry_ended(&key, &end);
    if (it.run.state)
        slot_engine(slot_self(), finish_module, it.run.state, &why, &refused);
    tm_free(block);
    tm_free(it.function.copy);
    return status;
}

/* ---- the rest -------------------------------------------------------------------- */

TM_ECALL(describe)
{
    struct registry_key key;
    struct fn_info info;
    int status = read_name(rq, 0, &key) ? registry_describe(&key, &info) : TM_E_ARGUMENT;

    return status ? status : reply_info(rq, &info, &key);
}

TM_ECALL(limits)
{
    struct fn_limits limits;
    struct registry_key key;
    struct fn_info info;
    int status;

    if (!read_name(rq, sizeof(limits), &key))
        return TM_E_ARGUMENT;
    memcpy(&limits, key.name + key.name_length, sizeof(limits));
    if (!are_limits(&limits))
        return TM_E_ARGUMENT;
    status = registry_limit(&key, &limits, &info);
    return status ? status : reply_info(rq, &info, &key);
}

TM_ECALL(remove)
{
    struct registry_key key;

    return read_name(rq, 0, &key) ? registry_remove(&key) : TM_E_ARGUMENT;
}

static int reply_block(struct tm_request *rq, int status, uint8_t *block, size_t length)
{
    if (status)
        return status;
    status = tm_reply(rq, block, length);
    tm_free(block);
    return status;
}

TM_ECALL(list)
{
    struct tm_caller caller = tm_caller();
    uint8_t *block;
    size_t length;
    int status = registry_list(caller.identity.principal, &block, &length);

    return reply_block(rq, status, block, length);
}

TM_ECALL(logs)
{
    struct registry_key key;
    struct fn_logs head;
    uint8_t *block;
    size_t length;
    int status;

    if (rq->in_len < sizeof(head))
        return TM_E_ARGUMENT;
    memcpy(&head, rq->in, sizeof(head));
    if (head.reserved || head.reserved2 || rq->in_len != sizeof(head) + head.name_length ||
        !read_key(rq, sizeof(head), head.name_length, &key))
        return TM_E_ARGUMENT;
    status = registry_logs(&key, head.after, &block, &length);
    return reply_block(rq, status, block, length);
}

TM_ECALL(usage)
{
    struct fn_usage usage = {0};
    struct tm_caller caller = tm_caller();
    int status = registry_usage(caller.identity.principal, &usage);

    if (!status)
        status = keys_usage(&usage);

    return status ? status : tm_reply(rq, &usage, sizeof(usage));
}

TM_ECALL(clear_keys)
{
    return rq->in_len ? TM_E_ARGUMENT : keys_clear();
}

TM_ECALL(empty)
{
    return 0;
}
