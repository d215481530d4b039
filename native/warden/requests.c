/* SPDX-License-Identifier: Apache-2.0 */
/* What a warden does for its broker; protocol.h tells what each request means. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "crypto.h"
#include "sim.h"
#include "slot.h"
#include "warden.h"

static void __attribute__((format(printf, 3, 4))) refuse(struct warden_reply *reply, int status, const char *format, ...)
{
    va_list arguments;

    reply->status = status;
    reply->entered = 0;
    va_start(arguments, format);
    vsnprintf(reply->text, sizeof(reply->text), format, arguments);
    va_end(arguments);
}

static void refuse_diag(struct warden_reply *reply, int status, const struct teemate_diag *diag)
{
    refuse(reply, status, "%.*s", (int)sizeof(reply->text) - 1, diag->text);
}

/* ---- start ------------------------------------------------------------------------- */

static int start_open(struct warden *warden, const struct warden_request *request, struct warden_fds *fds,
                      struct teemate_diag *diag)
{
    struct teemate_segment segments[WARDEN_SEGMENTS];
    size_t count = request->body.start.segment_count;
    int fd = fds->fd[0];
    int result;

    for (size_t i = 0; i < count; i++) {
        const struct warden_segment *segment = &request->body.start.segments[i];

        segments[i] = (struct teemate_segment){
            .offset = segment->offset, .size = segment->size, .prot = segment->prot, .type = segment->type};
    }
    fds->fd[0] = -1; /* teemate_open takes it, also when it fails */
    result = teemate_open((int)request->body.start.backend, fd, request->body.start.base,
                          request->body.start.size, segments, count, &warden->enclave, diag);
    if (result < 0) {
        warden->enclave = NULL;
        return result;
    }
    warden_mark(warden->enclave);
    result = teemate_map(warden->enclave, diag);
    if (result == 0)
        result = teemate_map_arena(warden->enclave, fds->fd[1], diag);
    if (result < 0)
        return result;
    warden->tcs_count = teemate_enclave_tcs(warden->enclave, NULL, 0);
    if (warden->tcs_count < TM_WARDEN_SLOTS || warden->tcs_count > TM_MAX_SLOTS)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_MAP, 0, 0, "%zu TCSs: an SDK image has 2 to %u",
                        warden->tcs_count, TM_MAX_SLOTS);
    warden->tcs = calloc(warden->tcs_count, sizeof(*warden->tcs));
    if (warden->tcs == NULL)
        return diag_set(diag, -ENOMEM, TEEMATE_STEP_MAP, 0, 0, "no memory for the list of TCSs");
    teemate_enclave_tcs(warden->enclave, warden->tcs, warden->tcs_count);
    for (uint64_t slot = 0; result == 0 && slot < TM_WARDEN_SLOTS; slot++)
        result = teemate_map_tcs(warden->enclave, warden->tcs[slot], diag);
    return result;
}

static int warden_repair(struct warden *warden, uint32_t *frames, struct teemate_diag *diag)
{
    struct repair repair = {
        .enclave = warden->enclave,
        .key = warden->key,
        .tcs = warden->tcs,
        .nssa = warden->header.nssa,
        .resume = warden_resume_own,
    };
    int result = repair_run(&repair, diag);

    *frames += repair.frames;
    return result;
}

/*
 * SET_KEY through the first TCS that can be entered; both can in all but the worst
 * case.  Returns 1 when the enclave has the key but wants a clean TCS for its
 * tm_on_start(): the last warden died in there.
 */
static int start_key(struct warden *warden, struct warden_reply *reply, struct teemate_diag *diag)
{
    struct tm_control set_key = {.op = TM_CTL_SET_KEY};
    struct control_exit exit = {.status = -EBUSY};

    for (uint64_t slot = 0; slot < TM_WARDEN_SLOTS && !exit.entered && exit.status == -EBUSY; slot++)
        control_enter(warden->enclave, warden->tcs[slot], warden->key, &set_key, &reply->result, &exit);
    reply->entered = exit.entered;
    reply->vector = exit.vector;
    if (!exit.entered)
        return diag_set(diag, exit.status, TEEMATE_STEP_ENTER, (int)exit.vector - 1, 0,
                        "the enclave does not take its control key: %s (exception %d)", strerror(-exit.status),
                        (int)exit.vector - 1);
    if (exit.status != TM_OK && exit.status != TM_E_STATE)
        return diag_set(diag, -EACCES, TEEMATE_STEP_CONTROL, exit.status, 0,
                        "the enclave does not start: status %d", exit.status);
    if (reply->result.length != sizeof(warden->header))
        return diag_set(diag, -EBADMSG, TEEMATE_STEP_CONTROL, 0, 0, "SET_KEY did not bring the image header");
    memcpy(&warden->header, reply->result.data, sizeof(warden->header));
    if (warden->header.magic != TM_IMAGE_MAGIC || warden->header.abi_version != TM_ABI_VERSION ||
        warden->header.nssa < 1 || warden->header.nssa > 0xffff)
        return diag_set(diag, -EBADMSG, TEEMATE_STEP_CONTROL, 0, 0, "what SET_KEY brought is no image header");
    return exit.status == TM_E_STATE ? 1 : 0;
}

/* Everything after the request has been looked at. */
static int start_run(struct warden *warden, const struct warden_request *request, struct warden_fds *fds,
                     struct warden_reply *reply, struct teemate_diag *diag)
{
    int again;
    int result = start_open(warden, request, fds, diag);

    for (uint64_t slot = 0; result == 0 && slot < TM_WARDEN_SLOTS; slot++) {
        result = warden_bury(warden->enclave, warden->tcs[slot]);
        if (result < 0)
            diag_set(diag, result, TEEMATE_STEP_ENTER, 0, slot, "TCS %llu could not be buried: %s",
                     (unsigned long long)slot, strerror(-result));
    }
    if (result < 0)
        return result;
    again = start_key(warden, reply, diag);
    if (again < 0)
        return again;
    result = warden_repair(warden, &reply->repaired, diag);
    if (result == 0 && again == 1)
        result = start_key(warden, reply, diag);
    if (result == 1)
        return diag_set(diag, -EIO, TEEMATE_STEP_CONTROL, TM_E_STATE, 0, "the enclave does not start: status %d",
                        TM_E_STATE);
    return result < 0 ? result : warden_io_start(warden, &reply->repaired, diag);
}

static void handle_start(struct warden *warden, const struct warden_request *request, struct warden_fds *fds,
                         struct warden_reply *reply)
{
    struct teemate_diag diag = {0};
    int result;

    if (warden->enclave != NULL) {
        refuse(reply, -EALREADY, "this warden has had its START");
        return;
    }
    if (fds->count != 2 || request->body.start.segment_count < 1 ||
        request->body.start.segment_count > WARDEN_SEGMENTS ||
        (request->body.start.backend != TEEMATE_SIM && request->body.start.backend != TEEMATE_SGX)) {
        refuse(reply, -EINVAL, "START: two fds, 1 to %u segments, backend sim or sgx", WARDEN_SEGMENTS);
        return;
    }
    control_key_init(warden->key, request->body.start.control_key);
    result = start_run(warden, request, fds, reply, &diag);
    if (result < 0)
        refuse_diag(reply, result, &diag);
    warden->started = result == 0;
}

/* ---- requests of a running warden ---------------------------------------------------- */

/* Where did it fault?  Told by the other TCS; the frame is on top of `slot`'s. */
static void tell_fault(struct warden *warden, uint64_t slot, struct warden_reply *reply)
{
    struct tm_control ask = {.op = TM_CTL_PROBE, .slot = slot};
    struct tm_control_result result;
    struct control_exit exit;

    control_enter(warden->enclave, warden->tcs[slot], warden->key, &ask, &result, &exit);
    if (!exit.entered || exit.status != TM_OK || result.cssa < 1)
        return;
    ask = (struct tm_control){.op = TM_CTL_SSA, .slot = slot, .argument = result.cssa - 1};
    control_enter(warden->enclave, warden->tcs[1 - slot], warden->key, &ask, &result, &exit);
    if (exit.entered && exit.status == TM_OK)
        reply->result = result;
}

/* Far longer than a refused entry takes, or a few of them and the interrupts in between. */
#define BUSY_TRYING_NS 50000000

uint64_t warden_control(struct warden *warden, const struct tm_control *control,
                        struct tm_control_result *result, struct control_exit *exit)
{
    struct timespec begin, now;
    uint64_t slot = 0;

    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (;;) {
        control_enter(warden->enclave, warden->tcs[slot], warden->key, control, result, exit);
        /* Who spins there was interrupted: as busy as while he ran, and nothing of the request was done. */
        if (exit->entered && exit->status == TM_E_INTERRUPTED)
            *exit = (struct control_exit){.status = -EBUSY};
        if (exit->entered || exit->inside || exit->status != -EBUSY)
            return slot;
        warden->contended++;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if ((now.tv_sec - begin.tv_sec) * 1000000000ll + (now.tv_nsec - begin.tv_nsec) >= BUSY_TRYING_NS)
            return slot;
        slot = 1 - slot;
    }
}

static void handle_control(struct warden *warden, const struct tm_control *control, struct warden_reply *reply)
{
    struct control_exit exit;
    uint64_t slot = warden_control(warden, control, &reply->result, &exit);

    reply->status = exit.status;
    reply->entered = exit.entered;
    reply->vector = exit.vector;
    /* Whatever else the enclave says of a request, its number is used up. */
    if (control->sequence > warden->key->sequence && !(exit.entered && exit.status == TM_E_MAC))
        warden->key->sequence = control->sequence;
    if (exit.entered)
        return;
    warden->damaged = true;
    refuse(reply, exit.status, "control ECALL %u: %s, exception %d", control->op,
           exit.inside ? "the enclave faulted" : "the entry failed", (int)exit.vector - 1);
    if (exit.inside)
        tell_fault(warden, slot, reply);
}

static void handle_probe(struct warden *warden, const struct warden_request *request,
                         struct warden_reply *reply)
{
    uint64_t slot = request->body.control.slot;
    bool own = slot < TM_WARDEN_SLOTS;
    struct control_slot found = {0};
    struct control_exit exit = {0};
    struct teemate_diag diag = {0};
    int result;

    if (slot >= warden->tcs_count) {
        refuse(reply, -EINVAL, "PROBE: there are %zu slots", warden->tcs_count);
        return;
    }
    result = own ? 0 : teemate_map_tcs(warden->enclave, warden->tcs[slot], &diag);
    if (result < 0) {
        refuse_diag(reply, result, &diag);
        return;
    }
    result = control_unwind(warden->enclave, warden->tcs[slot], warden->key, 0, &found, &exit);
    if (!own)
        teemate_unmap_tcs(warden->enclave, warden->tcs[slot]);
    reply->vector = exit.vector;
    reply->result.cssa = found.cssa;
    reply->result.word = found.word;
    reply->entered = result == 0;
    if (result < 0)
        refuse(reply, result, "PROBE of slot %llu: %s, exception %d", (unsigned long long)slot,
               strerror(-result), (int)exit.vector - 1);
}

/* ---- a slot that was given back ----------------------------------------------------- */

/* One of RENEW's control ECALLs: did the enclave do it? */
static bool renew_step(struct warden *warden, enum warden_step step, const struct tm_control *control,
                       struct warden_reply *reply)
{
    reply->step = step;
    handle_control(warden, control, reply);
    return reply->entered && reply->status == TM_OK;
}

/* Was nothing in there but a holder that is not in there any more?  The broker tells of everything else. */
static bool renew_found_clean(struct warden *warden, const struct warden_request *request, struct warden_reply *reply)
{
    const struct tm_control *clear = &request->body.renew.clear;

    reply->step = WARDEN_STEP_REPAIR;
    reply->entered = 0;
    memset(&reply->result, 0, sizeof(reply->result));
    warden_unwind(warden, clear->slot, clear->generation, request->body.renew.holder_dead != 0, reply);
    return reply->entered && reply->status == TM_OK && reply->result.cssa == 0 &&
           TM_WORD_STATE(reply->result.word) == TM_SLOT_FREE;
}

static void handle_renew(struct warden *warden, const struct warden_request *request, struct warden_reply *reply)
{
    const struct tm_control *clear = &request->body.renew.clear;
    const struct tm_control *reset = &request->body.renew.reset;
    const struct tm_control *arm = &request->body.renew.arm;

    if (clear->op != TM_CTL_CLEAR || reset->op != TM_CTL_RESET || arm->op != TM_CTL_ARM ||
        reset->slot != clear->slot || arm->slot != clear->slot) {
        refuse(reply, -EINVAL, "RENEW: CLEAR, RESET and ARM of one slot");
        return;
    }
    if (renew_step(warden, WARDEN_STEP_CLEAR, clear, reply)) {
        if (!renew_found_clean(warden, request, reply) || !renew_step(warden, WARDEN_STEP_RESET, reset, reply))
            return;
    } else if (!reply->entered || reply->status != TM_E_STATE ||
               reply->result.word != TM_WORD(arm->generation, TM_SLOT_ARMED)) {
        return;
    }
    renew_step(warden, WARDEN_STEP_ARM, arm, reply);
}

static void handle(struct warden *warden, const struct warden_request *request, struct warden_fds *fds,
                   struct warden_reply *reply)
{
    struct teemate_diag diag = {0};

    if (request->op != WARDEN_START && fds->count != 0) {
        refuse(reply, -EINVAL, "only START brings descriptors");
        return;
    }
    if (request->op == WARDEN_START) {
        handle_start(warden, request, fds, reply);
        return;
    }
    if (request->op == WARDEN_PING)
        return;
    if (!warden->started) {
        refuse(reply, -ENOTCONN, "START comes first");
        return;
    }
    if (warden->damaged) {
        int result = warden_repair(warden, &reply->repaired, &diag);

        if (result < 0) {
            refuse_diag(reply, result, &diag);
            return;
        }
        warden->damaged = false;
    }
    switch (request->op) {
    case WARDEN_CONTROL:
        handle_control(warden, &request->body.control, reply);
        break;
    case WARDEN_PROBE:
        handle_probe(warden, request, reply);
        break;
    case WARDEN_REPAIR:
        warden_unwind(warden, request->body.repair.slot, request->body.repair.generation,
                      request->body.repair.holder_dead != 0, reply);
        break;
    case WARDEN_RENEW:
        handle_renew(warden, request, reply);
        break;
    default:
        refuse(reply, -EOPNOTSUPP, "there is no operation %u", request->op);
    }
}

void warden_handle(struct warden *warden, const struct warden_request *request, struct warden_fds *fds,
                   struct warden_reply *reply)
{
    handle(warden, request, fds, reply);
    reply->contended = warden->contended;
    warden->contended = 0;
}

/* ---- time ---------------------------------------------------------------------------- */

bool warden_wants_time(const struct warden *warden)
{
    return warden->started && (warden->header.flags & TM_IMAGE_TIME) != 0 && !warden->damaged;
}

void warden_tick(struct warden *warden)
{
    struct tm_control control = {.op = TM_CTL_TIME};
    struct tm_control_result result;
    struct control_exit exit;
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    control.argument = (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
    control_sign(warden->key, &control);
    warden_control(warden, &control, &result, &exit);
    if (!exit.entered)
        warden->damaged = true;
}
