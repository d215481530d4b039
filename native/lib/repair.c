/* SPDX-License-Identifier: Apache-2.0 */
/* The repair of the warden's TCSs, each through the other; see repair.h. */
#include "repair.h"

#include <errno.h>
#include <string.h>
#include <time.h>

/* Longer than a refused entry takes with an interrupt in between; see repair_enter(). */
#define BUSY_TRYING_NS 12000000

/* Far more resumes than there can be frames: an enclave that never gets to 0 is broken. */
static uint32_t repair_limit(const struct repair *repair)
{
    return 4 * repair->nssa + 16;
}

/*
 * Enter, and again while the TCS is busy: who maps the enclave may be at that TCS too, is refused
 * and leaves.  A TCS without a frame left stays as it is, so this is bounded.
 */
static void repair_enter(struct repair *repair, uint64_t slot, const struct tm_control *control,
                         struct tm_control_result *result, struct control_exit *exit)
{
    struct timespec begin, now;

    clock_gettime(CLOCK_MONOTONIC, &begin);
    do {
        control_enter(repair->enclave, repair->tcs[slot], repair->key, control, result, exit);
        if (exit->entered || exit->inside || exit->status != -EBUSY)
            return;
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - begin.tv_sec) * 1000000000ll + (now.tv_nsec - begin.tv_nsec) < BUSY_TRYING_NS);
}

/* One control ECALL through TCS `through` that must succeed. */
static int repair_ask(struct repair *repair, uint64_t through, struct tm_control *control, const char *what,
                      struct teemate_diag *diag)
{
    struct tm_control_result result;
    struct control_exit exit;

    control_sign(repair->key, control);
    repair_enter(repair, through, control, &result, &exit);
    if (exit.entered && exit.status == TM_OK)
        return 0;
    if (exit.entered)
        return diag_set(diag, -EIO, TEEMATE_STEP_CONTROL, exit.status, control->slot,
                        "%s for TCS %llu: the enclave answered status %d", what,
                        (unsigned long long)control->slot, exit.status);
    return diag_set(diag, exit.status == -ENODEV || exit.status == -EACCES ? exit.status : -EIO,
                    TEEMATE_STEP_ENTER, (int)exit.vector - 1, control->slot,
                    "%s for TCS %llu: entering TCS %llu failed: %s (exception %d)", what,
                    (unsigned long long)control->slot, (unsigned long long)through, strerror(-exit.status),
                    (int)exit.vector - 1);
}

/*
 * How many frames of `slot` are in use?  An EENTER that faults with #GP says
 * NSSA: nobody else is inside, since the last warden is dead and this is it.
 */
static int repair_probe(struct repair *repair, uint64_t slot, uint64_t *cssa, struct teemate_diag *diag)
{
    struct tm_control probe = {.op = TM_CTL_PROBE, .slot = slot};
    struct tm_control_result result;
    struct control_exit exit;

    repair_enter(repair, slot, &probe, &result, &exit);
    if (exit.entered && exit.status == TM_OK && result.cssa < repair->nssa) {
        *cssa = result.cssa;
        return 0;
    }
    if (!exit.entered && exit.status == -EBUSY) {
        *cssa = repair->nssa;
        return 0;
    }
    return diag_set(diag, exit.entered ? -EIO : exit.status, TEEMATE_STEP_ENTER, exit.status, slot,
                    "TCS %llu does not tell its CSSA: status %d, exception %d", (unsigned long long)slot,
                    exit.status, (int)exit.vector - 1);
}

/* As repair_probe(); an I/O slot's TCS says it without a stack, since all others share the control ECALLs' one. */
static int repair_look(struct repair *repair, uint64_t slot, uint64_t *cssa, struct teemate_diag *diag)
{
    struct timespec begin, now;
    struct control_slot found;
    struct control_exit exit;
    int result;

    clock_gettime(CLOCK_MONOTONIC, &begin);
    do {
        result = control_unwind(repair->enclave, repair->tcs[slot], repair->key, 0, &found, &exit);
        if (result == 0 && found.cssa < repair->nssa) {
            *cssa = found.cssa;
            return 0;
        }
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((result == -EBUSY || result == -EAGAIN) &&
             (now.tv_sec - begin.tv_sec) * 1000000000ll + (now.tv_nsec - begin.tv_nsec) < BUSY_TRYING_NS);
    if (result == -EBUSY) {
        *cssa = repair->nssa;
        return 0;
    }
    return diag_set(diag, result == 0 ? -EIO : result, TEEMATE_STEP_ENTER, 0, slot,
                    "TCS %llu does not tell its CSSA: %s, exception %d", (unsigned long long)slot, strerror(-result),
                    (int)exit.vector - 1);
}

/* Until `slot` stands at CSSA 0, its frames rewritten through `other`. */
static int repair_one(struct repair *repair, uint64_t slot, uint64_t other, struct teemate_diag *diag)
{
    for (uint32_t tries = 0; tries < repair_limit(repair); tries++) {
        struct tm_control rewrite = {.op = TM_CTL_REWRITE, .slot = slot};
        uint64_t cssa;
        int result = slot < TM_WARDEN_SLOTS ? repair_probe(repair, slot, &cssa, diag)
                                            : repair_look(repair, slot, &cssa, diag);

        if (result < 0 || cssa == 0)
            return result;
        rewrite.argument = cssa;
        result = repair_ask(repair, other, &rewrite, "rewriting the frames", diag);
        if (result < 0)
            return result;
        result = repair->resume(repair, repair->tcs[slot]);
        if (result < 0)
            return diag_set(diag, result, TEEMATE_STEP_ENTER, 0, slot, "TCS %llu could not be resumed: %s",
                            (unsigned long long)slot, strerror(-result));
        repair->frames++;
    }
    return diag_set(diag, -EIO, TEEMATE_STEP_ENTER, 0, slot, "TCS %llu does not come to CSSA 0",
                    (unsigned long long)slot);
}

int repair_run(struct repair *repair, struct teemate_diag *diag)
{
    uint64_t order[TM_WARDEN_SLOTS] = {0, 1};
    uint64_t cssa;
    int result;

    /* A TCS that cannot be entered comes first: it cannot help the other. */
    result = repair_probe(repair, 1, &cssa, diag);
    if (result == 0 && cssa == repair->nssa) {
        order[0] = 1;
        order[1] = 0;
    }
    for (size_t i = 0; result == 0 && i < TM_WARDEN_SLOTS; i++)
        result = repair_one(repair, order[i], 1 - order[i], diag);
    /* Also after nothing was to do: the last repair may have ended right before this. */
    for (uint64_t slot = 0; result == 0 && slot < TM_WARDEN_SLOTS; slot++) {
        struct tm_control reinit = {.op = TM_CTL_REINIT, .slot = slot};

        result = repair_ask(repair, 1 - slot, &reinit, "forgetting the last control ECALL", diag);
    }
    return result;
}

int repair_io(struct repair *repair, uint64_t slot, struct teemate_diag *diag)
{
    struct tm_control reinit = {.op = TM_CTL_REINIT, .slot = slot};
    int result = repair_one(repair, slot, 0, diag);

    return result < 0 ? result : repair_ask(repair, 0, &reinit, "taking back what the last I/O thread took", diag);
}
