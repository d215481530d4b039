/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Control ECALLs: what the warden does on the broker's behalf.
 *
 * A warden can be killed at any instruction in here and its successor repeats the
 * operation, so each one writes what can be repeated first and commits with
 * one store last.  The slot word of a client is shared with the gate: it is only
 * ever changed by compare-and-swap.
 *
 * Slots are handled through their thread data page; the warden's own thread never
 * waits for a lock here.
 */
#include "crypto.h"
#include "io.h"
#include "thread.h"

_Atomic uint32_t tm_control_state;
uint64_t tm_control_key[2];
uint8_t tm_mac_key[32];
static _Atomic uint64_t last_sequence;

struct rela {
    uint64_t offset;
    uint64_t info;
    int64_t addend;
};

/* R_X86_64_RELATIVE only (the linker is told to accept nothing else). */
static void relocate(void)
{
    const struct rela *rela = (const void *)(enclave_base() + header()->rela_offset);

    for (uint64_t i = 0; i < header()->rela_count; i++) {
        if ((uint32_t)rela[i].info != 8)
            tm_panic();
        *(uint64_t *)(enclave_base() + rela[i].offset) = enclave_base() + (uint64_t)rela[i].addend;
    }
}

/*
 * NONE -> KEYED: nothing is believed before this store, so a death before it
 * leaves an enclave that takes a key.  KEYED -> READY: tm_on_start() has run.
 * Needs CSSA 0: author's code wants a stack of its own.
 */
static int64_t set_key(uint64_t cssa, uint64_t key0, uint64_t key1)
{
    static const uint8_t label[TM_LABEL_SIZE] = TM_MACKEY_LABEL;

    if (tm_control_state == CONTROL_NONE) {
        if (!(key0 | key1))
            return TM_E_ARGUMENT;
        relocate();
        tm_control_key[0] = key0;
        tm_control_key[1] = key1;
        hmac_sha256(tm_control_key, sizeof(tm_control_key), label, sizeof(label), tm_mac_key);
        tm_control_state = CONTROL_KEYED;
    }
    if (tm_control_state == CONTROL_KEYED) {
        int status;

        if (cssa || thread_self()->fixed.index >= TM_WARDEN_SLOTS)
            return TM_E_STATE;
        /* A warden that died in here may not have been forgotten yet (REINIT): its record must not come later. */
        for (uint64_t slot = 0; slot < TM_WARDEN_SLOTS; slot++)
            thread_recover(thread_of(slot));
        heap_start();
        status = tm_on_start();
        if (status)
            return status;
        tm_control_state = CONTROL_READY;
    }
    return 0;
}

/*
 * Work that takes locks and runs author's code wants a stack that is its own.  Asked before the sequence is used up:
 * who was interrupted in this TCS may be anybody with the descriptor, and the warden asks again through the other.
 */
static bool wants_whole_stack(uint32_t op)
{
    return op == TM_CTL_RESET || op == TM_CTL_AUTHOR;
}

/* Take the sequence number: larger than all before, used up even if we die now. */
static int check_mac(const struct tm_control *request)
{
    uint8_t text[TM_LABEL_SIZE + offsetof(struct tm_control, result) + sizeof(request->data)] =
        TM_CONTROL_LABEL;
    uint8_t mac[32];
    uint64_t last;

    memcpy(text + TM_LABEL_SIZE, request, offsetof(struct tm_control, result));
    memcpy(text + TM_LABEL_SIZE + offsetof(struct tm_control, result), request->data,
           sizeof(request->data));
    hmac_sha256(tm_mac_key, sizeof(tm_mac_key), text, sizeof(text), mac);
    tm_wipe(text, sizeof(text));
    if (tm_compare(mac, request->mac, sizeof(mac)))
        return TM_E_MAC;
    last = last_sequence;
    do {
        if (request->sequence <= last)
            return TM_E_MAC;
    } while (!__atomic_compare_exchange_n((uint64_t *)&last_sequence, &last, request->sequence, false,
                                          __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return 0;
}

static bool swap_word(struct thread *thread, uint64_t *expected, uint64_t desired)
{
    return __atomic_compare_exchange_n((uint64_t *)&thread->word, expected, desired, false,
                                       __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* Key first, word last: until the word says ARMED the gate looks at no key. */
static int64_t arm(struct thread *thread, const struct tm_control *request)
{
    uint64_t word = thread->word, key[2];

    memcpy(key, request->key, sizeof(key));
    if (!(key[0] | key[1]) || !request->generation || request->generation >> 40)
        return TM_E_ARGUMENT;
    if (word == TM_WORD(request->generation, TM_SLOT_ARMED))
        return tm_compare(key, thread->key, sizeof(key)) ? TM_E_STATE : 0;
    if ((word & 0xff) != TM_SLOT_FREE || request->generation <= TM_WORD_GENERATION(word) || thread->used)
        return TM_E_STATE;
    thread->fixed.canary = random_word();
    __atomic_store_n(&thread->key[0], key[0], __ATOMIC_RELAXED);
    __atomic_store_n(&thread->key[1], key[1], __ATOMIC_RELAXED);
    return swap_word(thread, &word, TM_WORD(request->generation, TM_SLOT_ARMED)) ? 0 : TM_E_STATE;
}

/*
 * What was begun for the slot is forgotten; its blocks are in the slot's list, and freed with the others when the slot is
 * next scrubbed.  Until then they are in no account of the image's: whoever gets the slot has so much more of the heap
 * than it knows of.
 */
static void forget_half(struct thread *thread)
{
    memset(thread->user, 0, sizeof(thread->user));
    tm_on_slot_reset((uint32_t)thread->fixed.index);
    __atomic_store_n(&thread->half_ready, false, __ATOMIC_RELEASE);
}

/*
 * The image may make something ready in a slot that waits for its holder, who has no key yet.  That it needs a RESET
 * stands there first.  A warden that dies in here leaves a slot that is armed: its successor forgets what was
 * begun, and does not begin again.
 */
static void make_ready(struct thread *self, struct thread *thread)
{
    bool touched;

    thread->used = TM_WORD_GENERATION(thread->word);
    __atomic_store_n(&thread->half_ready, true, __ATOMIC_RELEASE);
    self->for_slot = thread;
    touched = tm_on_slot_armed((uint32_t)thread->fixed.index);
    tm_assert(!self->lock_count);
    self->for_slot = NULL;
    if (!touched)
        __atomic_store_n(&thread->used, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&thread->half_ready, false, __ATOMIC_RELEASE);
}

static int64_t arm_ready(struct thread *self, uint64_t cssa, struct thread *thread, const struct tm_control *request)
{
    bool again = (thread->word & 0xff) == TM_SLOT_ARMED;
    int64_t status = arm(thread, request);

    if (status)
        return status;
    if (thread->half_ready)
        forget_half(thread);
    else if (!again && !request->argument && !cssa && self->fixed.index < TM_WARDEN_SLOTS)
        make_ready(self, thread); /* author's code wants a stack of its own */
    return 0;
}

/*
 * The word first, then the key: an entry that compared the key in between fails
 * at its swap.  A slot in use keeps its state and gets the cleared bit.
 */
static int64_t clear(struct thread *thread, uint64_t generation)
{
    uint64_t word = thread->word, next;

    do {
        if (TM_WORD_GENERATION(word) != generation)
            return TM_E_STATE;
        if ((word & 0xff) == TM_SLOT_ARMED)
            next = TM_WORD(generation, TM_SLOT_FREE);
        else if ((word & 0xff) == TM_SLOT_FREE)
            next = word;
        else
            next = word | TM_SLOT_CLEARED;
    } while (!swap_word(thread, &word, next));
    __atomic_store_n(&thread->key[0], 0, __ATOMIC_RELAXED);
    __atomic_store_n(&thread->key[1], 0, __ATOMIC_RELAXED);
    return 0;
}

static uint64_t frame_at(uint64_t slot, uint64_t frame)
{
    return enclave_base() + header()->ssa_offset + (slot * header()->nssa + frame) * header()->ssa_frame_size;
}

static struct sgx_gprs *frame_gprs(uint64_t slot, uint64_t frame)
{
    return (struct sgx_gprs *)frame_at(slot, frame + 1) - 1;
}

/* No key opens this generation of the slot any more. */
static bool is_cleared(uint64_t word, uint64_t generation)
{
    return TM_WORD_GENERATION(word) == generation &&
           ((word & TM_SLOT_CLEARED) || (word & 0xff) == TM_SLOT_FREE);
}

/*
 * Stack, thread data from the nonce on, SSA frames.  `used` is wiped last: a death
 * in between leaves a slot that cannot be armed before RESET came again.
 * Blocks are freed with a lock and a redo record of our own: `may_free` on a warden's
 * thread that has none under way.
 */
static void scrub(uint64_t slot, struct thread *thread, bool may_free)
{
    uint64_t used = thread->used;
    uint8_t *from = (uint8_t *)&thread->nonce, *to = (uint8_t *)&thread->calls;

    thread_recover(thread);
    if (!used)
        thread->used = TM_WORD_GENERATION(thread->word) + 1;
    if (may_free)
        owned_release(thread);
    io_release(thread);
#ifndef TM_TEST_NO_SCRUB
    memset((void *)(enclave_base() + thread->fixed.stack_top - header()->stack_size), 0,
           header()->stack_size);
    memset((void *)(enclave_base() + header()->ssa_offset +
                    slot * header()->nssa * header()->ssa_frame_size),
           0, (uint64_t)header()->nssa * header()->ssa_frame_size);
    thread->fixed.canary = random_word();
    memset(from, 0, offsetof(struct thread, used) - offsetof(struct thread, nonce));
    from = (uint8_t *)&thread->used + sizeof(thread->used);
    memset(from, 0, (size_t)(to - from));
#else
    (void)slot;
    (void)from;
    (void)to;
#endif
    if (!is_wardens(slot))
        tm_on_slot_reset((uint32_t)slot);
    __atomic_store_n(&thread->used, 0, __ATOMIC_RELEASE);
}

static int64_t reset(struct thread *self, struct thread *thread, uint64_t slot)
{
    if (self->fixed.index >= TM_WARDEN_SLOTS || is_wardens(slot) || (thread->word & 0xff) != TM_SLOT_FREE)
        return TM_E_STATE;
    scrub(slot, thread, true);
    return 0;
}

/* Frames 0 .. count-1 of another TCS leave to the landing page when resumed. */
static int64_t rewrite(struct thread *self, struct thread *thread, const struct tm_control *request)
{
    uint64_t word = thread->word, slot = request->slot;

    if (thread == self || request->argument > header()->nssa || (!is_wardens(slot) && !request->generation))
        return TM_E_ARGUMENT;
    if (!is_wardens(slot) && !is_cleared(word, request->generation))
        return TM_E_STATE;
    tm_gate_rewrite(frame_at(slot, 0), request->argument, header()->ssa_frame_size, (uint64_t)thread);
    if (!is_wardens(slot) && !swap_word(thread, &word, TM_WORD(request->generation, TM_SLOT_FREE)))
        return TM_E_STATE;
    return 0;
}

/* Locks and pending operations of the warden thread that is no more. */
static int64_t reinit(struct thread *self, uint64_t cssa, struct thread *thread, uint64_t slot)
{
    if (!is_wardens(slot) || thread == self)
        return TM_E_ARGUMENT;
    scrub(slot, thread, !cssa && self->fixed.index < TM_WARDEN_SLOTS);
    if (slot >= TM_WARDEN_SLOTS)
        io_retake();
    return 0;
}

static bool rip_is_told(const struct sgx_report *report)
{
    static const uint8_t sim_cpusvn[16] = SGX_SIM_CPUSVN;

    return (header()->flags & TM_IMAGE_DEBUG) || !memcmp(report->cpusvn, sim_cpusvn, sizeof(sim_cpusvn));
}

/* Of a frame that was rewritten already: what it was before (entry.S, reset_frame). */
static int64_t ssa(uint64_t slot, uint64_t frame, struct tm_control_result *result)
{
    const struct sgx_gprs *gprs = frame_gprs(slot, frame);
    uint8_t nothing[64] = {0};
    struct sgx_report report;
    uint64_t rip;

    if (frame >= header()->nssa)
        return TM_E_ARGUMENT;
    tm_report(NULL, nothing, &report);
    result->exitinfo = gprs->exitinfo;
    if (report.miscselect & SGX_MISC_EXINFO)
        result->maddr = ((const struct sgx_exinfo *)gprs - 1)->maddr;
    rip = gprs->rip == (uint64_t)tm_gate_reset ? gprs->r14 : gprs->rip;
    if (rip_is_told(&report))
        result->rip = rip - enclave_base() < header()->size ? rip - enclave_base() : rip;
    return 0;
}

/* `data`: TARGETINFO's first 64 bytes, then 64 of REPORTDATA. */
static int64_t report(const struct tm_control *request, struct tm_control_result *result)
{
    struct sgx_targetinfo target = {0};
    struct sgx_report report;
    uint8_t none[64] = {0};

    memcpy(&target, request->data, 64);
    tm_report(memcmp(request->data, none, sizeof(none)) ? &target : NULL, request->data + 64, &report);
    memcpy(result->data, &report, sizeof(report));
    result->length = sizeof(report);
    return 0;
}

static bool needs_mac(uint32_t op)
{
    return op == TM_CTL_ARM || op == TM_CTL_CLEAR || op == TM_CTL_RESET || op == TM_CTL_REWRITE ||
           op == TM_CTL_REINIT || op == TM_CTL_TIME || op == TM_CTL_AUTHOR || op == TM_CTL_STORAGE ||
           op == TM_CTL_LENT;
}

static int64_t control(struct thread *self, const struct tm_control *request, uint64_t cssa,
                       uint64_t key0, uint64_t key1, struct tm_control_result *result)
{
    /* PROBE is about the TCS that was entered, not about request->slot. */
    bool probe = request->op == TM_CTL_PROBE;
    struct thread *thread;

    if (request->reserved)
        return TM_E_ARGUMENT;
    if (request->op == TM_CTL_SET_KEY) {
        memcpy(result->data, (const void *)header(), sizeof(struct tm_image_header));
        result->length = sizeof(struct tm_image_header);
        return set_key(cssa, key0, key1);
    }
    if (tm_control_state == CONTROL_NONE)
        return TM_E_NOTREADY;
    if (request->slot >= slot_count())
        return TM_E_ARGUMENT;
    if (cssa && wants_whole_stack(request->op))
        return TM_E_INTERRUPTED;
    if (needs_mac(request->op)) {
        int status = check_mac(request);

        if (status)
            return status;
    }
    thread = probe ? self : thread_of(request->slot);
    result->word = thread->word;
    result->calls = thread->calls;
    if (probe)
        return 0;
    if (request->op == TM_CTL_REWRITE)
        return rewrite(self, thread, request);
    if (request->op == TM_CTL_REINIT)
        return reinit(self, cssa, thread, request->slot);
    if (request->op == TM_CTL_SSA)
        return ssa(request->slot, request->argument, result);
    if (tm_control_state != CONTROL_READY)
        return TM_E_NOTREADY;

    int64_t status;
    switch (request->op) {
    case TM_CTL_ARM:
        status = is_wardens(request->slot) ? TM_E_ARGUMENT : arm_ready(self, cssa, thread, request);
        break;
    case TM_CTL_CLEAR:
        status = is_wardens(request->slot) ? TM_E_ARGUMENT : clear(thread, request->generation);
        break;
    case TM_CTL_RESET:
        status = reset(self, thread, request->slot);
        break;
    case TM_CTL_TIME:
        time_set(request->argument);
        status = 0;
        break;
    case TM_CTL_AUTHOR:
        /* Author's code runs on a warden's own stack only. */
        status = self->fixed.index >= TM_WARDEN_SLOTS ? TM_E_STATE : author_control(request->data, result);
        break;
    case TM_CTL_REPORT:
        status = report(request, result);
        break;
    case TM_CTL_STORAGE:
        status = io_storage(request->argument);
        break;
    case TM_CTL_LENT:
        result->data[0] = (uint8_t)io_lent(thread, (const char *)request->data);
        result->length = 1;
        status = 0;
        break;
    default:
        status = TM_E_UNKNOWN;
    }
    result->word = thread->word;
    return status;
}

struct gate_result tm_gate_control(uint64_t address, uint64_t cssa, uint64_t key0, uint64_t key1)
{
    struct thread *self = thread_self();
    struct tm_control_result result = {.cssa = cssa, .abi_version = TM_ABI_VERSION};
    struct tm_control request;
    struct gate_result out = {TM_E_ARGUMENT, 0};

    if (!range_outside(address, sizeof(request)))
        return out;
    memcpy(&request, (const void *)address, sizeof(request));
    if (request.result && !range_outside(request.result, sizeof(result)))
        return out;
    out.status = control(self, &request, cssa, key0, key1, &result);
    tm_wipe(request.key, sizeof(request.key));
    if (request.result)
        memcpy((void *)request.result, &result, sizeof(result));
    out.length = result.length;
    if (self->fixed.index < TM_WARDEN_SLOTS)
        self->calls++;
    return out;
}
