/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The warden's I/O thread: does what enclave code asks of its files.
 *
 * It enters through the I/O slot with the answer to the last request and comes out with the next, does that in
 * the enclave's folder, and sleeps at a word of the arena while there is none.  Nothing of it is worth
 * keeping: when anything goes wrong the process ends, the broker starts the next warden, and that
 * takes what was not answered again.
 *
 * Two wardens of one enclave are alive at once for a moment: the old one's last write may still be on its
 * way into the file while its broker, or the next, starts a new one.  Done after the new one's, it
 * would bring back what was there before.  So whoever works in the folder holds its lock, which the kernel
 * takes away from a process only when no thread of it is in a system call any more.
 */
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "files.h"
#include "sandbox.h"
#include "warden.h"

#define WAIT_NS 100000000
/* Entries that find the TCS busy: whoever maps the enclave can keep it so for the time of a refused entry. */
#define BUSY_YIELDS 1000
#define BUSY_PAUSES 1000
#define BUSY_PAUSE_NS 1000000

struct io {
    struct warden *warden;
    struct files *files;
    struct tm_io_step step;
    uint8_t data[TM_FILE_DATA];
};

static _Noreturn void end(const char *what, int error)
{
    fprintf(stderr, "teemate-warden: I/O thread: %s: %s\n", what, strerror(error < 0 ? -error : error));
    _exit(1);
}

static uint32_t *arena_word(const struct io *io, uint32_t index)
{
    const struct teemate_enclave *enclave = io->warden->enclave;

    return (uint32_t *)TM_ARENA(enclave->base, enclave->size) + index;
}

static void enter(struct io *io)
{
    const struct timespec pause = {.tv_nsec = BUSY_PAUSE_NS};
    struct warden *warden = io->warden;
    struct control_exit exit;

    for (int tries = 0; tries < BUSY_YIELDS + BUSY_PAUSES; tries++) {
        int result = control_io(warden->enclave, warden->tcs[TM_WARDEN_SLOTS], warden->key, &io->step, &exit);

        if (exit.entered && result == TM_OK)
            return;
        if (exit.entered)
            end("the enclave refuses the I/O thread", EPROTO);
        if (result != -EBUSY)
            end(exit.inside ? "the enclave faulted" : "entering the I/O slot", result);
        if (tries < BUSY_YIELDS)
            sched_yield();
        else
            clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
    }
    end("somebody else stays in the I/O slot's TCS", EBUSY);
}

static void *serve(void *argument)
{
    const struct timespec patience = {.tv_nsec = WAIT_NS};
    struct io *io = argument;
    int result;

    do
        result = flock(STORAGE_DIRECTORY, LOCK_EX);
    while (result != 0 && errno == EINTR);
    if (result != 0)
        end("locking the enclave's folder", errno);
    result = files_open(STORAGE_DIRECTORY, io->warden->storage_limit, &io->files);
    if (result < 0)
        end("listing the enclave's folder", result);
    io->step.begins = 1; /* what an old warden has taken since REINIT is nobody's either */
    for (;;) {
        enter(io);
        io->step.begins = 0;
        if (io->step.wake < TM_ARENA_WORDS) {
            __atomic_add_fetch(arena_word(io, io->step.wake), 1, __ATOMIC_SEQ_CST);
            syscall(SYS_futex, arena_word(io, io->step.wake), FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
        }
        if (io->step.ticket != 0)
            io->step.result = files_do(io->files, &io->step.request, io->data);
        else if (io->step.idle < TM_ARENA_WORDS)
            syscall(SYS_futex, arena_word(io, io->step.idle), FUTEX_WAIT, io->step.expected, &patience, NULL, 0);
        else
            end("the enclave names no word to wait at", EPROTO);
    }
}

static int serve_start(struct warden *warden)
{
    struct io *io = calloc(1, sizeof(*io));
    pthread_attr_t attributes;
    pthread_t thread;
    int result;

    if (io == NULL)
        return -ENOMEM;
    io->warden = warden;
    io->step.data = (uintptr_t)io->data;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    result = pthread_create(&thread, &attributes, serve, io);
    pthread_attr_destroy(&attributes);
    return -result; /* the thread has it for as long as the process lives */
}

/* The I/O slot as the last warden left it. */
static int repair_slot(struct warden *warden, uint32_t *frames, struct teemate_diag *diag)
{
    struct repair repair = {
        .enclave = warden->enclave,
        .key = warden->key,
        .tcs = warden->tcs,
        .nssa = warden->header.nssa,
        .resume = warden_resume_own,
    };
    int result = teemate_map_tcs(warden->enclave, warden->tcs[TM_WARDEN_SLOTS], diag);

    if (result < 0)
        return result;
    result = warden_bury(warden->enclave, warden->tcs[TM_WARDEN_SLOTS]);
    if (result < 0)
        return diag_set(diag, result, TEEMATE_STEP_ENTER, 0, TM_WARDEN_SLOTS, "the I/O slot's TCS could not be buried: %s",
                        strerror(-result));
    result = repair_io(&repair, TM_WARDEN_SLOTS, diag);
    *frames += repair.frames;
    return result;
}

int warden_io_start(struct warden *warden, uint32_t *frames, struct teemate_diag *diag)
{
    struct tm_control control = {
        .op = TM_CTL_STORAGE,
        .argument = warden->lends ? TM_STORAGE_LENT : warden->storage ? TM_STORAGE_WARDEN : TM_STORAGE_NONE,
    };
    struct tm_control_result unused;
    struct control_exit exit;
    int result;

    if (warden->header.io_slots == 0 || warden->tcs_count <= TM_WARDEN_SLOTS)
        return warden->storage ? diag_set(diag, -ENOTSUP, TEEMATE_STEP_CONTROL, 0, 0,
                                          "storage wants an I/O slot, the image has none: build it with --io-slots 1")
                               : 0;
    result = repair_slot(warden, frames, diag);
    if (result < 0)
        return result;
    control_sign(warden->key, &control);
    warden_control(warden, &control, &unused, &exit);
    if (!exit.entered || exit.status != TM_OK)
        return diag_set(diag, exit.entered ? -EIO : exit.status, TEEMATE_STEP_CONTROL, exit.status, 0,
                        "the enclave does not take its storage: status %d, exception %d", exit.status,
                        (int)exit.vector - 1);
    if (!warden->storage)
        return 0;
    result = serve_start(warden);
    return result < 0 ? diag_set(diag, result, TEEMATE_STEP_CONTROL, 0, 0, "the I/O thread does not start: %s",
                                 strerror(-result))
                      : 0;
}
