/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An SDK enclave that goes wrong on request, and shows its insides to tests.
 * Numbers in requests and replies are u64, little endian.
 */
#include "tmsdk.h"

#define PATTERN 0x7365637265743a29ull

static struct tm_mutex mutex, other;
static struct tm_cond cond;
static uint64_t counter;
static volatile uint64_t zero;
static bool reset_hangs;
static uint64_t resets;

static uint64_t argument(const struct tm_request *rq, size_t n)
{
    uint64_t value = 0;

    if (rq->in_len >= (n + 1) * sizeof(value))
        memcpy(&value, rq->in + n * sizeof(value), sizeof(value));
    return value;
}

static int answer(struct tm_request *rq, uint64_t value)
{
    return tm_reply(rq, &value, sizeof(value));
}

static int forever(void)
{
    while (!zero)
        __builtin_ia32_pause();
    return 0;
}

/* ---- faults --------------------------------------------------------------------- */

TM_ECALL(divide)
{
    return answer(rq, argument(rq, 0) / zero);
}

/* The tests look for this line by its mark. */
static __attribute__((noinline)) void fault_at_known_line(void)
{
    *(volatile uint64_t *)(zero + 16) = 1; /* FAULT LINE */
}

TM_ECALL(fault_line)
{
    fault_at_known_line();
    return 0;
}

TM_ECALL(illegal)
{
    __asm__ volatile("ud2");
    return 0;
}

TM_ECALL(cpuid)
{
    uint32_t a = 0, b, c, d;

    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d));
    return answer(rq, b);
}

TM_ECALL(panic)
{
    tm_panic();
}

TM_ECALL(smash)
{
    volatile uint8_t small[16];
    uint64_t length = argument(rq, 0);

    for (uint64_t i = 0; i < length; i++)
        small[i] = 0x41;
    return small[0] == 0x42;
}

/* In the middle of the call's own stack's guard: below the lowest byte. */
TM_ECALL(overflow_stack)
{
    const struct tm_image_header *header = tm_enclave_base();
    uint64_t slot = tm_caller().slot;
    uint64_t bottom = header->stack_offset + slot * header->stack_stride;

    *(volatile uint8_t *)((uint64_t)header + bottom - 8) = 1;
    return 0;
}

/* Read and write anywhere: addresses that the caller names. */
TM_ECALL(peek)
{
    return answer(rq, *(volatile uint64_t *)argument(rq, 0));
}

TM_ECALL(poke)
{
    *(volatile uint64_t *)argument(rq, 0) = argument(rq, 1);
    return 0;
}

TM_ECALL(loop)
{
    return forever();
}

TM_ECALL(loop_locked)
{
    int status = tm_lock(&mutex);

    if (status)
        return status;
    return forever();
}

TM_ECALL(keep_lock)
{
    return tm_lock(&mutex);
}

/* ---- control ---------------------------------------------------------------------- */

TM_CONTROL(hang)
{
    return forever();
}

TM_CONTROL(hang_locked)
{
    int status = tm_lock(&mutex);

    /* The last one who hung here is dead; its lock is ours now. */
    return status && status != TM_E_OWNERDEAD ? status : forever();
}

TM_CONTROL(crash)
{
    *(volatile uint64_t *)(zero + 16) = 0;
    return 0;
}

TM_CONTROL(echo)
{
    return tm_reply(rq, rq->in, rq->in_len);
}

TM_CONTROL(lock)
{
    int status = tm_lock(&mutex);

    if (status == TM_E_OWNERDEAD)
        tm_mutex_consistent(&mutex);
    if (!status || status == TM_E_OWNERDEAD)
        tm_unlock(&mutex);
    return status;
}

TM_CONTROL(reset_hangs)
{
    reset_hangs = argument(rq, 0);
    return 0;
}

void tm_on_slot_reset(uint32_t slot)
{
    (void)slot;
    resets++;
    while (*(volatile bool *)&reset_hangs)
        __builtin_ia32_pause();
}

TM_ECALL(resets)
{
    return answer(rq, resets);
}

/* ---- data in and out ----------------------------------------------------------------- */

TM_ECALL(empty)
{
    return 0;
}

TM_ECALL(echo)
{
    return tm_reply(rq, rq->in, rq->in_len);
}

TM_ECALL(status)
{
    return (int)(int64_t)argument(rq, 0);
}

/* So many bytes of output. */
TM_ECALL(produce)
{
    uint8_t block[256];
    uint64_t left = argument(rq, 0);
    int status = 0;

    memset(block, 0x5a, sizeof(block));
    while (left) {
        size_t some = left < sizeof(block) ? left : sizeof(block);

        status = tm_reply(rq, block, some);
        left -= some;
    }
    return status;
}

TM_ECALL(caller)
{
    struct tm_caller caller = tm_caller();

    return tm_reply(rq, &caller, sizeof(caller));
}

TM_ECALL(time)
{
    return answer(rq, tm_time());
}

TM_ECALL(random)
{
    uint8_t bytes[32];

    tm_random(bytes, sizeof(bytes));
    return tm_reply(rq, bytes, sizeof(bytes));
}

TM_ECALL(print)
{
    tm_print("%s %d %u %x %lu %c%%\n", "printed", -5, 7u, 0xbeefu, 12345678901ul, 'c');
    return 0;
}

/* Operation, target, source, length, then 1024 bytes: what they are after memcpy, memmove or memset. */
TM_ECALL(memory)
{
    uint8_t bytes[1024];
    uint64_t to = argument(rq, 1), from = argument(rq, 2), length = argument(rq, 3);

    if (rq->in_len != 32 + sizeof(bytes) || to > sizeof(bytes) || from > sizeof(bytes) ||
        length > sizeof(bytes) - (to > from ? to : from))
        return TM_E_ARGUMENT;
    memcpy(bytes, rq->in + 32, sizeof(bytes));
    if (argument(rq, 0) == 0)
        memcpy(bytes + to, bytes + from, length);
    else if (argument(rq, 0) == 1)
        memmove(bytes + to, bytes + from, length);
    else
        memset(bytes + to, (int)from, length);
    return tm_reply(rq, bytes, sizeof(bytes));
}

/* ---- OCALLs ------------------------------------------------------------------------ */

/* The request goes to the OCALL "echo", what comes back is the reply. */
TM_ECALL(ocall)
{
    uint8_t back[2048];
    size_t length;
    int status = tm_ocall("echo", rq->in, rq->in_len, back, sizeof(back), &length);

    return status ? status : tm_reply(rq, back, length);
}

TM_ECALL(ocall_twice)
{
    uint8_t first[64], second[64];
    size_t one, two;
    int status = tm_ocall("first", rq->in, rq->in_len, first, sizeof(first), &one);

    if (!status)
        status = tm_ocall("second", first, one, second, sizeof(second), &two);
    return status ? status : tm_reply(rq, second, two);
}

TM_ECALL(ocall_locked)
{
    size_t length;
    int status = tm_lock(&mutex);

    if (status)
        return status;
    status = tm_ocall("echo", NULL, 0, NULL, 0, &length);
    tm_unlock(&mutex);
    return status;
}

/* ---- secrets ------------------------------------------------------------------------- */

/*
 * Leave a pattern wherever a call can: stack, slot data, XMM and general
 * registers.  The next holder of the slot must not find it.
 */
TM_ECALL(plant)
{
    volatile uint64_t deep[2048];
    uint64_t *data = tm_slot_data();

    for (size_t i = 0; i < 2048; i++)
        deep[i] = PATTERN;
    for (size_t i = 0; i < TM_SLOT_DATA / 8; i++)
        data[i] = PATTERN;
    __asm__ volatile("movq %0, %%xmm0\n\tpunpcklqdq %%xmm0, %%xmm0\n\t"
                     "movdqa %%xmm0, %%xmm7\n\tmovdqa %%xmm0, %%xmm15\n\t"
                     "movq %0, %%r10\n\tmovq %0, %%r11\n\tmovq %0, %%r12\n\tmovq %0, %%r15\n\t"
                     "std\n\tcld"
                     :
                     : "r"(PATTERN)
                     : "xmm0", "xmm7", "xmm15", "r10", "r11", "r12", "r15", "cc");
    return deep[17] == 0;
}

/* The pattern in registers until the word of the caller's is not 0: interrupts save it. */
TM_ECALL(spin_with_secret)
{
    const volatile uint64_t *word = (void *)argument(rq, 0);

    if (!tm_is_outside((void *)word, sizeof(*word)))
        return TM_E_ARGUMENT;
    __asm__ volatile("movq %0, %%xmm5\n\tmovq %0, %%r12\n"
                     "1:\tpause\n\tcmpq $0, (%1)\n\tje 1b\n\txorl %%r12d, %%r12d\n\tpxor %%xmm5, %%xmm5"
                     :
                     : "r"(PATTERN), "r"(word)
                     : "r12", "xmm5", "cc", "memory");
    return 0;
}

/*
 * The same wherever a call can have it, and there it stays: in an OCALL (argument 1), or
 * on and on until somebody ends it.  Each interrupt saves the registers.
 */
TM_ECALL(hold_secrets)
{
    volatile uint64_t deep[1024];
    uint64_t *data = tm_slot_data();
    size_t length;

    for (size_t i = 0; i < 1024; i++)
        deep[i] = PATTERN;
    for (size_t i = 0; i < TM_SLOT_DATA / 8; i++)
        data[i] = PATTERN;
    if (argument(rq, 0))
        return tm_ocall("echo", NULL, 0, NULL, 0, &length) + (deep[17] == 0);
    __asm__ volatile("movq %0, %%rax\n\tmovq %%rax, %%xmm0\n\tpunpcklqdq %%xmm0, %%xmm0\n\t"
                     "movdqa %%xmm0, %%xmm3\n\tmovdqa %%xmm0, %%xmm15\n\t"
                     "movq %%rax, %%rbx\n\tmovq %%rax, %%rdx\n\tmovq %%rax, %%rsi\n\tmovq %%rax, %%r9\n\t"
                     "movq %%rax, %%r12\n\tmovq %%rax, %%r15\n"
                     "1:\tpause\n\tjmp 1b"
                     :
                     : "r"(PATTERN)
                     : "rax", "rbx", "rdx", "rsi", "r9", "r12", "r15", "xmm0", "xmm3", "xmm15", "cc", "memory");
    __builtin_unreachable();
}

static uint64_t occurrences(const volatile uint64_t *from, uint64_t bytes)
{
    uint64_t found = 0, inverse = ~PATTERN;

    /* Not with the pattern in a register: an interrupt would save it where we look. */
    __asm__ volatile("" : "+r"(inverse));
    for (uint64_t i = 0; i < bytes / 8; i++)
        found += ~from[i] == inverse;
    return found;
}

/* How often the pattern is left in this slot's stack, in its data and its SSA frames. */
TM_ECALL(search)
{
    const struct tm_image_header *header = tm_enclave_base();
    uint64_t base = (uint64_t)header, slot = tm_caller().slot, found[3];

    found[0] = occurrences((void *)(base + header->stack_offset + slot * header->stack_stride),
                           header->stack_size);
    found[1] = occurrences(tm_slot_data(), TM_SLOT_DATA);
    found[2] = occurrences((void *)(base + header->ssa_offset + slot * header->nssa * header->ssa_frame_size),
                           (uint64_t)header->nssa * header->ssa_frame_size);
    return tm_reply(rq, found, sizeof(found));
}

/*
 * The same of another slot, by its number: stack, page of thread data, XSAVE areas and
 * general registers of its SSA frames.
 */
TM_ECALL(search_slot)
{
    const struct tm_image_header *header = tm_enclave_base();
    uint64_t base = (uint64_t)header, slot = argument(rq, 0), found[4] = {0};
    uint64_t frame = base + header->ssa_offset + slot * header->nssa * header->ssa_frame_size;

    if (slot >= TM_WARDEN_SLOTS + header->io_slots + header->client_slots)
        return TM_E_ARGUMENT;
    found[0] = occurrences((void *)(base + header->stack_offset + slot * header->stack_stride),
                           header->stack_size);
    found[1] = occurrences((void *)(base + header->td_offset + slot * header->td_stride), 4096);
    for (uint32_t n = 0; n < header->nssa; n++, frame += header->ssa_frame_size) {
        uint64_t gprs = header->ssa_frame_size - sizeof(struct sgx_gprs);

        found[2] += occurrences((void *)frame, gprs);
        found[3] += occurrences((void *)(frame + gprs), sizeof(struct sgx_gprs));
    }
    return tm_reply(rq, found, sizeof(found));
}

/* ---- locks ---------------------------------------------------------------------------- */

/* A holder's death is told once; what it left is a counter, which is always right. */
static int take(struct tm_mutex *which)
{
    int status = tm_lock(which);

    if (status == TM_E_OWNERDEAD) {
        tm_mutex_consistent(which);
        tm_unlock(which);
    }
    return status;
}

/* Add 1 under the lock, so often. */
TM_ECALL(count)
{
    for (uint64_t n = argument(rq, 0); n; n--) {
        int status = take(&mutex);

        if (status)
            return status;
        counter = *(volatile uint64_t *)&counter + 1;
        tm_unlock(&mutex);
    }
    return answer(rq, counter);
}

/* The same with another lock held: the nested wait does not leave. */
TM_ECALL(count_nested)
{
    for (uint64_t n = argument(rq, 0); n; n--) {
        int status = tm_lock(&other);

        if (status)
            return status;
        status = tm_lock(&mutex);
        if (!status) {
            counter = *(volatile uint64_t *)&counter + 1;
            tm_unlock(&mutex);
        }
        tm_unlock(&other);
        if (status)
            return status;
    }
    return answer(rq, counter);
}

TM_ECALL(patience)
{
    tm_lock_patience = (uint32_t)argument(rq, 0);
    return 0;
}

/* Wait until the counter is at least so much. */
TM_ECALL(await)
{
    int status = tm_lock(&mutex);

    while (!status && counter < argument(rq, 0))
        status = tm_cond_wait(&cond, &mutex);
    if (status)
        return status;
    tm_unlock(&mutex);
    return answer(rq, counter);
}

TM_ECALL(raise)
{
    int status = tm_lock(&mutex);

    if (status)
        return status;
    counter += argument(rq, 0);
    tm_unlock(&mutex);
    tm_cond_broadcast(&cond);
    return 0;
}

/* ---- heap ------------------------------------------------------------------------------- */

#define HANDLES 64u
static uint8_t *blocks[HANDLES];
static uint64_t sizes[HANDLES];

static int extend_handle(uint64_t handle, uint64_t size, uint64_t *extended)
{
    int status;

    if (!blocks[handle] || size <= sizes[handle])
        return 0;
    status = tm_extend(blocks[handle], size);
    if (status)
        return status == TM_E_NOMEM ? 0 : status;
    if (tm_block_size(blocks[handle]) < size)
        return 103;
    for (uint64_t n = sizes[handle]; n < size; n++)
        if (blocks[handle][n])
            return 104;
    memset(blocks[handle], (int)handle, size);
    sizes[handle] = size;
    ++*extended;
    return 0;
}

/*
 * A script of three numbers each: operation, handle, size.
 *   0 free  1 allocate  2 allocate, keep, then free as the enclave's own  3 make larger where it lies, if that can be
 * Each block is filled with its handle's number and must still be so when it is freed.
 * The reply: blocks that could be allocated or made larger, then struct tm_heap_stats of a check.
 */
TM_ECALL(heap)
{
    struct tm_heap_stats stats;
    uint64_t allocated = 0;
    int status;

    for (size_t i = 0; i + 3 <= rq->in_len / 8; i += 3) {
        uint64_t operation = argument(rq, i), handle = argument(rq, i + 1) % HANDLES, size = argument(rq, i + 2);

        if (operation == 3) {
            status = extend_handle(handle, size, &allocated);
            if (status)
                return status;
            continue;
        }
        if (blocks[handle]) {
            for (uint64_t n = 0; n < sizes[handle]; n++)
                if (blocks[handle][n] != (uint8_t)handle)
                    return 100;
            tm_free(blocks[handle]);
            blocks[handle] = NULL;
        }
        if (!operation)
            continue;
        blocks[handle] = tm_alloc(size);
        sizes[handle] = size;
        if (!blocks[handle])
            continue;
        if ((uint64_t)blocks[handle] % 16 || tm_block_size(blocks[handle]) < size)
            return 101;
        for (uint64_t n = 0; n < size; n++)
            if (blocks[handle][n])
                return 102;
        memset(blocks[handle], (int)handle, size);
        allocated++;
        if (operation == 2) {
            struct tm_txn txn;

            tm_txn_begin(&txn);
            tm_txn_keep(&txn, blocks[handle]);
            tm_txn_commit(&txn);
        }
    }
    status = tm_heap_check(&stats);
    if (!status)
        status = answer(rq, allocated);
    return status ? status : tm_reply(rq, &stats, sizeof(stats));
}

/*
 * Blocks that come and go as a program's would: filled, then linked and kept in one
 * transaction; unlinked and owned in one, then freed.  The warden is killed in it.
 */
#define CHURNED 32u
static uint64_t *churned[CHURNED];

static int churn_once(uint64_t random)
{
    uint64_t size = 16 + (random >> 8) % 3000, *fresh = NULL, *old;
    size_t place = random % CHURNED;
    struct tm_txn txn;
    int status;

    if (random >> 62) {
        fresh = tm_alloc(size);
        if (!fresh)
            return TM_E_NOMEM;
        /* Half of them grow first, when there is room behind them. */
        if (random >> 61 & 1 && !tm_extend(fresh, 2 * size))
            size *= 2;
        fresh[0] = (uint64_t)fresh;
        fresh[1] = size;
        memset(fresh + 2, (int)place, size - 16);
    }
    status = tm_lock(&other);
    if (status == TM_E_OWNERDEAD)
        tm_mutex_consistent(&other);
    else if (status)
        return status;
    old = churned[place];
    tm_txn_begin(&txn);
    tm_txn_set_ptr(&txn, &churned[place], fresh);
    if (fresh)
        tm_txn_keep(&txn, fresh);
    if (old)
        tm_txn_own(&txn, old);
    tm_txn_commit(&txn);
    tm_unlock(&other);
    tm_free(old);
    return 0;
}

TM_CONTROL(churn)
{
    int status = 0;

    while (!status) {
        uint64_t random;

        tm_random(&random, sizeof(random));
        status = churn_once(random);
    }
    return status;
}

/* Every block is whole, and nothing is kept but they: blocks linked, then tm_heap_stats. */
TM_ECALL(churned)
{
    struct tm_heap_stats stats;
    uint64_t linked = 0;
    int status = tm_lock(&other);

    if (status == TM_E_OWNERDEAD)
        tm_mutex_consistent(&other);
    else if (status)
        return status;
    for (size_t i = 0; i < CHURNED; i++) {
        const uint8_t *bytes = (const uint8_t *)churned[i];

        if (!bytes)
            continue;
        linked++;
        if (churned[i][0] != (uint64_t)bytes || tm_block_size(bytes) < churned[i][1])
            status = 100;
        for (uint64_t n = 16; !status && n < churned[i][1]; n++)
            if (bytes[n] != i)
                status = 101;
    }
    tm_unlock(&other);
    if (!status || status == TM_E_OWNERDEAD)
        status = tm_heap_check(&stats);
    if (!status)
        status = answer(rq, linked);
    return status ? status : tm_reply(rq, &stats, sizeof(stats));
}

/* ---- keys --------------------------------------------------------------------------------- */

/* u64 policy, then text: sealed with the additional data "faults". */
TM_ECALL(seal)
{
    uint8_t sealed[1024 + TM_SEAL_OVERHEAD];
    size_t length = rq->in_len - 8;
    int status;

    if (rq->in_len < 8 || length > 1024)
        return TM_E_ARGUMENT;
    status = tm_seal((uint16_t)argument(rq, 0), "faults", 6, rq->in + 8, length, sealed);
    return status ? status : tm_reply(rq, sealed, length + TM_SEAL_OVERHEAD);
}

TM_ECALL(unseal)
{
    uint8_t text[1024];
    int status;

    if (rq->in_len < TM_SEAL_OVERHEAD || rq->in_len > sizeof(text) + TM_SEAL_OVERHEAD)
        return TM_E_ARGUMENT;
    status = tm_unseal("faults", 6, rq->in, rq->in_len, text);
    return status ? status : tm_reply(rq, text, rq->in_len - TM_SEAL_OVERHEAD);
}

TM_ECALL(report)
{
    uint8_t data[64] = {0};
    struct sgx_report report;

    memcpy(data, rq->in, rq->in_len < sizeof(data) ? rq->in_len : sizeof(data));
    tm_report(NULL, data, &report);
    return tm_reply(rq, &report, sizeof(report));
}
