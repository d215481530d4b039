/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Entering with the control key: what the warden program and a process that is
 * the warden of its own private enclave have in common.
 *
 * Sequence numbers.  The broker's are CLOCK_MONOTONIC in nanoseconds when it makes a
 * request: an enclave does not outlive a boot, so each worker's numbers are larger
 * than those of the one before.  A warden's own begin with the clock at its START
 * (the broker waits for the answer then) and go on with one more than the last that
 * was seen: they fit between two requests of the broker, also between one that
 * waits in the socket already and its predecessor.
 */
#ifndef TEEMATE_CONTROL_H
#define TEEMATE_CONTROL_H

#include <stdbool.h>
#include <stdint.h>

#include "enclave.h"
#include "teemate_abi.h"

struct control_key {
    uint8_t key[16];
    uint8_t mac_key[32];
    uint64_t sequence; /* the last one used, or seen in a request whose MAC the enclave took */
};

/* The key to sign with, its MAC key, and the first sequence number. */
void control_key_init(struct control_key *key, const uint8_t control_key[16]);
/* Fill in sequence and MAC of a request. */
void control_sign(struct control_key *key, struct tm_control *control);
/* The MAC that binds `identity` to a slot's generation. */
void control_bind(const struct control_key *key, uint64_t slot, uint64_t generation,
                  const struct tm_identity *identity, struct tm_bind *bind);

/* How an entry with the control key ended. */
struct control_exit {
    int32_t status;  /* a tm_status when `entered`, else a negative errno */
    uint32_t entered; /* the enclave answered */
    uint32_t vector; /* exception vector + 1 when the entry or the enclave faulted */
    uint32_t inside; /* the fault was inside: the TCS has one more SSA frame in use */
};

/*
 * Make one control ECALL through the TCS at `tcs_offset` (mapped before) and wait
 * until it ends.  `control` is copied; `result` is zeroed and then written by the
 * enclave alone.  status: -EBUSY when EENTER itself faulted (#GP: TCS busy or
 * CSSA = NSSA), -ENODEV when the TCS is not there (#PF: the enclave is lost),
 * -EFAULT for a fault inside, -EACCES when the gate refused the key, -EBADMSG
 * when what came out cannot be, or what teemate_enter says.
 */
void control_enter(struct teemate_enclave *enclave, uint64_t tcs_offset, const struct control_key *key,
                   const struct tm_control *control, struct tm_control_result *result,
                   struct control_exit *exit);

/* What the warden finds at a client's slot when it enters through the slot's own TCS. */
struct control_slot {
    uint64_t cssa; /* frames that somebody was interrupted in */
    uint64_t word; /* the slot word before */
    bool unwound;  /* those frames leave to the landing page now, and the slot is FREE */
};

/*
 * TM_SEL_UNWIND through the TCS at `tcs_offset` (mapped before): look (generation 0), or undo the
 * frames of that generation.  Returns 0 with *slot filled; -EBUSY when EENTER faulted (#GP: TCS
 * busy or CSSA = NSSA); -EAGAIN when a thread of another process finished our entry at an interrupt
 * of ours, so that nothing was told: to be asked again (the gate also says so, always, to a wrong
 * key); -ENODEV when the TCS is not there, -EFAULT for any other fault, or what teemate_enter says.
 */
int control_unwind(struct teemate_enclave *enclave, uint64_t tcs_offset, const struct control_key *key,
                   uint64_t generation, struct control_slot *slot, struct control_exit *exit);

/*
 * TM_SEL_IO through the TCS of an I/O slot (mapped before): one step, which the enclave reads and writes.
 * Returns exit->status: 0, a tm_status when `entered`, or the errno of control_enter().
 */
int control_io(struct teemate_enclave *enclave, uint64_t tcs_offset, const struct control_key *key,
               struct tm_io_step *step, struct control_exit *exit);

/* The image's header, checked: offsets lie in ELRANGE, counts within their limits.  -ENOTSUP when not. */
int control_header(const struct teemate_enclave_info *info, struct tm_image_header *header,
                   struct teemate_diag *diag);

#endif
