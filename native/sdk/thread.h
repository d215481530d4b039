/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the SDK keeps of every slot, in the slot's thread data page (FS base),
 * and of the enclave.  entry.S uses the TD_ offsets; the rest is C.
 */
#ifndef TMSDK_THREAD_H
#define TMSDK_THREAD_H

#define TD_SELF 0x00
#define TD_INDEX 0x08
#define TD_STACK_TOP 0x10
#define TD_CANARY 0x28
#define TD_WORD 0x30
#define TD_KEY 0x38
#define TD_NONCE 0x48
#define TD_SAVED_RSP 0x50
#define HEADER_IO_SLOTS 0x10 /* of tm_image_header */
#define HEADER_NSSA 0x18
#define HEADER_SSA_FRAME_SIZE 0x1c
#define HEADER_SIZE 0x20
#define HEADER_SSA_OFFSET 0x58

#define CONTROL_STACK_SIZE 16384
#define TM_WARDEN_TCS 2 /* TM_WARDEN_SLOTS, for the assembler */

#ifndef __ASSEMBLER__

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "teemate_abi.h"
#include "tmsdk.h"

#define TD_LOCKS 16
#define TD_REDO TM_TXN_MAX
#define TD_OWNED 64

struct tm_write {
    uint64_t *where;
    uint64_t value;
};

/*
 * Static part first, then what the gate needs, then what goes with the call.
 * RESET wipes everything from `nonce` on.
 */
struct thread {
    struct tm_td_static fixed;
    _Atomic uint64_t word; /* TM_WORD(generation, state) */
    uint64_t key[2];       /* zero when no key opens the slot */
    /* -- scrubbed by RESET from here -- */
    uint64_t nonce;     /* of the OCALL under way */
    uint64_t saved_rsp; /* enclave stack of the OCALL under way */
    uint64_t bound;     /* generation that `identity` belongs to; 0: none */
    struct tm_identity identity;
    uint64_t used;      /* generation that has entered since the last RESET, or has something ready; 0: none */
    bool in_call;       /* an ECALL of a client: OCALLs may leave */
    bool half_ready;    /* a warden is in tm_on_slot_armed() for this slot, or died in there */
    struct thread *for_slot; /* of a warden: the slot that it is in there for */
    struct tm_call call;
    /* Robust locks: what this slot holds, and the one that it is about to take or leave. */
    struct tm_mutex *pending;
    uint64_t lock_count;
    struct tm_mutex *locks[TD_LOCKS];
    struct tm_holder refused; /* who kept the lock that tm_lock() gave up on */
    /* Redo record: valid when redo_count is not 0. */
    uint64_t redo_count; /* written with release order */
    struct tm_write redo[TD_REDO];
    uint8_t user[TM_SLOT_DATA] __attribute__((aligned(64)));
    /* -- to here -- */
    uint64_t calls; /* entries finished, ever; written by the slot's thread only */
    /* Blocks of the heap that are this slot's own (owned.c): RESET frees them. */
    uint64_t unlisted; /* not 0: it owns more than the list has room for */
    uint64_t given_up; /* generation whose blocks, and those of all before, are nobody's */
    uint64_t owned[TD_OWNED]; /* addresses of their headers, or 0 */
    /* What this slot asks of its host (io.h): they outlive a holder, whose last request may be under way. */
    _Atomic uint64_t io_word;
    struct mailbox *mailbox; /* kept; NULL until it has asked for something */
};
_Static_assert(offsetof(struct thread, word) == TD_WORD, "entry.S");
_Static_assert(offsetof(struct thread, key) == TD_KEY, "entry.S");
_Static_assert(offsetof(struct thread, nonce) == TD_NONCE, "entry.S");
_Static_assert(offsetof(struct thread, saved_rsp) == TD_SAVED_RSP, "entry.S");
_Static_assert(offsetof(struct tm_image_header, io_slots) == HEADER_IO_SLOTS, "entry.S");
_Static_assert(offsetof(struct tm_image_header, nssa) == HEADER_NSSA, "entry.S");
_Static_assert(offsetof(struct tm_image_header, ssa_frame_size) == HEADER_SSA_FRAME_SIZE, "entry.S");
_Static_assert(offsetof(struct tm_image_header, size) == HEADER_SIZE, "entry.S");
_Static_assert(offsetof(struct tm_image_header, ssa_offset) == HEADER_SSA_OFFSET, "entry.S");
_Static_assert(sizeof(struct thread) <= 4096, "thread data is one page");

extern const struct tm_image_header tm_image_header;
extern char __tm_base[];

static inline uint64_t enclave_base(void)
{
    return (uint64_t)__tm_base;
}

/* The header is filled after linking: the compiler must not look at its zeros. */
static inline const volatile struct tm_image_header *header(void)
{
    return (const volatile struct tm_image_header *)__tm_base;
}

static inline uint32_t slot_count(void)
{
    return TM_WARDEN_SLOTS + header()->io_slots + header()->client_slots;
}

/* Its own two, and those for its I/O. */
static inline bool is_wardens(uint64_t slot)
{
    return slot < TM_WARDEN_SLOTS + header()->io_slots;
}

static inline struct thread *thread_self(void)
{
    uint64_t offset;

    __asm__("movq %%fs:0, %0" : "=r"(offset));
    return (struct thread *)(enclave_base() + offset);
}

static inline struct thread *thread_of(uint64_t slot)
{
    return (struct thread *)(enclave_base() + header()->td_offset + slot * header()->td_stride);
}

/* Set by SET_KEY, in this order (control.c). */
enum control_state { CONTROL_NONE = 0, CONTROL_KEYED = 1, CONTROL_READY = 2 };
extern _Atomic uint32_t tm_control_state;
extern uint64_t tm_control_key[2];
extern uint8_t tm_mac_key[32];

/* [address, address + length) is outside of ELRANGE and does not wrap. */
bool range_outside(uint64_t address, uint64_t length);

/* entry.S: leave with an OCALL, come back with its return. */
struct ocall_answer {
    int64_t status;
    uint64_t length;
};
struct ocall_answer tm_gate_ocall(uint64_t kind, uint64_t length, uint64_t nonce);
/* entry.S: make SSA frames leave to the landing page when resumed, with `thread` for FS and GS. */
void tm_gate_reset(void); /* where they go on */
void tm_gate_rewrite(uint64_t frames, uint64_t count, uint64_t frame_size, uint64_t thread);

/* Whose memory the running thread works with: its own slot's, or that of the one that it makes something ready for. */
static inline struct thread *thread_served(void)
{
    struct thread *self = thread_self();

    return self->for_slot ? self->for_slot : self;
}

/* What entry.S calls. */
struct gate_result {
    int64_t status;
    uint64_t length;
};
struct gate_result tm_gate_client(uint64_t selector, uint64_t argument);
struct gate_result tm_gate_control(uint64_t argument, uint64_t cssa, uint64_t key0, uint64_t key1);
struct gate_result tm_gate_io(uint64_t argument);

int bind_identity(struct thread *self, uint64_t address);
int64_t ecall(struct thread *self, uint64_t address, uint64_t *length);
int64_t author_control(const uint8_t data[256], struct tm_control_result *result);
uint64_t random_word(void);
void time_set(uint64_t nanoseconds);
void heap_start(void);
struct tm_holder lock_refused(void); /* who made this slot's last tm_lock() fail */
/* Finish or undo what a dead holder of the slot left behind; locks become owner-dead. */
void thread_recover(struct thread *thread);
/* Free the blocks that it owned, after that; from a warden's own stack.  May be done again. */
void owned_release(struct thread *dead);

#endif
#endif
