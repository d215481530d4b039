/* SPDX-License-Identifier: Apache-2.0 */
/*
 * TeeMate's SDK for enclave authors: the one header to include.
 *
 * An enclave is a set of ECALLs that client processes call by name:
 *
 *     #include "tmsdk.h"
 *
 *     TM_ECALL(hello)
 *     {
 *         return tm_reply(rq, "hello, ", 7) ?: tm_reply(rq, rq->in, rq->in_len);
 *     }
 *
 * Many processes are inside at once, each on a slot (a TCS) of its own, and any
 * of them may be killed between two instructions.  What they share lies on the
 * heap and in global variables under struct tm_mutex, and changes in steps that
 * are right before and after each one: tm_txn makes several words one step.
 *
 * No libc: only what is declared here, <stddef.h>, <stdint.h>, <stdbool.h> and
 * <stdarg.h>.  No system calls, CPUID, thread-local variables, constructors, or
 * AVX (enclaves run with XFRM = 3 so that one measurement fits every host).
 *
 * Functions return 0 or a negative enum tm_status unless they say otherwise.
 */
#ifndef TMSDK_H
#define TMSDK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "sgx_arch.h"
#include "teemate_abi.h"

/* ---- ECALLs ---------------------------------------------------------------- */

/*
 * One ECALL under way.  `in` is a private copy, gone when the ECALL returns.
 * The rest belongs to the SDK.
 */
struct tm_request {
    const uint8_t *in;
    size_t in_len;
    uint64_t out;     /* in the caller's memory: write with tm_reply() only */
    uint64_t out_cap;
    uint64_t out_len; /* what tm_reply() was given so far; may exceed out_cap */
};

/*
 * Append to the caller's output.  TM_E_SPACE when it does not fit: what is too
 * much is only counted, so the caller learns how much it needs.  Return that
 * status from the ECALL.
 */
int tm_reply(struct tm_request *rq, const void *data, size_t length);
/* Bytes that tm_reply() can still take. */
size_t tm_reply_room(const struct tm_request *rq);
/* Forget what was replied so far. */
void tm_reply_reset(struct tm_request *rq);

typedef int tm_ecall_fn(struct tm_request *rq);

struct tm_ecall_entry {
    const char *name;
    uint64_t length;
    tm_ecall_fn *function;
};

/*
 * Define an ECALL.  It returns 0, a negative enum tm_status, or a positive number
 * of the author's; the caller gets it beside the output.  Returning TM_E_BUSY
 * without output makes the SDK tell who holds the lock (struct tm_holder).
 */
#define TM_ECALL(NAME)                                                                               \
    static int tm_ecall_##NAME(struct tm_request *rq);                                               \
    static const struct tm_ecall_entry tm_ecall_entry_##NAME                                         \
        __attribute__((section("tm_ecalls"), used, aligned(8))) = {#NAME, sizeof(#NAME) - 1, tm_ecall_##NAME}; \
    static int tm_ecall_##NAME(struct tm_request *rq __attribute__((unused)))

/*
 * Define a control ECALL: only the warden can call it, on the broker's behalf
 * (TM_CTL_AUTHOR).  At most 192 bytes of input and 448 bytes of output; no
 * OCALLs.  It may be killed at any instruction and called again.
 */
#define TM_CONTROL(NAME)                                                                             \
    static int tm_control_##NAME(struct tm_request *rq);                                             \
    static const struct tm_ecall_entry tm_control_entry_##NAME                                       \
        __attribute__((section("tm_controls"), used, aligned(8))) = {#NAME, sizeof(#NAME) - 1,         \
                                                                     tm_control_##NAME};             \
    static int tm_control_##NAME(struct tm_request *rq __attribute__((unused)))

/*
 * Define these to be told.  tm_on_start() runs once after EINIT, before any ECALL
 * (again if the warden died in it); a status other than 0 keeps the enclave from
 * starting.  tm_on_slot_reset() runs when a slot was scrubbed for its next holder.
 */
int tm_on_start(void);
void tm_on_slot_reset(uint32_t slot);
/*
 * Define this to make something ready in a slot that waits for its next holder, whoever that will be; it returns
 * whether it has touched anything of the slot's.  It runs on a warden's thread, while nobody waits for the slot but
 * perhaps for the warden, so it must not take long (milliseconds), and must wait for no lock that others keep.  What it allocates and
 * tm_slot_data() are the slot's, and tm_caller() says which; there is no identity yet.  No OCALLs.  It may be killed
 * at any instruction: then tm_slot_data() is zeroes again, tm_on_slot_reset() is called, and what it allocated is
 * freed when the slot is next scrubbed: the slot's next holder has it beside what the image counts, so bound it.
 */
bool tm_on_slot_armed(uint32_t slot);

/* ---- who calls --------------------------------------------------------------- */

struct tm_caller {
    uint32_t slot;
    uint64_t generation; /* of the slot's assignment */
    struct tm_identity identity; /* as the broker asserts it; zeros in control ECALLs */
};
struct tm_caller tm_caller(void);

/* Zeroed memory of the running slot, wiped before its next holder. */
#define TM_SLOT_DATA 1024u
void *tm_slot_data(void);

/* ---- OCALLs ------------------------------------------------------------------ */

/*
 * Call the function `name` of the calling process.  Its answer is copied to
 * `out` once; *out_len is its length.  What comes back is untrusted.
 * TM_E_OCALL: it failed or does not exist.  TM_E_SPACE: the request does not fit
 * the caller's buffer, or the answer is longer than `out_cap`.  TM_E_STATE: in a
 * control ECALL, or while holding a mutex.
 */
int tm_ocall(const char *name, const void *in, size_t in_len, void *out, size_t out_cap, size_t *out_len);

/* Print to the caller's stderr in debug images; does nothing in others.  %s %d
 * %u %x %p %c %% with l, ll and z. */
void tm_print(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- heap -------------------------------------------------------------------- */

/*
 * Zeroed memory, aligned to 16 bytes; NULL when the heap is full or its lock was
 * not to be had.  A new block is the slot's own: nobody else may free or keep it, and
 * it is freed when the slot gets its next holder, however the last one went.  Before it
 * becomes part of what is shared it has to be kept, best in the same tm_txn that links
 * it.  Blocks beyond the first 64 that a slot owns at once are freed too, but somewhat
 * later: the heap has to be searched for them.  Those of control ECALLs and of
 * tm_on_start() are a warden's own, and freed when the warden is replaced.
 */
void *tm_alloc(size_t size);
/* The same, and why not: TM_E_NOMEM, or TM_E_BUSY when the heap's lock was not to be had. */
int tm_try_alloc(size_t size, void **block);
/*
 * Make a block that is kept, or the slot's own, larger where it lies, with zeroes: TM_E_NOMEM when what follows it is
 * not free, or too little.
 */
int tm_extend(void *block, size_t size);
/*
 * NULL is fine.  Of a block that is kept, or the slot's own; panics when it is another
 * slot's.  When the heap's lock is not to be had a block of the slot's own stays so, and is
 * freed with the others at its end; so make it one (tm_txn_own) in the step that unlinks it.
 */
void tm_free(void *block);
/* Usable bytes of a block; it takes up TM_BLOCK_HEAD more. */
size_t tm_block_size(const void *block);
#define TM_BLOCK_HEAD 32u

struct tm_heap_stats {
    uint64_t size;       /* bytes */
    uint64_t used;       /* bytes, with the blocks' headers */
    uint64_t blocks;     /* in use */
    uint64_t free_blocks;
    uint64_t largest_free;
    uint64_t owned;      /* blocks that a slot owns, or owned and are yet to be freed: not kept */
};
/* A block of so many bytes there was a moment ago: the largest one's size but for a sixteenth.  Takes no lock. */
uint64_t tm_heap_room(void);
/* Walk the whole heap: 0, or TM_E_STATE when its structure is damaged. */
int tm_heap_check(struct tm_heap_stats *stats);

/* ---- several words at once ----------------------------------------------------- */

#define TM_TXN_MAX 32u

/*
 * Writes of 64-bit words that become visible to repair all at once: after a
 * death at any instruction either none of them or all of them are done.  Other
 * threads are kept out by locks, as ever.
 */
struct tm_txn {
    uint32_t count;
    uint32_t overflow;
    struct {
        uint64_t *where;
        uint64_t value;
    } writes[TM_TXN_MAX];
};
void tm_txn_begin(struct tm_txn *txn);
void tm_txn_set(struct tm_txn *txn, uint64_t *where, uint64_t value);
void tm_txn_set_ptr(struct tm_txn *txn, void *where, const void *value); /* where: pointer to a pointer */
/* Both count as two writes.  A kept block belongs to the enclave, an owned one is this slot's, to be freed. */
void tm_txn_keep(struct tm_txn *txn, void *block);
void tm_txn_own(struct tm_txn *txn, void *block);
/* Panics when more than TM_TXN_MAX writes were asked for. */
void tm_txn_commit(struct tm_txn *txn);

/* ---- locks --------------------------------------------------------------------- */

/* Zeroes are an unlocked mutex.  Owner and state lie in EPC. */
struct tm_mutex {
    _Atomic uint64_t holder;   /* 0, or generation << 16 | slot + 1, and flags */
    _Atomic uint64_t acquired; /* how often it was locked: waiters see progress */
};
struct tm_cond {
    _Atomic uint64_t signals;
};
/*
 * 0 when the mutex is ours; TM_E_OWNERDEAD when it is ours but its last holder
 * died (put its data right, then tm_mutex_consistent()); TM_E_BUSY when the same
 * holder kept it for longer than lock_patience.  At most 16 are held at once.
 * While another mutex is held the wait spins and is short.
 */
int tm_lock(struct tm_mutex *mutex);
int tm_trylock(struct tm_mutex *mutex); /* TM_E_BUSY at once */
void tm_unlock(struct tm_mutex *mutex);
void tm_mutex_consistent(struct tm_mutex *mutex);
struct tm_holder tm_mutex_holder(const struct tm_mutex *mutex);

/*
 * Leave `mutex` (the only one that is held), wait for a signal, take it again.  May
 * return without one: check the condition again.  TM_E_BUSY and TM_E_OWNERDEAD
 * are those of tm_lock(); after TM_E_BUSY the mutex is not held.
 */
int tm_cond_wait(struct tm_cond *cond, struct tm_mutex *mutex);
void tm_cond_signal(struct tm_cond *cond);
void tm_cond_broadcast(struct tm_cond *cond);

/* Waits of 100 ms without any progress of the lock before tm_lock() gives up; 20 unless set. */
extern uint32_t tm_lock_patience;

/* ---- keys and cryptography ------------------------------------------------------- */

/* RDRAND; panics when the CPU has no randomness left after many tries. */
void tm_random(void *data, size_t length);

/*
 * Nanoseconds of CLOCK_REALTIME as the host last told; never goes back; 0: not yet told.
 * Images built with `teemate image build --time` are told several times a second.
 */
uint64_t tm_time(void);

/* EREPORT.  `target` NULL: this enclave. */
void tm_report(const struct sgx_targetinfo *target, const uint8_t reportdata[64], struct sgx_report *report);

/*
 * Was this report made on this computer, by its processor, for this enclave, and is it
 * unchanged?  Only then does what it says of its maker hold; whether that is the right
 * one (MRENCLAVE or MRSIGNER, not DEBUG, ISVSVN, REPORTDATA) is still to be compared.
 * `report` lies in the enclave's memory.  TM_E_PLATFORM: it was not, and it does not even
 * claim this platform's CPUSVN (a report of the sim on SGX, and the other way round).
 * TM_E_MAC: it was made for another enclave, on another computer, or changed.
 * On the sim everybody can make reports that are right: its keys are public.
 */
int tm_report_verify(const struct sgx_report *report);

/*
 * A 128-bit key that only this enclave (SGX_KEYPOLICY_MRENCLAVE) or this signer's
 * enclaves of the same product (SGX_KEYPOLICY_MRSIGNER) can derive, for `keyid`.
 * One of the two at least, and nothing else: TM_E_ARGUMENT.
 */
int tm_seal_key(uint16_t policy, const uint8_t keyid[32], uint8_t key[16]);

#define TM_SEAL_OVERHEAD 80u
/*
 * Seal to disk and back: AES-128-GCM under a fresh key.  Output of seal is
 * length + TM_SEAL_OVERHEAD; of unseal length - TM_SEAL_OVERHEAD.  `aad` is bound,
 * not hidden.  Unseal: TM_E_MAC when it is not ours or was changed, TM_E_ARGUMENT when
 * it is no sealed blob or has another policy than seal takes.
 *
 * A blob says nothing about its age: who keeps it can bring back an older one, and
 * SGX has no counter that would tell.  Who minds has to keep a version in memory, or
 * with somebody whom the enclave trusts.
 */
int tm_seal(uint16_t policy, const void *aad, size_t aad_len, const void *in, size_t length, void *out);
int tm_unseal(const void *aad, size_t aad_len, const void *in, size_t length, void *out);

/* AES-128-GCM with a nonce of 12 bytes and a tag of 16. */
void tm_aead_seal(const uint8_t key[16], const uint8_t nonce[12], const void *aad, size_t aad_len,
                  const void *in, size_t length, void *out, uint8_t tag[16]);
int tm_aead_open(const uint8_t key[16], const uint8_t nonce[12], const void *aad, size_t aad_len,
                 const void *in, size_t length, void *out, const uint8_t tag[16]);
void tm_sha256(const void *data, size_t length, uint8_t digest[32]);

/* ---- the rest ---------------------------------------------------------------------- */

/* UD2: the call ends as EnclaveFault with this function and line. */
#define tm_panic() __builtin_trap()
#define tm_assert(condition) ((condition) ? (void)0 : tm_panic())

/* The first byte of ELRANGE: struct tm_image_header lies there. */
const void *tm_enclave_base(void);

/* Is [address, address + length) in the host's memory, without overflow? */
bool tm_is_outside(const void *address, size_t length);

void *memcpy(void *restrict to, const void *restrict from, size_t length);
void *memmove(void *to, const void *from, size_t length);
void *memset(void *to, int byte, size_t length);
int memcmp(const void *a, const void *b, size_t length);
size_t strlen(const char *text);
int strcmp(const char *a, const char *b);
/* 0 when equal; takes the same time whatever differs. */
int tm_compare(const void *a, const void *b, size_t length);
/* memset to 0 that the compiler does not drop. */
void tm_wipe(void *data, size_t length);

#endif
