/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bringing a client's slot back to CSSA 0, whether its holder is dead or alive.
 *
 * The warden enters through the slot's own TCS with TM_SEL_UNWIND: while it is inside nobody can
 * resume what was interrupted there, and the enclave makes it leave to the landing page.  Then a
 * disposable child resumes one frame, and the warden looks again, until it sees CSSA 0.  Resumes
 * are not counted: a thread of a living holder may do some of them from its AEP (it then hears
 * that it was revoked), and who is killed in one adds a frame of its own.  So this can be killed
 * at any instruction and asked for again.
 *
 * An EENTER that faults says busy or CSSA = NSSA.  Of a dead holder nothing is busy, so the frames
 * are rewritten through TCS 0.  Of a living one nobody can tell: the broker waits, or ends it.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "sim.h"
#include "warden.h"

/*
 * A thread that runs in the slot leaves its TCS idle at every interrupt, but only for as long as
 * the handler takes: a few microseconds, every few milliseconds.  So look without a pause, and for
 * longer than two interrupts are apart (the sim's ticks: 5 ms).
 */
#define BUSY_LOOKING_NS 12000000

struct unwind {
    struct warden *warden;
    struct warden_reply *reply;
    uint64_t slot;
    uint64_t generation;
    uint64_t tcs_offset;
    bool dead; /* the process that held it has ended */
};

static int __attribute__((format(printf, 3, 4))) fail(struct unwind *unwind, int error, const char *format, ...)
{
    va_list arguments;

    unwind->reply->status = error;
    unwind->reply->entered = 0;
    va_start(arguments, format);
    vsnprintf(unwind->reply->text, sizeof(unwind->reply->text), format, arguments);
    va_end(arguments);
    return error;
}

/* The sim's AEX of the dead: of a warden that was killed in there, and of the holder. */
static int bury(struct unwind *unwind)
{
    struct teemate_enclave *enclave = unwind->warden->enclave;
    int result;

    if (enclave->backend->id != TEEMATE_SIM)
        return 0;
    result = warden_bury_own(enclave, unwind->tcs_offset);
    if (result >= 0 && unwind->dead)
        result = sim_tcs_bury(enclave, unwind->tcs_offset);
    return result < 0 ? fail(unwind, result, "slot %llu could not be buried: %s", (unsigned long long)unwind->slot,
                             strerror(-result))
                      : 0;
}

/* One control ECALL through a TCS of the warden's; what it says of the slot goes to *result. */
static int ask(struct unwind *unwind, struct tm_control *control, struct tm_control_result *result)
{
    struct warden *warden = unwind->warden;
    struct control_exit exit;

    if (control->op == TM_CTL_REWRITE)
        control_sign(warden->key, control);
    warden_control(warden, control, result, &exit);
    if (exit.entered && exit.status == TM_OK)
        return 0;
    if (!exit.entered)
        warden->damaged = true;
    return fail(unwind, exit.entered ? -EIO : exit.status, "slot %llu: control ECALL %u: status %d, exception %d",
                (unsigned long long)unwind->slot, control->op, exit.status, (int)exit.vector - 1);
}

/*
 * Enter through the slot, again while others finish our entries or run in there.  -EBUSY when it
 * cannot be entered; with a dead holder that is CSSA = NSSA and needs no second look.
 */
static int enter(struct unwind *unwind, uint64_t generation, struct control_slot *found)
{
    struct warden *warden = unwind->warden;
    struct control_exit exit;
    struct timespec begin, now;
    int64_t looking;

    clock_gettime(CLOCK_MONOTONIC, &begin);
    do {
        int result = control_unwind(warden->enclave, unwind->tcs_offset, warden->key, generation, found, &exit);

        if (result == 0 || (result == -EBUSY && unwind->dead))
            return result;
        if (result != -EBUSY && result != -EAGAIN)
            return fail(unwind, result, "slot %llu could not be entered: %s, exception %d",
                        (unsigned long long)unwind->slot, strerror(-result), (int)exit.vector - 1);
        clock_gettime(CLOCK_MONOTONIC, &now);
        looking = (now.tv_sec - begin.tv_sec) * 1000000000ll + (now.tv_nsec - begin.tv_nsec);
    } while (looking < BUSY_LOOKING_NS);
    return fail(unwind, -EBUSY, "slot %llu: a thread runs in it, or no SSA frame is left",
                (unsigned long long)unwind->slot);
}

/* What had interrupted the slot, for the log: of the last frame, whether it was rewritten by now or not. */
static int tell(struct unwind *unwind, uint64_t cssa)
{
    struct tm_control_result *found = &unwind->reply->result;
    struct tm_control ask_ssa = {.op = TM_CTL_SSA, .slot = unwind->slot, .argument = cssa - 1};
    uint64_t word = found->word;
    int result = ask(unwind, &ask_ssa, found);

    found->cssa = cssa;
    found->word = word;
    return result;
}

/* Nothing is in there, but no frame is free: through the other TCS, since the holder is dead. */
static int rewrite(struct unwind *unwind)
{
    struct tm_control rewrite = {.op = TM_CTL_REWRITE,
                                 .slot = unwind->slot,
                                 .generation = unwind->generation,
                                 .argument = unwind->warden->header.nssa};
    struct tm_control_result unused;

    return ask(unwind, &rewrite, &unused);
}

/*
 * Until the slot has CSSA 0 and nothing of the call is left.  Nobody enters it just to look: at an
 * interrupt in there the holder's thread may finish that entry, and what the warden then resumes is
 * the frame below.  So each entry rewrites the frames first; below it there is never a call.
 */
static int run(struct unwind *unwind)
{
    uint64_t nssa = unwind->warden->header.nssa;
    uint32_t limit = 4 * (uint32_t)nssa + 16; /* far more than there can be frames */

    for (uint32_t tries = 0; tries < limit; tries++) {
        struct control_slot found = {0};
        int result = enter(unwind, unwind->generation, &found);
        bool full = result == -EBUSY && unwind->dead;

        if (result < 0 && !full)
            return result;
        if (full)
            found.cssa = nssa;
        if (found.cssa > nssa)
            return fail(unwind, -EBADMSG, "slot %llu: CSSA %llu cannot be", (unsigned long long)unwind->slot,
                        (unsigned long long)found.cssa);
        if (!full && !found.unwound) {
            unwind->reply->status = TM_E_STATE; /* another generation's, or its key was not taken away */
            unwind->reply->entered = 1;
            return TM_E_STATE;
        }
        if (tries == 0)
            unwind->reply->result.word = found.word;
        if (found.cssa == 0)
            return 0;
        result = tries == 0 ? tell(unwind, found.cssa) : 0;
        if (result == 0 && full)
            result = rewrite(unwind);
        if (result < 0)
            return result;
        result = warden_resume(unwind->warden->enclave, unwind->tcs_offset);
        if (result < 0)
            return fail(unwind, result, "slot %llu could not be resumed: %s", (unsigned long long)unwind->slot,
                        strerror(-result));
        if (result == 0)
            unwind->reply->repaired++;
        result = bury(unwind);
        if (result < 0)
            return result;
    }
    return fail(unwind, -EBUSY, "slot %llu does not come to CSSA 0: somebody else enters it",
                (unsigned long long)unwind->slot);
}

void warden_unwind(struct warden *warden, uint64_t slot, uint64_t generation, bool dead, struct warden_reply *reply)
{
    struct unwind unwind = {
        .warden = warden, .reply = reply, .slot = slot, .generation = generation, .dead = dead};
    struct teemate_diag diag = {0};
    int result;

    if (unwind.slot < TM_WARDEN_SLOTS || unwind.slot >= warden->tcs_count || unwind.generation == 0) {
        fail(&unwind, -EINVAL, "REPAIR: slots %u to %zu, of a generation that was armed", TM_WARDEN_SLOTS,
             warden->tcs_count - 1);
        return;
    }
    unwind.tcs_offset = warden->tcs[unwind.slot];
    result = teemate_map_tcs(warden->enclave, unwind.tcs_offset, &diag);
    if (result < 0) {
        fail(&unwind, result, "%.*s", (int)sizeof(reply->text) - 1, diag.text);
        return;
    }
    result = bury(&unwind);
    if (result == 0)
        result = run(&unwind);
    if (result == 0)
        reply->entered = 1;
    teemate_unmap_tcs(warden->enclave, unwind.tcs_offset);
}
