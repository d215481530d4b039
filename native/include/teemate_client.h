/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libteemate for programs that share an enclave: connect to the broker, attach, call, detach.
 *
 *     struct teemate_broker *broker;
 *     struct teemate_grant *vault;
 *     struct teemate_lease *slot;
 *     struct teemate_error error;
 *
 *     if (teemate_connect(NULL, "example", &broker, &error) ||
 *         teemate_attach(broker, "vault", 1, 10000, &vault, &error) ||
 *         teemate_take(vault, 10000, &slot, &error) ||
 *         teemate_call(slot, "echo", "hello", 5, answer, sizeof(answer), &length, NULL, &error))
 *             fprintf(stderr, "%s: %s\n", teemate_code_name(error.code), error.text);
 *
 * Conventions.  Every function that can fail returns 0 or a positive enum teemate_code and
 * fills `error`, which may be NULL; `error->text` is a sentence that says what happened, which
 * limit or setting was met, and what to do.  A function that fails has taken nothing from its caller
 * and left nothing with it, unless its comment says so.  Strings and buffers of arguments stay the
 * caller's and are not kept.  Descriptors never leave the library; all of them are close-on-exec.
 * Milliseconds are of CLOCK_MONOTONIC.  No wait ends early because of a signal: the handler runs, and
 * the wait goes on.
 *
 * Threads.  All functions are thread safe; a lease is for one thread at a time (TEEMATE_BUSY
 * otherwise).  With the first attach the library starts one thread for all connections of the
 * process, with all signals blocked: it hears when a grant is revoked, unmaps and acknowledges, and
 * goes back to a broker that was restarted while the program's own threads are inside.
 *
 * Fork.  A child holds nothing of its parent's: every function fails with TEEMATE_NOT_ATTACHED
 * there, except that teemate_disconnect closes the child's copy of the connection.
 *
 * When the broker ends, calls in enclaves go on.  One that keeps grants over its restarts is
 * waited for, for as long as it said (resume_grace): requests take longer meanwhile, and that is all.
 * If it does not come back, or does not know this process any more, grants are TEEMATE_ENCLAVE_LOST.
 */
#ifndef TEEMATE_CLIENT_H
#define TEEMATE_CLIENT_H

#include <stddef.h>
#include <stdint.h>

#include "teemate.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* ---- errors ---------------------------------------------------------------- */

/* By whose turn it is to act, as on the wire. */
enum teemate_code {
    TEEMATE_OK = 0,
    TEEMATE_NOT_FOUND = 1,        /* no enclave, grant or ECALL of that name */
    TEEMATE_DENIED = 2,           /* the policy does not allow it: the broker's log names the missing rule */
    TEEMATE_BUSY = 3,             /* in use for as long as the request would wait: `limit`, `setting` */
    TEEMATE_LIMIT_REACHED = 4,    /* a limit was met: `limit`, `setting` */
    TEEMATE_REVOKED = 5,          /* taken back: attach again if the policy still allows it */
    TEEMATE_DRAINING = 6,         /* the enclave takes no new clients: wait for its successor */
    TEEMATE_ADDRESS_IN_USE = 7,   /* the text names the mapping that is in the enclave's way */
    TEEMATE_NOT_ATTACHED = 8,     /* this process holds no grant; a child of fork never does */
    TEEMATE_IMAGE_ERROR = 9,      /* an image is bad: of who makes enclaves, not of these functions */
    TEEMATE_ENCLAVE_FAULT = 10,   /* the enclave's code failed: `vector`, `address`; the slot is out of use */
    TEEMATE_ENCLAVE_LOST = 11,    /* the enclave is gone: attach to its next generation */
    TEEMATE_CALL_TIMEOUT = 12,    /* given up; the slot is out of use */
    TEEMATE_CALL_FAILED = 13,     /* the enclave answered with a `status` of its own */
    TEEMATE_PROTOCOL_ERROR = 14,  /* one side sent what the protocol does not allow */
    TEEMATE_UNSUPPORTED = 15,     /* the broker, or this process, cannot do it: the text says what is missing */
    TEEMATE_CONNECTION_LOST = 16, /* the broker is not there (any more) */
    TEEMATE_INTERNAL_ERROR = 17,  /* a bug in TeeMate */
    TEEMATE_CALL_ABANDONED = 18,  /* the program's own options ended the call; the slot is out of use */
    TEEMATE_BAD_ARGUMENT = 19,    /* this program passed what the function's comment does not allow */
};

struct teemate_error {
    int32_t code;          /* enum teemate_code */
    int32_t status;        /* what the enclave answered, where that is the reason (tm_status or its own) */
    int32_t system_errno;  /* where a system call is the reason, else 0 */
    uint32_t vector;       /* ENCLAVE_FAULT */
    uint64_t address;      /* ENCLAVE_FAULT by a page fault: of the page */
    uint64_t needed;       /* LIMIT_REACHED since an answer did not fit: its bytes */
    char limit[64];        /* the limit that was met, as the broker names it; or empty */
    char setting[64];      /* the key of the broker's configuration that sets it; or empty */
    char text[640];
};

/* "not-found", "denied", ...: as on the wire.  Static. */
const char *teemate_code_name(int code);

/* ---- the broker -------------------------------------------------------------- */

struct teemate_broker;

/*
 * Connect to the broker at `path`; NULL takes TEEMATE_SOCKET of the environment, else
 * /run/teemate/broker.sock.  `client`: a name for `teemate status` and the broker's log, at
 * most 64 bytes, or NULL.  Nothing is asked yet: the greeting goes out with the first request.
 * *broker is the caller's until teemate_disconnect.
 * Fails with CONNECTION_LOST (nobody listens there), BAD_ARGUMENT, LIMIT_REACHED (descriptors, memory).
 */
int teemate_connect(const char *path, const char *client, struct teemate_broker **broker,
                    struct teemate_error *error);

/*
 * Detach every grant and close the connection.  Waits for a broker that is being restarted, so that
 * it hears of it.  Frees `broker` and its grants; leases that a thread still has stay good for
 * teemate_give, which frees them, and for nothing else.  No other thread may use `broker` or its grants
 * meanwhile, but in teemate_next_event, which then fails with CONNECTION_LOST.  NULL is allowed.
 * Fails with BUSY when a thread does not come back from a call within 2 s (an OCALL handler): nothing
 * is freed then, and it can be tried again.
 */
int teemate_disconnect(struct teemate_broker *broker, struct teemate_error *error);

/*
 * Return when the broker has answered.
 * Fails with CONNECTION_LOST, LIMIT_REACHED (the broker's limits on requests), NOT_ATTACHED (after fork).
 * So does every function below that asks the broker.
 */
int teemate_ping(struct teemate_broker *broker, struct teemate_error *error);

enum teemate_isolation { TEEMATE_ISOLATION_NONE = 0, TEEMATE_ISOLATION_GATE = 1, TEEMATE_ISOLATION_FENCE = 2 };

enum teemate_state {
    TEEMATE_STATE_BUILDING = 0,
    TEEMATE_STATE_READY = 1,
    TEEMATE_STATE_DRAINING = 2,
    TEEMATE_STATE_QUARANTINED = 3,
    TEEMATE_STATE_LOST = 4,
};

/* An enclave of the broker's, as it says of it. */
struct teemate_enclave_entry {
    char name[68];
    char reason[256];        /* why it is not ready; or empty */
    uint64_t generation;     /* counts rebuilds from the same image */
    uint64_t base;           /* address in every process that attaches */
    uint64_t size;           /* of ELRANGE, bytes */
    uint64_t pages;          /* of 4096 bytes, added */
    uint64_t owner;          /* the uid that it belongs to */
    uint64_t clients;
    uint64_t slots_total, slots_free, slots_used, slots_withheld, slots_quarantined, slots_waiting;
    uint32_t backend;        /* TEEMATE_SGX, or TEEMATE_SIM: a model that protects nothing */
    uint32_t isolation;      /* enum teemate_isolation: what keeps its clients apart */
    uint32_t state;          /* enum teemate_state */
    uint32_t debug, sdk;     /* 0 or 1 */
    uint16_t isvprodid, isvsvn;
    uint8_t mrenclave[32];
    uint8_t mrsigner[32];
};

/*
 * List the enclaves that this client may see: fills at most `capacity` entries and sets *count to
 * how many there are.
 */
int teemate_enclaves(struct teemate_broker *broker, struct teemate_enclave_entry *entries, size_t capacity,
                     size_t *count, struct teemate_error *error);

/* ---- grants -------------------------------------------------------------------- */

/* What this process holds on one enclave: the alias mapping and its slots. */
struct teemate_grant;

/*
 * Map the enclave `name` into this process, at the address that it has everywhere, and get `slots`
 * of its TCSs: as many threads of this process can be inside at once.  Waits up to `wait_ms` for
 * slots when all are in use, or for the enclave while it is being built.  *grant is the caller's until
 * teemate_detach or teemate_disconnect; the enclave's descriptor is the grant's.
 * Fails with NOT_FOUND, DENIED, BUSY (no enclave or not enough slots within wait_ms), LIMIT_REACHED, DRAINING,
 * ENCLAVE_LOST, ADDRESS_IN_USE, UNSUPPORTED (this process cannot enter it: no SGX, or a runtime such as
 * ThreadSanitizer owns the addresses).
 */
int teemate_attach(struct teemate_broker *broker, const char *name, uint32_t slots, uint32_t wait_ms,
                   struct teemate_grant **grant, struct teemate_error *error);

/* What the broker said of the enclave when it was attached.  The grant's, valid until it ends. */
const struct teemate_enclave_entry *teemate_grant_entry(const struct teemate_grant *grant);
/* The grant's number, as administrators and events have it. */
uint64_t teemate_grant_number(const struct teemate_grant *grant);

/*
 * Get `count` more slots for this grant, waiting up to `wait_ms` for them.
 * Fails with BUSY, LIMIT_REACHED (the policy allows no more), and what a lost grant gives.
 */
int teemate_acquire(struct teemate_grant *grant, uint32_t count, uint32_t wait_ms, struct teemate_error *error);

/*
 * Give `count` free slots of this grant back to the broker.
 * Fails with BUSY when fewer are free, and what a lost grant gives.
 */
int teemate_release(struct teemate_grant *grant, uint32_t count, struct teemate_error *error);

/*
 * Give the grant up: close its slots, unmap the enclave, tell the broker (while it is away: later).
 * Calls of other threads get a second to end and are abandoned then.  Frees `grant`; leases as in
 * teemate_disconnect.  NULL is allowed.
 * Fails with BUSY when a thread does not come back within 2 s, from a call (an OCALL handler) or from waiting
 * for slots: the grant is refused to everybody then, not freed, and it can be tried again.
 */
int teemate_detach(struct teemate_grant *grant, struct teemate_error *error);

/* ---- leases: a slot for one thread --------------------------------------------- */

struct teemate_lease;

/*
 * Take a free slot of the grant, waiting up to `wait_ms` for one.  *lease is the caller's until
 * teemate_give.
 * Fails with BUSY (none got free, or none is left: acquire one), REVOKED, ENCLAVE_LOST, NOT_ATTACHED.
 */
int teemate_take(struct teemate_grant *grant, uint32_t wait_ms, struct teemate_lease **lease,
                 struct teemate_error *error);

/*
 * Give the slot back to the grant, for the next teemate_take; one that is out of use goes back to the
 * broker, which repairs it.  The lease must not be used afterwards.  NULL is allowed.
 */
void teemate_give(struct teemate_lease *lease);

/* Number of the slot in the enclave. */
uint32_t teemate_lease_slot(const struct teemate_lease *lease);

/*
 * An OCALL of the enclave's, in the calling thread.  `name` (`name_length` bytes, not terminated)
 * and `data` are the library's, for the time of this call.  Return 0 with *answer pointing to
 * *answer_length bytes (0 unless set; more than 1 MiB are a failure) that stay where they are until the
 * handler is called again or the call ends; negative: the OCALL failed, and the enclave decides how to go
 * on; TEEMATE_OCALL_ABANDON: the whole call is given up.  It must not call through the same lease.
 */
typedef int (*teemate_ocall_handler)(void *context, const char *name, size_t name_length, const void *data,
                                     size_t length, const void **answer, size_t *answer_length);
#define TEEMATE_OCALL_ABANDON 1

struct teemate_call_options {
    int64_t timeout_ms;          /* the call is given up after it; negative: no limit.  To some milliseconds */
    teemate_ocall_handler ocall; /* or NULL: the enclave hears that there is no OCALL of that name */
    /* Asked every 20 ms or so while the enclave is at it: nonzero gives the call up.  NULL: never. */
    int (*give_up)(void *context);
    void *context;               /* for both */
};
#define TEEMATE_CALL_OPTIONS_DEFAULT {.timeout_ms = -1}

/*
 * Do the ECALL `name` with `in` and get its answer: *out_length bytes in `out`.  `out_length` may be
 * NULL; so may `in` and `out`, with 0 bytes.  `options` NULL: no limit and no OCALLs.
 * Fails with
 *   CALL_FAILED           the enclave's own status: `status`, and *out_length bytes that came with it
 *   NOT_FOUND             the image has no ECALL of that name
 *   LIMIT_REACHED         the enclave's heap is full; or the answer has more than `out_capacity` bytes: `needed`
 *   BUSY                  a lock inside was not free within its patience; or another thread uses this lease
 *   DENIED                the enclave does not accept this slot's identity: release it, acquire another
 *   CALL_TIMEOUT, CALL_ABANDONED, ENCLAVE_FAULT    the slot is out of use: give the lease back, take another
 *   REVOKED, ENCLAVE_LOST, NOT_ATTACHED            slot, enclave or grant is gone
 *   UNSUPPORTED, INTERNAL_ERROR                    the entry itself failed: text, system_errno
 */
int teemate_call(struct teemate_lease *lease, const char *name, const void *in, size_t in_length, void *out,
                 size_t out_capacity, size_t *out_length, const struct teemate_call_options *options,
                 struct teemate_error *error);

/*
 * Enter once with RDI, RSI, RDX, R8 and R9 of `regs`, with the vDSO's contract, and get those at EEXIT;
 * R12:R13 carry the slot's key, which `regs` does not show.  For images with an entry of their own.
 * Of `options` the handler is not used.  Fails as teemate_call does.
 */
int teemate_call_raw(struct teemate_lease *lease, struct teemate_regs *regs,
                     const struct teemate_call_options *options, struct teemate_error *error);

/* ---- events -------------------------------------------------------------------- */

enum teemate_event_kind {
    TEEMATE_EVENT_REVOKED = 1,  /* slots were taken back, and are unmapped and acknowledged when no call is inside */
    TEEMATE_EVENT_LOST = 2,     /* the enclave is gone: detach, attach to its next generation */
    TEEMATE_EVENT_DRAINING = 3, /* leave soon: detach, attach again to what follows */
    TEEMATE_EVENT_READY = 4,    /* it is not drained any more */
    TEEMATE_EVENT_AWAY = 5,     /* the broker has gone and may come back; calls go on */
    TEEMATE_EVENT_BACK = 6,     /* it is back and knows our grants; who of them it does not was REVOKED */
    TEEMATE_EVENT_FORGOTTEN = 7, /* no broker knows our grants any more: all of them are ENCLAVE_LOST */
};

struct teemate_event {
    int32_t kind;         /* enum teemate_event_kind */
    uint32_t slots;       /* REVOKED: how many */
    uint64_t grant;       /* REVOKED, LOST: teemate_grant_number, else 0 */
    uint64_t generation;  /* DRAINING, READY: of the enclave, else 0 */
    uint64_t missed;      /* events before this one that nobody fetched in time: 64 are kept */
    uint32_t deadline_ms; /* REVOKED: what calls inside have left; half of it is theirs, then they are abandoned */
    char enclave[68];     /* its name; or empty */
};

/*
 * Wait up to `timeout_ms` (negative: without end) for something that the broker said without being
 * asked.  The library has done its part already; this is for programs that want to know.  Any thread
 * may wait while others call; each event goes to one of them.
 * Fails with CALL_TIMEOUT when nothing came, CONNECTION_LOST when nothing will any more.
 */
int teemate_next_event(struct teemate_broker *broker, int timeout_ms, struct teemate_event *event,
                       struct teemate_error *error);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

#endif
