/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A warden: one process that maps and enters one enclave for the broker.
 *
 *   main.c      start, the watching thread, receiving and answering
 *   requests.c  what each request does
 *   unwind.c    the repair of a client's slot
 *   resume.c    the disposable child that resumes a rewritten SSA frame
 *   io.c        the thread that does what enclave code asks of its files
 *   sandbox.c   what the process gives up
 */
#ifndef TEEMATE_WARDEN_H
#define TEEMATE_WARDEN_H

#include <stdbool.h>
#include <stdint.h>

#include "control.h"
#include "enclave.h"
#include "protocol.h"
#include "repair.h"

#define WARDEN_TICK_MS 100

struct warden {
    struct teemate_enclave *enclave; /* NULL before START */
    struct control_key *key;         /* owned, in memory that a child finds zeroed */
    uint64_t *tcs;                   /* owned: offsets of all TCSs, ascending */
    size_t tcs_count;
    struct tm_image_header header;   /* as the enclave gave it */
    bool started;                    /* START has succeeded */
    bool damaged;                    /* a control ECALL has faulted: repair before the next */
    bool storage;                    /* STORAGE_DIRECTORY is the enclave's folder */
    bool lends;                      /* clients may have descriptors of files that lie there */
    uint64_t storage_limit;          /* bytes; 0: none */
    uint32_t contended;              /* entries that found their TCS busy, since the last reply */
};

/* fds that came with a request; whoever uses one sets it to -1. */
struct warden_fds {
    int fd[2];
    size_t count;
};

/*
 * Do what the request says and fill the reply (zeroed before).  Everything in
 * the request is unchecked but its size and version.
 */
void warden_handle(struct warden *warden, const struct warden_request *request, struct warden_fds *fds,
                   struct warden_reply *reply);

/*
 * One control ECALL through TCS 0 or, while somebody else is in there, through TCS 1: every process
 * that maps the enclave can enter both, is refused, and has kept them busy for that long.  Tries for a
 * bounded time.  Returns the slot that was tried last.
 */
uint64_t warden_control(struct warden *warden, const struct tm_control *control,
                        struct tm_control_result *result, struct control_exit *exit);

/* Does the enclave want to be told the time? */
bool warden_wants_time(const struct warden *warden);
/* Tell it; a failure shows with the next request. */
void warden_tick(struct warden *warden);

/*
 * On the sim the processor does not bury the dead.  One of the warden's own TCSs, whose
 * last user has ended or is about to: the last warden is reaped, but a child
 * that it made for a resume ends a moment later, and only then is 'busy' the mark
 * of a dead one.  Fails with the errno of sim_tcs_bury().
 */
int warden_bury(struct teemate_enclave *enclave, uint64_t tcs_offset);
/* A client's TCS: only if the one that is busy there was a warden's thread, or its child, and has ended. */
int warden_bury_own(struct teemate_enclave *enclave, uint64_t tcs_offset);
/* From now on the sim's TCS words tell that it was a warden who entered. */
void warden_mark(struct teemate_enclave *enclave);

/*
 * ERESUME the TCS once in a disposable child: 0 when that came to the landing page, 1 when it
 * ended in any other way, or a negative errno when there was no attempt.
 */
int warden_resume(struct teemate_enclave *enclave, uint64_t tcs_offset);
/* `resume` of struct repair: of the warden's own two TCSs. */
int warden_resume_own(struct repair *repair, uint64_t tcs_offset);

/*
 * io.c: at the end of START, once.  Repairs the I/O slot, tells the enclave whether it has storage, and starts the
 * thread when it has; *frames counts resumed ones.
 */
int warden_io_start(struct warden *warden, uint32_t *frames, struct teemate_diag *diag);

/* unwind.c: WARDEN_REPAIR.  `reply` is zeroed but for what earlier steps of the same request counted. */
void warden_unwind(struct warden *warden, uint64_t slot, uint64_t generation, bool dead, struct warden_reply *reply);

#endif
