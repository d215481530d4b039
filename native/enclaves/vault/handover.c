/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Handing everything over to the vault that takes this one's place (an upgrade of the image).
 *
 * Control ECALLs of both wardens, so that nobody else can ask; what passes between them through the
 * broker is sealed for enclaves of the same signer and product.  The successor begins with a
 * nonce, and every page is bound to it and to its number: pages of an earlier hand-over, or in another
 * order, are refused.  Whoever asks sees to it that nobody writes meanwhile (nobody holds a slot).
 *
 *   handover_begin  -                           16 bytes: the nonce        (successor)
 *   handover_seal   handover_seal_in            handover_seal_out          (predecessor)
 *   handover_read   u64 offset                  bytes of the sealed page   (predecessor)
 *   handover_room   u64 page, u64 length        -                          (successor)
 *   handover_write  u64 offset, u64 length, bytes                          (successor)
 *   handover_open   u64 page, u64 last          u64: records               (successor)
 *
 * A warden can be killed in any of them, and its successor asks again: pages lie in blocks that are
 * kept, and importing one twice writes the same values twice.
 */
#include "table.h"

struct handover_seal_in {
    uint8_t nonce[16];
    uint64_t page;
    uint64_t cursor; /* 0, then `next` of the page before */
};

struct handover_seal_out {
    uint64_t length; /* of the sealed page */
    uint64_t next;   /* 0: that was the last */
};

/* What a page is bound to. */
struct binding {
    uint8_t label[16];
    uint8_t nonce[16];
    uint64_t page;
    uint64_t last;
};

/* The first thing in a page. */
struct head {
    uint64_t version; /* the largest that was given out */
    uint64_t count;
};

static struct {
    uint8_t nonce[16];
    uint64_t begun;
    uint64_t page;   /* the next that is opened */
    uint64_t length; /* of what lies in `block` */
    uint8_t *block;  /* kept: a sealed page on its way out or in */
} handover;

static struct binding binding_of(const uint8_t nonce[16], uint64_t page, uint64_t last)
{
    struct binding binding = {.label = "vault handover1", .page = page, .last = last};

    memcpy(binding.nonce, nonce, sizeof(binding.nonce));
    return binding;
}

/* Put `block`, which is ours, or nothing in the place of the one that lies there. */
static void replace_block(uint8_t *block, uint64_t length)
{
    uint8_t *old = handover.block;
    struct tm_txn txn;

    tm_txn_begin(&txn);
    if (block)
        tm_txn_keep(&txn, block);
    tm_txn_set_ptr(&txn, &handover.block, block);
    tm_txn_set(&txn, &handover.length, length);
    if (old)
        tm_txn_own(&txn, old);
    tm_txn_commit(&txn);
    tm_free(old);
}

TM_CONTROL(handover_begin)
{
    replace_block(NULL, 0);
    tm_random(handover.nonce, sizeof(handover.nonce));
    handover.page = 0;
    handover.begun = 1;
    return tm_reply(rq, handover.nonce, sizeof(handover.nonce));
}

static int seal_page(const struct handover_seal_in *in, struct handover_seal_out *out, size_t room)
{
    struct head head = {0};
    struct binding binding;
    uint32_t count;
    uint8_t *plain, *sealed;
    void *block;
    size_t length;
    int status = tm_try_alloc(sizeof(head) + room, &block);

    if (status)
        return status;
    plain = block;
    status = table_dump(plain + sizeof(head), room, in->cursor, &length, &count, &out->next);
    if (status) {
        tm_free(plain);
        out->length = length;
        return status;
    }
    head.version = table_version();
    head.count = count;
    memcpy(plain, &head, sizeof(head));
    out->length = sizeof(head) + length + TM_SEAL_OVERHEAD;
    status = tm_try_alloc(out->length, &block);
    sealed = block;
    if (!status) {
        binding = binding_of(in->nonce, in->page, out->next == 0);
        status = tm_seal(SGX_KEYPOLICY_MRSIGNER, &binding, sizeof(binding), plain, sizeof(head) + length, sealed);
        if (status)
            tm_free(sealed);
        else
            replace_block(sealed, out->length);
    }
    tm_free(plain);
    return status;
}

TM_CONTROL(handover_seal)
{
    struct handover_seal_in in;
    struct handover_seal_out out = {0};
    int status;

    if (rq->in_len < sizeof(in))
        return TM_E_ARGUMENT;
    memcpy(&in, rq->in, sizeof(in));
    status = seal_page(&in, &out, VAULT_PAGE_BYTES);
    if (status == TM_E_SPACE) /* one bucket has more than a page */
        status = seal_page(&in, &out, out.length);
    return status ? status : tm_reply(rq, &out, sizeof(out));
}

TM_CONTROL(handover_read)
{
    uint64_t offset;
    size_t some = tm_reply_room(rq);

    if (rq->in_len < sizeof(offset))
        return TM_E_ARGUMENT;
    memcpy(&offset, rq->in, sizeof(offset));
    if (offset >= handover.length)
        return TM_E_ARGUMENT;
    if (some > handover.length - offset)
        some = handover.length - offset;
    return tm_reply(rq, handover.block + offset, some);
}

TM_CONTROL(handover_room)
{
    uint64_t in[2];
    void *block;
    int status;

    if (rq->in_len < sizeof(in))
        return TM_E_ARGUMENT;
    memcpy(in, rq->in, sizeof(in));
    if (!handover.begun || in[0] != handover.page || in[1] < sizeof(struct head) + TM_SEAL_OVERHEAD)
        return TM_E_STATE;
    status = tm_try_alloc(in[1], &block);
    if (!status)
        replace_block(block, in[1]);
    return status;
}

TM_CONTROL(handover_write)
{
    uint64_t in[2];

    if (rq->in_len < sizeof(in))
        return TM_E_ARGUMENT;
    memcpy(in, rq->in, sizeof(in));
    if (in[1] > rq->in_len - sizeof(in) || in[0] > handover.length || in[1] > handover.length - in[0])
        return TM_E_ARGUMENT;
    memcpy(handover.block + in[0], rq->in + sizeof(in), in[1]);
    return 0;
}

/* Ours, since the seal was right; still no length is believed. */
static int import_page(const uint8_t *from, size_t length, uint64_t *count)
{
    while (length) {
        struct table_record record;
        struct place place;
        struct value value;
        size_t size;
        int status;

        if (length < sizeof(record))
            return TM_E_ARGUMENT;
        memcpy(&record, from, sizeof(record));
        from += sizeof(record);
        length -= sizeof(record);
        size = (size_t)record.key_length + record.value_length;
        if (!record.key_length || record.key_length > VAULT_KEY_MAX || record.value_length > VAULT_VALUE_MAX ||
            record.space > VAULT_SHARED || size > length)
            return TM_E_ARGUMENT;
        place = (struct place){.space = (uint8_t)record.space, .key_length = record.key_length, .key = from};
        memcpy(place.principal, record.principal, sizeof(place.principal));
        value = (struct value){.expires = record.expires,
                               .length = record.value_length,
                               .bytes = from + record.key_length};
        status = table_put(&place, &value, NULL);
        if (status)
            return status;
        ++*count;
        from += size;
        length -= size;
    }
    return 0;
}

TM_CONTROL(handover_open)
{
    uint64_t in[2], count = 0;
    struct binding binding;
    struct head head;
    void *plain;
    size_t length;
    int status;

    if (rq->in_len < sizeof(in))
        return TM_E_ARGUMENT;
    memcpy(in, rq->in, sizeof(in));
    if (!handover.begun || in[0] != handover.page || handover.length < sizeof(head) + TM_SEAL_OVERHEAD)
        return TM_E_STATE;
    length = handover.length - TM_SEAL_OVERHEAD;
    status = tm_try_alloc(length, &plain);
    if (status)
        return status;
    binding = binding_of(handover.nonce, in[0], in[1]);
    status = tm_unseal(&binding, sizeof(binding), handover.block, handover.length, plain);
    if (!status) {
        memcpy(&head, plain, sizeof(head));
        /* First: whatever is put from now on has a version that nobody has seen. */
        status = table_raise(head.version);
    }
    if (!status)
        status = import_page((const uint8_t *)plain + sizeof(head), length - sizeof(head), &count);
    tm_free(plain);
    if (status)
        return status;
    replace_block(NULL, 0);
    handover.page = in[0] + 1;
    if (in[1])
        handover.begun = 0;
    return tm_reply(rq, &count, sizeof(count));
}
