/* SPDX-License-Identifier: Apache-2.0 */
/* Slots of SDK enclaves: open, close, abandon, and raw entries with the slot's key. */
#include "slot.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "counters.h"
#include "crypto.h"

void *secret_map(size_t size)
{
    void *page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (page == MAP_FAILED)
        return NULL;
    if (madvise(page, size, MADV_WIPEONFORK) != 0 || madvise(page, size, MADV_DONTDUMP) != 0) {
        munmap(page, size);
        return NULL;
    }
    return page;
}

void secret_unmap(void *secret, size_t size)
{
    if (secret == NULL)
        return;
    crypto_wipe(secret, size);
    munmap(secret, size);
}

int slot_take(struct teemate_slot *slot)
{
    /* In a child the page is zero; so is nothing else, `taken` least of all. */
    if (slot->secret->present == 0)
        return -ENOTCONN;
    if (atomic_exchange_explicit(&slot->taken, true, memory_order_acquire))
        return -EBUSY;
    return 0;
}

void slot_give(struct teemate_slot *slot)
{
    atomic_store_explicit(&slot->taken, false, memory_order_release);
}

/*
 * Where a key was and no OCALL has been, kept for the next slot: attaching again and again is common, and
 * mapping takes as long as a call.  At most one in a process, with a page of memory; in a child of fork it is
 * wiped, and as good.
 */
static void *_Atomic spare;

#define MEMORY_SIZE (SGX_PAGE + SLOT_OCALL_CAPACITY)

/* The page of the key, and the OCALL buffer behind it. */
static bool memory_map(struct teemate_slot *slot)
{
    uint8_t *memory = atomic_exchange(&spare, NULL);

    if (memory == NULL)
        memory = secret_map(MEMORY_SIZE);
    if (memory == NULL)
        return false;
    slot->secret = (struct slot_secret *)memory;
    slot->ocall_buffer = memory + SGX_PAGE;
    return true;
}

static void memory_unmap(struct teemate_slot *slot)
{
    void *memory = slot->secret, *none = NULL;

    if (memory == NULL)
        return;
    crypto_wipe(slot->secret, sizeof(*slot->secret));
    slot->secret = NULL;
    if (slot->asked || slot->state != SLOT_IDLE || !atomic_compare_exchange_strong(&spare, &none, memory))
        munmap(memory, MEMORY_SIZE);
}

static void lent_forget(struct slot_lent *lent)
{
    if (lent->name[0] != '\0')
        close(lent->fd);
    memset(lent, 0, sizeof(*lent));
}

static void slot_free(struct teemate_slot *slot)
{
    for (size_t i = 0; i < SLOT_LENT; i++)
        lent_forget(&slot->lent[i]);
    memory_unmap(slot);
    free(slot);
}

int teemate_slot_open(struct teemate_enclave *enclave, const struct teemate_slot_args *args,
                      struct teemate_slot **out, struct teemate_diag *diag)
{
    struct teemate_slot *slot;
    int result;

    if (enclave == NULL || args == NULL || out == NULL)
        return -EINVAL;
    slot = calloc(1, sizeof(*slot));
    if (slot == NULL)
        return diag_set(diag, -ENOMEM, TEEMATE_STEP_MAP, 0, args->tcs_offset, "no memory for a slot");
    slot->enclave = enclave;
    slot->tcs_offset = args->tcs_offset;
    slot->index = args->index;
    memcpy(&slot->bind, args->bind, sizeof(slot->bind));
    if (!memory_map(slot)) {
        slot_free(slot);
        return diag_set(diag, -ENOMEM, TEEMATE_STEP_MAP, 0, args->tcs_offset,
                        "no memory for the key and the OCALL buffer of a slot");
    }
    result = teemate_map_tcs(enclave, args->tcs_offset, diag);
    if (result < 0) {
        slot_free(slot);
        return result;
    }
    memcpy(slot->secret->key, args->key, sizeof(slot->secret->key));
    slot->secret->present = 1;
    *out = slot;
    return 0;
}

int teemate_slot_close(struct teemate_slot *slot)
{
    int result = slot_take(slot);
    bool clean;

    if (result == -EBUSY)
        return result;
    if (result == -ENOTCONN) {
        /* The child of a fork has no mapping of the TCS to give up. */
        slot_free(slot);
        return 0;
    }
    clean = slot->state == SLOT_IDLE;
    teemate_unmap_tcs(slot->enclave, slot->tcs_offset);
    slot_free(slot);
    return clean ? 1 : 0;
}

/* With the slot taken. */
static int lend(struct teemate_slot *slot, const char *name, int fd)
{
    struct slot_lent *place = NULL;

    for (size_t i = 0; i < SLOT_LENT; i++) {
        struct slot_lent *lent = &slot->lent[i];

        if (lent->name[0] != '\0' && strcmp(lent->name, name) == 0)
            lent_forget(lent);
        if (lent->name[0] == '\0' && place == NULL)
            place = lent;
    }
    if (fd < 0)
        return 0;
    if (place == NULL)
        return -ENOSPC;
    memcpy(place->name, name, strlen(name));
    place->fd = fd;
    return 0;
}

int teemate_slot_lend(struct teemate_slot *slot, const char *name, int fd)
{
    size_t length = name == NULL ? 0 : strnlen(name, sizeof(slot->lent->name));
    int result = -EINVAL;

    if (slot != NULL && length != 0 && length < sizeof(slot->lent->name)) {
        result = slot_take(slot);
        if (result == 0) {
            result = lend(slot, name, fd);
            slot_give(slot);
        }
    }
    if (result != 0 && fd >= 0)
        close(fd);
    return result;
}

void teemate_slot_abandon(struct teemate_slot *slot)
{
    if (slot_take(slot) != 0)
        return;
    if (slot->state == SLOT_PAUSED && slot->function == SGX_EENTER && slot->entry.rdi == TM_SEL_ECALL)
        slot->state = SLOT_IDLE; /* the ECALL had not begun: the enclave never saw it */
    else if (slot->state != SLOT_IDLE)
        slot->state = SLOT_INTERRUPTED;
    slot_give(slot);
}

int teemate_slot_enter(struct teemate_slot *slot, struct teemate_regs *regs, uint32_t function,
                       uint64_t pause_after_ns, struct sgx_enclave_run *run)
{
    struct counters_step step;
    int result;

    if (regs == NULL || run == NULL)
        return -EINVAL;
    result = slot_take(slot);
    if (result < 0)
        return result;
    if (slot->state == SLOT_ASKING || (slot->state == SLOT_PAUSED && function != SGX_ERESUME)) {
        slot_give(slot);
        return -EBUSY; /* a call through teemate_slot_call stands in there */
    }
    regs->r12 = slot->secret->key[0];
    regs->r13 = slot->secret->key[1];
    step = counters_enter(slot);
    result = teemate_enter(slot->enclave, slot->tcs_offset, regs, function, pause_after_ns, run);
    counters_leave(step, result == TEEMATE_LEFT && run->function == SGX_EEXIT);
    if (result == TEEMATE_LEFT && run->function == SGX_EEXIT)
        slot->state = SLOT_IDLE;
    else if (result >= 0 && !(result == TEEMATE_PAUSED && run->function == SGX_EENTER)) /* it has begun */
        slot->state = SLOT_INTERRUPTED;
    slot_give(slot);
    return result;
}
