/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bringing the warden's own two TCSs back to CSSA 0.
 *
 * Whoever is killed (or faults) inside leaves its TCS with CSSA >= 1, and only
 * ERESUME lowers CSSA.  So, for each of the two: ask it for its CSSA by entering
 * it; while that is not 0, let the enclave, entered through the OTHER TCS, turn
 * the frames into ones that do nothing but leave to the landing page, and
 * ERESUME one of them.  Resumes are not counted: the next probe tells.  The
 * frames are rewritten before every resume, since who dies in a resume adds a
 * frame of its own.  This may be killed at any instruction and started again.
 *
 * Both TCSs may be bad at once: the control key opens an entry at CSSA >= 1 too.
 * A TCS whose CSSA has reached NSSA cannot be entered; then it is repaired with
 * NSSA taken for its CSSA.  Only when that is true of both is there no way left.
 */
#ifndef TEEMATE_REPAIR_H
#define TEEMATE_REPAIR_H

#include "control.h"

struct repair {
    struct teemate_enclave *enclave;
    struct control_key *key;
    const uint64_t *tcs; /* offsets of the warden's TCSs, both mapped; for repair_io() of the I/O slot's too */
    uint32_t nssa;
    /*
     * ERESUME the TCS once, and return when that has ended: 0 when it came to the
     * landing page, 1 when it ended in any other way, or a negative errno when
     * there was no attempt.
     */
    int (*resume)(struct repair *repair, uint64_t tcs_offset);
    uint32_t frames; /* resumed so far, for statistics */
};

/*
 * Repair both TCSs; returns when they stand at CSSA 0 and the enclave has
 * forgotten what their threads were doing.  Fails with -EIO (an entry or the
 * enclave did not do as it should), -ENODEV (the enclave is lost), -EACCES (it
 * does not know our key), or the errno of `resume`.
 */
int repair_run(struct repair *repair, struct teemate_diag *diag);

/*
 * The same for the TCS of an I/O slot, through TCS 0, which repair_run() has seen at CSSA 0; what the last
 * I/O thread took and did not answer is to be taken again.  Only while no thread of ours is in there.
 */
int repair_io(struct repair *repair, uint64_t slot, struct teemate_diag *diag);

#endif
