/* SPDX-License-Identifier: Apache-2.0 */
/* The vault's ECALLs: what comes in is checked here, table.c does the work. */
#include "table.h"

#define PIECE 4096u
#define ATTEMPTS 1000
#define SMALL_PAGE 4096u

int tm_on_start(void)
{
    return table_start(NULL);
}

static bool name_place(struct place *place, uint8_t space, const uint8_t *key, uint16_t key_length)
{
    struct tm_caller caller = tm_caller();

    if (space > VAULT_SHARED)
        return false;
    *place = (struct place){.space = space, .key = key, .key_length = key_length};
    if (space == VAULT_PRIVATE)
        memcpy(place->principal, caller.identity.principal, sizeof(place->principal));
    return true;
}

static bool read_name(const struct tm_request *rq, struct place *place)
{
    struct vault_name name;

    if (rq->in_len < sizeof(name))
        return false;
    memcpy(&name, rq->in, sizeof(name));
    return !name.reserved && !name.reserved2 && name.key_length && name.key_length <= VAULT_KEY_MAX &&
           rq->in_len == sizeof(name) + name.key_length &&
           name_place(place, name.space, rq->in + sizeof(name), name.key_length);
}

static int read_put(const struct tm_request *rq, struct place *place, struct value *value, uint64_t *expected)
{
    struct vault_put put;
    uint64_t ttl, now = tm_time();

    if (rq->in_len < sizeof(put))
        return TM_E_ARGUMENT;
    memcpy(&put, rq->in, sizeof(put));
    if (put.reserved || !put.key_length || put.key_length > VAULT_KEY_MAX ||
        put.value_length > VAULT_VALUE_MAX ||
        rq->in_len != sizeof(put) + put.key_length + put.value_length ||
        !name_place(place, put.space, rq->in + sizeof(put), put.key_length))
        return TM_E_ARGUMENT;
    *value = (struct value){.length = put.value_length, .bytes = place->key + put.key_length};
    *expected = put.expected;
    if (!put.ttl_ms)
        return 0;
    if (!now)
        return TM_E_NOTREADY;
    if (__builtin_mul_overflow(put.ttl_ms, 1000000ull, &ttl) ||
        __builtin_add_overflow(now, ttl, &value->expires))
        return TM_E_ARGUMENT;
    return 0;
}

/*
 * vault_value and the value, in pieces that are copied out of the table before the
 * caller's memory is touched.  VAULT_CHANGED when another value came meanwhile.
 */
static int reply_pieces(struct tm_request *rq, const struct place *place)
{
    uint8_t piece[PIECE];
    struct vault_value head;
    struct value value;
    size_t offset = 0;
    int status = table_read(place, &value, 0, piece, sizeof(piece));

    if (status)
        return status;
    head = (struct vault_value){.version = value.version, .expires = value.expires};
    tm_reply(rq, &head, sizeof(head));
    for (;;) {
        size_t some = value.length - offset < sizeof(piece) ? value.length - offset : sizeof(piece);

        status = tm_reply(rq, piece, some);
        offset += some;
        if (offset == value.length)
            return status;
        status = table_read(place, &value, offset, piece, sizeof(piece));
        if (status || value.version != head.version)
            return status ? status : VAULT_CHANGED;
    }
}

static int reply_value(struct tm_request *rq, const struct place *place, int status_found)
{
    int status = VAULT_CHANGED;

    for (int attempts = 0; status == VAULT_CHANGED && attempts < ATTEMPTS; attempts++) {
        tm_reply_reset(rq);
        status = reply_pieces(rq, place);
    }
    if (status == VAULT_CHANGED || status == VAULT_NOT_FOUND)
        tm_reply_reset(rq);
    if (status == VAULT_CHANGED)
        return TM_E_BUSY;
    if (status == VAULT_NOT_FOUND && status_found == VAULT_CHANGED)
        return tm_reply(rq, &(struct vault_value){0}, sizeof(struct vault_value)) ? TM_E_SPACE : VAULT_CHANGED;
    return status ? status : status_found;
}

TM_ECALL(get)
{
    struct place place;

    return read_name(rq, &place) ? reply_value(rq, &place, 0) : TM_E_ARGUMENT;
}

TM_ECALL(put)
{
    struct vault_version version;
    struct place place;
    struct value value;
    uint64_t expected;
    int status = read_put(rq, &place, &value, &expected);

    if (status)
        return status;
    if (expected)
        return TM_E_ARGUMENT;
    /* What does not fit must not be done. */
    if (tm_reply_room(rq) < sizeof(version))
        return tm_reply(rq, &(struct vault_version){0}, sizeof(version));
    status = table_put(&place, &value, NULL);
    if (status)
        return status;
    version.version = value.version;
    return tm_reply(rq, &version, sizeof(version));
}

TM_ECALL(compare_and_swap)
{
    struct vault_version version;
    struct place place;
    struct value value;
    uint64_t expected;
    int status = read_put(rq, &place, &value, &expected);

    if (status)
        return status;
    if (tm_reply_room(rq) < sizeof(version))
        return tm_reply(rq, &(struct vault_version){0}, sizeof(version));
    status = table_put(&place, &value, &expected);
    if (status == VAULT_CHANGED)
        return reply_value(rq, &place, VAULT_CHANGED);
    if (status)
        return status;
    version.version = value.version;
    return tm_reply(rq, &version, sizeof(version));
}

TM_ECALL(delete)
{
    struct place place;

    return read_name(rq, &place) ? table_delete(&place) : TM_E_ARGUMENT;
}

static bool read_scan(const struct tm_request *rq, struct place *prefix, uint64_t *cursor)
{
    struct vault_scan scan;

    if (rq->in_len < sizeof(scan))
        return false;
    memcpy(&scan, rq->in, sizeof(scan));
    *cursor = scan.cursor;
    return !scan.reserved && !scan.reserved2 && scan.prefix_length <= VAULT_KEY_MAX &&
           rq->in_len == sizeof(scan) + scan.prefix_length &&
           name_place(prefix, scan.space, rq->in + sizeof(scan), scan.prefix_length);
}

/*
 * A page of records in a block of the heap, or in `small` when the heap is full: that
 * must not keep anybody from looking what to delete.  As many as the caller has room
 * for; when not even one bucket fits, TM_E_SPACE and the length that would do.
 */
static int scan(struct tm_request *rq, bool with_values, size_t overhead, struct place *prefix,
                struct vault_page *page, uint8_t *small, void **block, size_t *length)
{
    size_t most = tm_reply_room(rq) > overhead ? tm_reply_room(rq) - overhead : 1;
    size_t room = most < VAULT_PAGE_BYTES ? most : VAULT_PAGE_BYTES;
    uint64_t cursor;
    int status;

    *block = NULL;
    if (!read_scan(rq, prefix, &cursor))
        return TM_E_ARGUMENT;
    for (;;) {
        *block = tm_alloc(room);
        if (!*block && room > SMALL_PAGE)
            room = SMALL_PAGE;
        status = table_scan(prefix, with_values, *block ? *block : small, room, cursor, length, &page->count,
                            &page->next);
        if (status != TM_E_SPACE || *length > most)
            break;
        /* One bucket has more than a page, and the caller the room for it. */
        if (!*block)
            return TM_E_NOMEM;
        tm_free(*block);
        room = *length;
    }
    if (status == TM_E_SPACE)
        rq->out_len = overhead + *length;
    if (status) {
        tm_free(*block);
        *block = NULL;
    }
    return status;
}

TM_ECALL(list)
{
    uint8_t small[SMALL_PAGE];
    struct vault_page page = {0};
    struct place prefix;
    void *block;
    size_t length;
    int status = scan(rq, false, sizeof(page), &prefix, &page, small, &block, &length);

    if (status)
        return status;
    tm_reply(rq, &page, sizeof(page));
    status = tm_reply(rq, block ? block : small, length);
    tm_free(block);
    return status;
}

/* What an export is bound to: nobody else can import it. */
struct binding {
    uint8_t label[16];
    uint8_t space;
    uint8_t reserved[15];
    uint8_t principal[32];
};

static struct binding binding_of(const struct place *place)
{
    struct binding binding = {.label = "vault export 1", .space = place->space};

    memcpy(binding.principal, place->principal, sizeof(binding.principal));
    return binding;
}

TM_ECALL(export)
{
    struct vault_page page = {0};
    struct place prefix;
    struct binding binding;
    uint8_t small[SMALL_PAGE];
    void *block, *sealed;
    size_t length;
    int status = scan(rq, true, sizeof(page) + TM_SEAL_OVERHEAD, &prefix, &page, small, &block, &length);

    if (status)
        return status;
    status = tm_try_alloc(length + TM_SEAL_OVERHEAD, &sealed);
    if (!status) {
        binding = binding_of(&prefix);
        status = tm_seal(SGX_KEYPOLICY_MRSIGNER, &binding, sizeof(binding), block ? block : small, length, sealed);
    }
    if (!status)
        status = tm_reply(rq, &page, sizeof(page));
    if (!status)
        status = tm_reply(rq, sealed, length + TM_SEAL_OVERHEAD);
    tm_free(block);
    tm_free(sealed);
    return status;
}

/* Ours, since the seal was right; still no length is believed. */
static int import_records(struct place *place, const uint8_t *records, size_t length, uint32_t *count)
{
    while (length) {
        struct vault_record record;
        struct value value;
        int status;

        if (length < sizeof(record))
            return TM_E_ARGUMENT;
        memcpy(&record, records, sizeof(record));
        records += sizeof(record);
        length -= sizeof(record);
        if (!record.key_length || record.key_length > VAULT_KEY_MAX || record.value_length > VAULT_VALUE_MAX ||
            length < (size_t)record.key_length + record.value_length)
            return TM_E_ARGUMENT;
        place->key = records;
        place->key_length = record.key_length;
        value = (struct value){.expires = record.expires,
                               .length = record.value_length,
                               .bytes = records + record.key_length};
        if (!record.expires || record.expires > tm_time()) {
            status = table_put(place, &value, NULL);
            if (status)
                return status;
            ++*count;
        }
        records += (size_t)record.key_length + record.value_length;
        length -= (size_t)record.key_length + record.value_length;
    }
    return 0;
}

TM_ECALL(import)
{
    static const uint8_t zeros[7];
    struct vault_page page = {0};
    struct vault_import head;
    struct binding binding;
    struct place place;
    void *records;
    size_t length;
    int status;

    if (rq->in_len < sizeof(head) + TM_SEAL_OVERHEAD)
        return TM_E_ARGUMENT;
    memcpy(&head, rq->in, sizeof(head));
    if (memcmp(head.reserved, zeros, sizeof(zeros)) || !name_place(&place, head.space, NULL, 0))
        return TM_E_ARGUMENT;
    if (tm_reply_room(rq) < sizeof(page))
        return tm_reply(rq, &page, sizeof(page));
    length = rq->in_len - sizeof(head) - TM_SEAL_OVERHEAD;
    status = tm_try_alloc(length, &records);
    if (status)
        return status;
    binding = binding_of(&place);
    status = tm_unseal(&binding, sizeof(binding), rq->in + sizeof(head), rq->in_len - sizeof(head), records);
    if (!status)
        status = import_records(&place, records, length, &page.count);
    tm_free(records);
    return status ? status : tm_reply(rq, &page, sizeof(page));
}

/* ---- for measuring ------------------------------------------------------------ */

TM_ECALL(empty)
{
    return 0;
}

TM_ECALL(echo)
{
    return tm_reply(rq, rq->in, rq->in_len);
}

/* The request goes out to the OCALL "echo", what comes back is the reply. */
TM_ECALL(ocall)
{
    uint8_t back[256];
    size_t length = 0;
    int status = tm_ocall("echo", rq->in, rq->in_len, back, sizeof(back), &length);

    return status ? status : tm_reply(rq, back, length);
}

TM_ECALL(add)
{
    uint64_t numbers[2];

    if (rq->in_len != sizeof(numbers))
        return TM_E_ARGUMENT;
    memcpy(numbers, rq->in, sizeof(numbers));
    numbers[0] += numbers[1];
    return tm_reply(rq, numbers, sizeof(numbers[0]));
}

TM_ECALL(report)
{
    struct sgx_targetinfo target;
    struct sgx_report report;
    uint8_t data[64];

    if (rq->in_len != sizeof(data) && rq->in_len != sizeof(data) + sizeof(target))
        return TM_E_ARGUMENT;
    memcpy(data, rq->in, sizeof(data));
    if (rq->in_len > sizeof(data))
        memcpy(&target, rq->in + sizeof(data), sizeof(target));
    tm_report(rq->in_len > sizeof(data) ? &target : NULL, data, &report);
    return tm_reply(rq, &report, sizeof(report));
}

TM_ECALL(verify)
{
    struct sgx_report report;

    if (rq->in_len != sizeof(report))
        return TM_E_ARGUMENT;
    memcpy(&report, rq->in, sizeof(report)); /* aligned */
    switch (tm_report_verify(&report)) {
    case 0:
        return 0;
    case TM_E_PLATFORM:
        return VAULT_FOREIGN;
    default:
        return VAULT_FORGED;
    }
}
