/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Between the broker and a warden: one SOCK_SEQPACKET socketpair, fd 3 of the warden.
 * Every message is one of the two structures below; the broker's Python mirrors
 * them in broker/wardens/protocol.py.  The broker sends one request at a time and
 * keeps the deadline: a warden that does not answer in time is killed.
 * The first request is START, with the enclave's fd and the arena's as SCM_RIGHTS.
 *
 * Sequence numbers of MACed control ECALLs are CLOCK_MONOTONIC in ns at the time
 * when the broker makes the request (one more than its last where that is
 * larger).  While no request comes the warden itself tells the time to images with
 * TM_IMAGE_TIME every 100 ms (the broker does not), with the last sequence number + 1.
 */
#ifndef TEEMATE_WARDEN_PROTOCOL_H
#define TEEMATE_WARDEN_PROTOCOL_H

#include <stdint.h>

#include "teemate_abi.h"

#define WARDEN_PROTOCOL_VERSION 1u
#define WARDEN_SEGMENTS 128u

enum warden_op {
    /* body.start.  Maps the enclave, brings both warden TCSs to CSSA 0, sets the
     * control key.  Result: control result of SET_KEY. */
    WARDEN_START = 1,
    /* body.control, entered through warden TCS 0, or 1 while somebody else is in there: ARM, CLEAR, RESET, SSA,
     * TIME, AUTHOR, REPORT.  The MAC is the broker's.  When the enclave faulted:
     * status -EFAULT, vector, and in result what SSA says of the frame. */
    WARDEN_CONTROL = 2,
    /* body.control.slot: enter through that slot's own TCS and tell its CSSA and slot
     * word.  status -EBUSY when EENTER faults. */
    WARDEN_PROBE = 3,
    /* body.repair: bring a client's slot to CSSA 0, so that RESET may follow.  Its key has to
     * be taken away before (TM_E_STATE when not, or when it is of another generation).
     * Result: CSSA, slot word and what SSA says of the last frame, as they were found.
     * -EBUSY when a thread of a living holder runs inside, or no SSA frame is left; of a
     * dead holder, when somebody else enters the slot again and again.
     * `holder_dead`: the process has ended.  On the sim 'busy' becomes idle with CSSA + 1
     * and a poisoned frame then: the sim's AEX of the dead. */
    WARDEN_REPAIR = 4,
    WARDEN_PING = 5,
    /* body.renew: what a slot that was given back takes until the next one may have it: CLEAR,
     * REPAIR, RESET, ARM, each as above.  Ends with the first that fails, and also after a REPAIR that
     * had something to undo: then the broker goes on by itself.  `step` is the last one that
     * was tried, and all else of the reply is that one's.  Made again after its reply was lost
     * it ends well: who finds the slot with ARM's generation and key has nothing left to do. */
    WARDEN_RENEW = 6,
};

/* RENEW's steps; 0 in the replies of others. */
enum warden_step {
    WARDEN_STEP_CLEAR = 1,
    WARDEN_STEP_REPAIR = 2,
    WARDEN_STEP_RESET = 3,
    WARDEN_STEP_ARM = 4,
};

struct warden_segment {
    uint64_t offset;
    uint64_t size;
    uint32_t prot;
    uint32_t type;
};

struct warden_request {
    uint32_t version;
    uint32_t op;
    uint64_t id;
    union {
        struct {
            uint64_t base;
            uint64_t size;
            uint32_t backend; /* enum teemate_backend */
            uint32_t segment_count;
            uint8_t control_key[16];
            struct warden_segment segments[WARDEN_SEGMENTS];
        } start;
        struct tm_control control;
        struct {
            uint64_t slot;
            uint64_t generation;
            uint32_t holder_dead;
            uint32_t reserved;
        } repair;
        struct {
            struct tm_control clear; /* all three of one slot, with the broker's MACs, numbered in this order */
            struct tm_control reset;
            struct tm_control arm;
            uint32_t holder_dead;
            uint32_t reserved;
        } renew;
    } body;
};
_Static_assert(sizeof(struct warden_request) == 16 + 40 + WARDEN_SEGMENTS * 24, "warden_request");

struct warden_reply {
    uint64_t id;
    int32_t status;      /* 0, a negative errno, or (control) a tm_status with `entered` set */
    uint32_t entered;    /* the enclave answered: status is a tm_status */
    uint32_t vector;     /* when an entry faulted: exception vector + 1, else 0 */
    /* How many SSA frames of the warden's TCSs were unwound: at START, or before this
     * request since an earlier one had faulted.  REPAIR: frames of the slot that this
     * warden resumed. */
    uint32_t repaired;
    /* How often, since the last reply, a TCS of the warden's own was busy: somebody else entered it. */
    uint32_t contended;
    uint32_t step;       /* enum warden_step */
    struct tm_control_result result;
    char text[128];      /* what went wrong, for the log */
};
_Static_assert(sizeof(struct warden_reply) == 32 + 512 + 128, "warden_reply");

#endif
