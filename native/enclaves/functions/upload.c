/* SPDX-License-Identifier: Apache-2.0 */
/* How functions come in: in the clear, or sealed for an offer that was made through this slot. */
#include "requests.h"
#include "slot.h"

static uint64_t or_default(uint64_t value, uint64_t otherwise)
{
    return value ? value : otherwise;
}

struct check {
    const uint8_t *module;
    size_t length;
    uint32_t grants;
    struct engine_text text;
    uint64_t effort;
};

static int check_module(void *argument)
{
    struct check *check = argument;

    return engine_validate(check->module, check->length, check->grants, &check->text, &check->effort);
}

static int check(struct tm_request *rq, const uint8_t *module, size_t length, uint32_t grants, uint64_t *effort)
{
    static const char memory[] = "it needs more memory to be translated than a module of its size may have";
    struct check it = {.module = module, .length = length, .grants = grants};
    struct slot *slot = slot_self();
    uint32_t refused;
    int status;

    slot_trim(slot);
    slot_begin(slot, ENGINE_BUDGET + CHECK_FACTOR * length);
    status = slot_engine(slot, check_module, &it, &it.text, &refused);
    *effort = it.effort;
    if (!status)
        return 0;
    if (status == -1 && refused & ~ARENA_OVER_BUDGET)
        return TM_E_NOMEM;
    if (status == -1 && refused)
        tm_reply(rq, memory, sizeof(memory) - 1);
    else
        tm_reply(rq, it.text.bytes, it.text.length);
    return status == -1 && !refused ? FN_CRASHED : FN_INVALID;
}

static bool is_length(uint64_t is, uint64_t said)
{
#ifdef TM_TEST_LONGER_IS_FINE /* Test build: what a request has behind what it says goes unseen. */
    return is >= said;
#endif
    return is == said;
}

/* fn_deploy at `at`, the name, and as many bytes more as it says, which are looked at later. */
static int read_deploy(struct tm_request *rq, size_t at, struct fn_deploy *head, struct registry_new *new)
{
    if (rq->in_len < at + sizeof(*head))
        return TM_E_ARGUMENT;
    memcpy(head, rq->in + at, sizeof(*head));
    at += sizeof(*head);
    if (head->flags & ~(FN_REPLACE | FN_GRANT_KEYS) || head->env_length > FN_STRINGS_MAX || head->module_length > FN_MODULE_MAX ||
        !head->module_length || !is_length(rq->in_len, at + head->name_length + head->env_length + head->module_length) ||
        !are_limits(&head->limits) || !read_key(rq, at, head->name_length, &new->key))
        return TM_E_ARGUMENT;
    if (tm_reply_room(rq) < sizeof(struct fn_info) + FN_NAME_MAX) {
        rq->out_len = sizeof(struct fn_info) + FN_NAME_MAX;
        return TM_E_SPACE;
    }
    new->limits = (struct fn_limits){.memory = or_default(head->limits.memory, FN_DEFAULT_MEMORY),
                                     .fuel = or_default(head->limits.fuel, FN_DEFAULT_FUEL),
                                     .time_ns = or_default(head->limits.time_ns, FN_DEFAULT_TIME),
                                     .output = or_default(head->limits.output, FN_DEFAULT_OUTPUT)};
    if (new->limits.memory > registry_memory_max())
        new->limits.memory = registry_memory_max();
    return 0;
}

/* `content`: environment and module. */
static int deploy_content(struct tm_request *rq, const struct fn_deploy *head, struct registry_new *new,
                          const uint8_t *content)
{
    struct fn_info info;
    int status;

    new->env = content;
    new->env_length = head->env_length;
    new->module = content + head->env_length;
    new->module_length = head->module_length;
    if (!are_strings(new->env, new->env_length, true))
        return TM_E_ARGUMENT;
    new->grants = head->flags & FN_GRANT_KEYS;
    status = check(rq, new->module, new->module_length, new->grants, &new->effort);
    if (status)
        return status;
    slot_trim(slot_self()); /* room for it in the owner's share */
    tm_sha256(new->module, new->module_length, new->digest);
    status = registry_deploy(new, head->flags & FN_REPLACE, &info);
    return status ? status : reply_info(rq, &info, &new->key);
}

TM_ECALL(deploy)
{
    struct registry_new new = {0};
    struct fn_deploy head;
    int status = read_deploy(rq, 0, &head, &new);

    return status ? status : deploy_content(rq, &head, &new, new.key.name + head.name_length);
}

/* ---- sealed ------------------------------------------------------------------------ */

/* What an offer's report says. */
struct offer_words {
    uint8_t label[32], key[32], nonce[32], owner[32];
};

/* What the key of an upload is derived from. */
struct upload_words {
    uint8_t counter[4], secret[32];
    uint8_t label[32], key[32], uploader[32], nonce[32], owner[32];
};
_Static_assert(sizeof(struct upload_words) == 196, "upload_words");

TM_ECALL(offer)
{
    struct offer_words words = {.label = FN_OFFER_LABEL};
    struct offer *offer = &slot_self()->offer;
    struct sgx_targetinfo target;
    struct fn_offered offered;
    struct sgx_report report;
    uint8_t data[64] = {0};

    if (rq->in_len != sizeof(words.nonce) && rq->in_len != sizeof(words.nonce) + sizeof(target))
        return TM_E_ARGUMENT;
    if (tm_reply_room(rq) < sizeof(offered) + sizeof(report)) {
        rq->out_len = sizeof(offered) + sizeof(report);
        return TM_E_SPACE;
    }
    offer->made = 0;
    memcpy(offer->nonce, rq->in, sizeof(offer->nonce));
    tm_random(offer->private_key, sizeof(offer->private_key));
    engine_public_key(offer->private_key, offer->key);
    memcpy(words.key, offer->key, sizeof(words.key));
    memcpy(words.nonce, offer->nonce, sizeof(words.nonce));
    memcpy(words.owner, tm_caller().identity.principal, sizeof(words.owner));
    tm_sha256(&words, sizeof(words), data);
    if (rq->in_len > sizeof(words.nonce))
        memcpy(&target, rq->in + sizeof(words.nonce), sizeof(target));
    tm_report(rq->in_len > sizeof(words.nonce) ? &target : NULL, data, &report);
    offer->made = 1;
    memcpy(offered.key, words.key, sizeof(offered.key));
    memcpy(offered.owner, words.owner, sizeof(offered.owner));
    tm_reply(rq, &offered, sizeof(offered));
    return tm_reply(rq, &report, sizeof(report));
}

/* The key of an upload by the slot's offer, which is used up. */
static int upload_key(const uint8_t uploader[32], uint8_t key[16])
{
    struct upload_words words = {.counter = {0, 0, 0, 1}, .label = FN_UPLOAD_LABEL};
    struct offer *offer = &slot_self()->offer;
    uint8_t digest[32];
    bool agreed;

    if (!offer->made)
        return FN_NO_OFFER;
#ifndef TM_TEST_OFFER_STAYS /* Test build: who has recorded an upload can send it again. */
    offer->made = 0;
#endif
    memcpy(words.key, offer->key, sizeof(words.key));
    memcpy(words.uploader, uploader, sizeof(words.uploader));
    memcpy(words.nonce, offer->nonce, sizeof(words.nonce));
    memcpy(words.owner, tm_caller().identity.principal, sizeof(words.owner));
    agreed = engine_agree(offer->private_key, uploader, words.secret);
#ifndef TM_TEST_OFFER_STAYS
    tm_wipe(offer, sizeof(*offer));
#endif
    tm_sha256(&words, sizeof(words), digest);
    memcpy(key, digest, 16);
    tm_wipe(&words, sizeof(words));
    tm_wipe(digest, sizeof(digest));
    return agreed ? 0 : FN_UNSEALED;
}

TM_ECALL(deploy_sealed)
{
    static const uint8_t nonce[12]; /* the key seals this one upload */
    struct registry_new new = {0};
    struct fn_sealed sealed;
    struct fn_deploy head;
    uint8_t key[16];
    size_t length;
    void *content;
    int status = read_deploy(rq, sizeof(sealed), &head, &new);

    if (status)
        return status;
    memcpy(&sealed, rq->in, sizeof(sealed));
    length = head.env_length + (size_t)head.module_length;
    slot_trim(slot_self());
    status = share_alloc(length, &content);
    if (status)
        return status;
    status = upload_key(sealed.key, key);
    if (!status && tm_aead_open(key, nonce, rq->in + sizeof(sealed), sizeof(head) + head.name_length,
                                new.key.name + head.name_length, length, content, sealed.tag))
        status = FN_UNSEALED;
    tm_wipe(key, sizeof(key));
    if (!status)
        status = deploy_content(rq, &head, &new, content);
    tm_free(content);
    return status;
}
