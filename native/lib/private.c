/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The warden of a private enclave, in the process that made it.
 *
 * Everything secret lies in memory that a child of fork() finds zeroed: there
 * the enclave is not mapped either, and all of this answers -ENOTCONN.
 * Control ECALLs go through TCS 0, one at a time; when one has faulted, its TCS is
 * brought back through TCS 1 (repair.c) before the next.
 */
#include "private.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "control.h"
#include "crypto.h"
#include "files.h"
#include "repair.h"
#include "slot.h"

#define TICK_NS 100000000ull

struct private_warden {
    uint64_t present; /* 1; 0 in a child of fork */
    size_t size;      /* of this mapping */
    pthread_mutex_t lock; /* control ECALLs */
    struct control_key key;
    bool damaged; /* a control ECALL has faulted: repair before the next */
    struct tm_image_header header;
    _Atomic uint64_t ticked_at; /* CLOCK_MONOTONIC_COARSE, ns */
    uint64_t generation;
    pthread_mutex_t disk_lock; /* what follows: one request at a time */
    teemate_disk *disk;        /* NULL: no storage */
    void *disk_context;
    int directory;             /* owned; -1: none */
    struct files *files;       /* owned */
    uint8_t slot_keys[][16]; /* of the client slots */
};

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static uint64_t tcs_offset(const struct tm_image_header *header, uint64_t slot)
{
    return header->tcs_offset + slot * SGX_PAGE;
}

/*
 * `resume` of struct repair: in this process, since whatever ERESUME might run
 * could run here in any ECALL too.
 */
static int private_resume(struct repair *repair, uint64_t offset)
{
    struct sgx_enclave_run run = {0};
    struct teemate_regs regs;
    int outcome;

    do {
        memset(&regs, 0, sizeof(regs));
        outcome = enclave_enter(repair->enclave, offset, &regs, SGX_ERESUME, 0, ENTRY_STACK_CALLER, &run);
    } while (outcome == TEEMATE_PAUSED);
    return outcome < 0 ? outcome : outcome == TEEMATE_LANDED ? 0 : 1;
}

static int private_repair(struct teemate_enclave *enclave)
{
    struct private_warden *warden = enclave->warden;
    const uint64_t tcs[TM_WARDEN_SLOTS] = {tcs_offset(&warden->header, 0), tcs_offset(&warden->header, 1)};
    struct repair repair = {
        .enclave = enclave,
        .key = &warden->key,
        .tcs = tcs,
        .nssa = warden->header.nssa,
        .resume = private_resume,
    };
    int result = repair_run(&repair, NULL);

    warden->damaged = result < 0;
    return result;
}

/* One control ECALL through TCS 0; the lock is held. */
static void private_control(struct teemate_enclave *enclave, struct tm_control *control,
                            struct tm_control_result *result, struct control_exit *exit)
{
    struct private_warden *warden = enclave->warden;

    memset(exit, 0, sizeof(*exit));
    if (warden->damaged)
        exit->status = private_repair(enclave);
    if (exit->status < 0)
        return;
    control_sign(&warden->key, control);
    control_enter(enclave, tcs_offset(&warden->header, 0), &warden->key, control, result, exit);
    warden->damaged = !exit->entered;
}

/* A step of the start: its failure ends the start. */
static int start_step(struct teemate_enclave *enclave, struct tm_control *control, const char *what,
                      struct teemate_diag *diag)
{
    struct tm_control_result result;
    struct control_exit exit;

    private_control(enclave, control, &result, &exit);
    if (exit.entered && exit.status == TM_OK)
        return 0;
    if (exit.entered)
        return diag_set(diag, -EIO, TEEMATE_STEP_CONTROL, exit.status, 0,
                        "the enclave answered status %d when asked to %s", exit.status, what);
    if (exit.vector != 0)
        return diag_set(diag, -EIO, TEEMATE_STEP_CONTROL, (int)exit.vector - 1, 0,
                        "the enclave faulted with exception %u when asked to %s", exit.vector - 1, what);
    return diag_set(diag, exit.status, TEEMATE_STEP_CONTROL, exit.status, 0,
                    "the enclave could not be asked to %s: %s", what, strerror(-exit.status));
}

static int start_arena(struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    int fd;
    int result;

    if (enclave->arena_mapped)
        return 0;
    fd = teemate_arena_create();
    if (fd < 0)
        return diag_set(diag, fd, TEEMATE_STEP_MAP, 0, 0, "the arena could not be made: %s", strerror(-fd));
    result = teemate_map_arena(enclave, fd, diag);
    close(fd);
    return result;
}

static int start_slots(struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    struct private_warden *warden = enclave->warden;
    uint64_t first = TM_WARDEN_SLOTS + warden->header.io_slots;

    for (uint32_t n = 0; n < warden->header.client_slots; n++) {
        struct tm_control arm = {.op = TM_CTL_ARM, .slot = first + n, .generation = warden->generation};
        int result;

        memcpy(arm.key, warden->slot_keys[n], sizeof(arm.key));
        result = start_step(enclave, &arm, "arm a slot", diag);
        crypto_wipe(arm.key, sizeof(arm.key));
        if (result < 0)
            return result;
    }
    return 0;
}

static int draw_random(void *data, size_t length)
{
    uint8_t *bytes = data;

    while (length > 0) {
        ssize_t n = getrandom(bytes, length, 0);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        bytes += n;
        length -= (size_t)n;
    }
    return 0;
}

int teemate_private_start(struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    struct tm_control set_key = {.op = TM_CTL_SET_KEY};
    struct private_warden *warden;
    struct tm_image_header header;
    uint8_t key[16];
    size_t size;
    int result;

    if (enclave == NULL)
        return -EINVAL;
    if (enclave->warden != NULL)
        return diag_set(diag, -EALREADY, TEEMATE_STEP_CONTROL, 0, 0, "this private enclave was started before");
    if (!enclave->mapped)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_CONTROL, 0, 0, "teemate_map comes first");
    result = control_header(&enclave->info, &header, diag);
    if (result < 0)
        return result;

    size = sizeof(*warden) + header.client_slots * sizeof(warden->slot_keys[0]);
    size = (size + SGX_PAGE - 1) / SGX_PAGE * SGX_PAGE;
    warden = secret_map(size);
    if (warden == NULL)
        return diag_set(diag, -ENOMEM, TEEMATE_STEP_CONTROL, 0, 0, "no memory for the keys of the slots");
    warden->size = size;
    warden->header = header;
    warden->generation = 1;
    pthread_mutex_init(&warden->lock, NULL);
    pthread_mutex_init(&warden->disk_lock, NULL);
    warden->directory = -1;
    result = draw_random(key, sizeof(key));
    if (result == 0)
        result = draw_random(warden->slot_keys, header.client_slots * sizeof(warden->slot_keys[0]));
    if (result < 0) {
        secret_unmap(warden, size);
        return diag_set(diag, result, TEEMATE_STEP_CONTROL, 0, 0, "no random numbers: %s", strerror(-result));
    }
    control_key_init(&warden->key, key);
    crypto_wipe(key, sizeof(key));
    warden->present = 1;
    enclave->warden = warden;

    result = start_arena(enclave, diag);
    for (uint64_t slot = 0; result == 0 && slot < TM_WARDEN_SLOTS; slot++)
        result = teemate_map_tcs(enclave, tcs_offset(&header, slot), diag);
    if (result == 0)
        result = start_step(enclave, &set_key, "take its control key", diag);
    if (result == 0)
        result = start_slots(enclave, diag);
    if (result == 0)
        result = private_tick(enclave);
    if (result < 0)
        private_end(enclave);
    return result;
}

void private_end(struct teemate_enclave *enclave)
{
    struct private_warden *warden = enclave->warden;

    if (warden == NULL)
        return;
    enclave->warden = NULL;
    if (warden->present == 0)
        return; /* a child of fork: nothing is mapped here, and the size was wiped too */
    for (uint64_t slot = 0; slot < TM_WARDEN_SLOTS; slot++)
        teemate_unmap_tcs(enclave, tcs_offset(&warden->header, slot));
    files_close(warden->files);
    if (warden->directory >= 0)
        close(warden->directory);
    pthread_mutex_destroy(&warden->disk_lock);
    pthread_mutex_destroy(&warden->lock);
    secret_unmap(warden, warden->size);
}

int private_tick(struct teemate_enclave *enclave)
{
    struct private_warden *warden = enclave->warden;
    struct tm_control control = {.op = TM_CTL_TIME};
    struct tm_control_result result;
    struct control_exit exit;
    uint64_t now;

    if (warden->present == 0)
        return -ENOTCONN;
    if ((warden->header.flags & TM_IMAGE_TIME) == 0)
        return 0;
    now = clock_ns(CLOCK_MONOTONIC_COARSE);
    if (now - atomic_load_explicit(&warden->ticked_at, memory_order_relaxed) < TICK_NS)
        return 0;
    if (pthread_mutex_trylock(&warden->lock) != 0)
        return 0;
    control.argument = clock_ns(CLOCK_REALTIME);
    private_control(enclave, &control, &result, &exit);
    if (exit.entered && exit.status == TM_OK)
        atomic_store_explicit(&warden->ticked_at, now, memory_order_relaxed);
    pthread_mutex_unlock(&warden->lock);
    if (!exit.entered)
        return exit.status;
    return exit.status == TM_OK ? 0 : -EIO;
}

int teemate_private_slot(struct teemate_enclave *enclave, uint32_t n, struct teemate_slot_args *args)
{
    struct private_warden *warden;
    struct tm_identity identity = {0};
    struct tm_bind bind;
    char principal[32];
    int length;

    if (enclave == NULL || args == NULL || enclave->warden == NULL)
        return -EINVAL;
    warden = enclave->warden;
    if (warden->present == 0)
        return -ENOTCONN;
    if (n >= warden->header.client_slots)
        return -ENOENT;
    identity.uid = getuid();
    identity.gid = getgid();
    length = snprintf(principal, sizeof(principal), "uid=%u", identity.uid);
    teemate_sha256(principal, (size_t)length, identity.principal);

    memset(args, 0, sizeof(*args));
    args->index = TM_WARDEN_SLOTS + warden->header.io_slots + n;
    args->tcs_offset = tcs_offset(&warden->header, args->index);
    args->generation = warden->generation;
    memcpy(args->key, warden->slot_keys[n], sizeof(args->key));
    control_bind(&warden->key, args->index, warden->generation, &identity, &bind);
    memcpy(args->bind, &bind, sizeof(args->bind));
    return 0;
}

int teemate_private_control(struct teemate_enclave *enclave, void *tm_control, void *tm_control_result,
                            int32_t *status)
{
    struct tm_control control;
    struct control_exit exit;

    if (enclave == NULL || tm_control == NULL || tm_control_result == NULL || status == NULL ||
        enclave->warden == NULL)
        return -EINVAL;
    if (enclave->warden->present == 0)
        return -ENOTCONN;
    memcpy(&control, tm_control, sizeof(control));
    pthread_mutex_lock(&enclave->warden->lock);
    private_control(enclave, &control, tm_control_result, &exit);
    pthread_mutex_unlock(&enclave->warden->lock);
    crypto_wipe(control.key, sizeof(control.key));
    if (!exit.entered)
        return exit.status;
    *status = exit.status;
    return 0;
}

/* ---- storage --------------------------------------------------------------------------- */

static int64_t folder_disk(void *context, const void *request, void *data)
{
    return files_do(context, request, data);
}

int teemate_private_disk(struct teemate_enclave *enclave, teemate_disk *disk, void *context)
{
    struct tm_control control = {.op = TM_CTL_STORAGE, .argument = TM_STORAGE_CALLER};
    struct tm_control_result result;
    int32_t status;
    int error;

    if (enclave == NULL || enclave->warden == NULL || disk == NULL)
        return -EINVAL;
    if (enclave->warden->present == 0)
        return -ENOTCONN;
    pthread_mutex_lock(&enclave->warden->disk_lock);
    enclave->warden->disk = disk;
    enclave->warden->disk_context = context;
    pthread_mutex_unlock(&enclave->warden->disk_lock);
    error = teemate_private_control(enclave, &control, &result, &status);
    if (error < 0)
        return error;
    return status == TM_OK ? 0 : -EIO;
}

int teemate_private_storage(struct teemate_enclave *enclave, int directory, uint64_t limit)
{
    struct private_warden *warden;
    struct files *files;
    int own;
    int error;

    if (enclave == NULL || enclave->warden == NULL)
        return -EINVAL;
    warden = enclave->warden;
    if (warden->present == 0)
        return -ENOTCONN;
    if (warden->files != NULL)
        return -EALREADY;
    own = fcntl(directory, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return -errno;
    error = files_open(own, limit, &files);
    if (error < 0) {
        close(own);
        return error;
    }
    warden->directory = own;
    warden->files = files;
    return teemate_private_disk(enclave, folder_disk, files);
}

bool private_has_disk(const struct teemate_enclave *enclave)
{
    return enclave->warden != NULL && enclave->warden->present != 0;
}

int64_t private_file(struct teemate_enclave *enclave, const struct tm_file_request *request, void *data)
{
    struct private_warden *warden = enclave->warden;
    int64_t result = -ENOSYS;

    pthread_mutex_lock(&warden->disk_lock);
    if (warden->disk != NULL)
        result = warden->disk(warden->disk_context, request, data);
    pthread_mutex_unlock(&warden->disk_lock);
    return result;
}
