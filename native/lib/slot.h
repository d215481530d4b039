/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A slot as its user holds it: the key, and how far the call in it has come.
 *
 *   slot.c   open, close, abandon, raw entries
 *   call.c   ECALLs and the OCALLs that they make
 */
#ifndef TEEMATE_SLOT_H
#define TEEMATE_SLOT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "enclave.h"
#include "teemate_abi.h"

/* Requests and answers of OCALLs; pages that no OCALL touches cost nothing. */
#define SLOT_OCALL_CAPACITY (1u << 20)

/* Lies in a page of its own that a child of fork() finds zeroed. */
struct slot_secret {
    uint64_t key[2];
    uint64_t present; /* 1; 0 in a child of fork */
};

enum slot_state {
    SLOT_IDLE,        /* nothing of ours is inside */
    SLOT_PAUSED,      /* `entry` with `function` is what goes on */
    SLOT_ASKING,      /* a named OCALL waits for teemate_slot_answer */
    SLOT_INTERRUPTED, /* left inside for good: a fault, or an abandoned call */
};

/* The registers of the entry that is to be made, without the key. */
struct slot_entry {
    uint64_t rdi, rsi, rdx, r8;
};

/* A file that the enclave's code has lent this slot (teemate_slot_lend); a free place has no name. */
struct slot_lent {
    char name[64];
    int fd; /* owned */
};
#define SLOT_LENT 4u

struct teemate_slot {
    struct teemate_enclave *enclave;
    uint64_t tcs_offset;
    uint32_t index;             /* number of the TCS */
    struct slot_secret *secret; /* owned, one page */
    uint8_t *ocall_buffer;      /* owned, SLOT_OCALL_CAPACITY bytes right behind the secret */
    bool asked;                 /* the enclave made an OCALL, so there is something in the buffer */
    atomic_bool taken;          /* by the thread that is in one of our functions */
    bool bound;                 /* the enclave has taken our identity */
    bool revoked;               /* the gate refused our key: it will not open again */
    enum slot_state state;
    uint32_t function;          /* PAUSED: EENTER when the enclave has not begun with `entry` yet */
    uint32_t busy_pauses;       /* in a row, since somebody else is in the TCS */
    struct slot_entry entry;
    uint64_t nonce;             /* of the OCALL that is outstanding */
    struct tm_ocall_wait wait;  /* PAUSED in one: it goes on before `entry` does */
    uint64_t wait_until;        /* CLOCK_MONOTONIC, ns; 0: no wait is under way */
    struct tm_call request;
    struct tm_bind bind;
    struct slot_lent lent[SLOT_LENT];
};

/*
 * Take the slot for this thread; give it back.  Fails with -EBUSY when another
 * thread has it and -ENOTCONN in a child of fork.
 */
int slot_take(struct teemate_slot *slot);
void slot_give(struct teemate_slot *slot);

/*
 * A page that a child of fork() finds zeroed and that core dumps leave out, or
 * NULL.  `size` is rounded up to pages; munmap() it with the same size.
 */
void *secret_map(size_t size);
void secret_unmap(void *secret, size_t size);

#endif
