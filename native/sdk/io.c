/* SPDX-License-Identifier: Apache-2.0 */
/* The other side of the mailboxes: the warden's I/O thread, and what repair does to them; see io.h. */
#include "io.h"

#include "lock.h"

static _Atomic uint32_t storage; /* enum tm_storage */
static _Atomic uint32_t asleep;  /* the I/O thread has found nothing, and waits outside at this word's place */
static uint64_t next;            /* where the I/O thread goes on looking */

enum tm_storage io_mode(void)
{
    return storage;
}

bool io_was_asleep(uint32_t *word)
{
    *word = arena_index((const void *)&asleep);
    return __atomic_exchange_n((uint32_t *)&asleep, 0, __ATOMIC_SEQ_CST);
}

int64_t io_storage(uint64_t mode)
{
    if (mode > TM_STORAGE_CALLER && mode != TM_STORAGE_LENT)
        return TM_E_ARGUMENT;
    /* Who has used files of this enclave must not believe that there never were any. */
    if (mode == TM_STORAGE_NONE && storage != TM_STORAGE_NONE)
        mode = TM_STORAGE_MOVED;
    storage = (uint32_t)mode;
    return 0;
}

enum tm_lent io_lent(const struct thread *thread, const char name[64])
{
    const struct mailbox *mailbox = thread->mailbox;

    for (uint32_t i = 0; mailbox && storage == TM_STORAGE_LENT && i < TM_FILE_HANDLES; i++) {
        const struct handle *handle = &mailbox->handles[i];
        uint64_t number = handle->lent;
        bool same = number && !memcmp(handle->name, name, sizeof(handle->name));
        uint32_t flags = __atomic_load_n(&handle->flags, __ATOMIC_RELAXED);

        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (same && handle->lent == number)
            return flags & TM_FILE_READ_ONLY ? TM_LENT_READ : TM_LENT_WRITE;
    }
    return TM_LENT_NOT;
}

void io_drop(struct thread *thread)
{
    uint64_t word = thread->io_word, next_word;

    do {
        if (IO_STATE(word) == IO_IDLE || (word & IO_GONE))
            return;
        next_word = IO_STATE(word) == IO_TAKEN ? word | IO_GONE : IO_WORD(IO_NUMBER(word), IO_IDLE);
    } while (!io_swap(thread, &word, next_word));
}

void io_release(struct thread *dead)
{
    for (uint32_t i = 0; dead->mailbox && i < TM_FILE_HANDLES; i++)
        handle_forget(&dead->mailbox->handles[i]);
    io_drop(dead);
}

void io_retake(void)
{
    for (uint64_t slot = TM_WARDEN_SLOTS + header()->io_slots; slot < slot_count(); slot++) {
        struct thread *thread = thread_of(slot);
        uint64_t word = thread->io_word, next_word;

        do {
            if (IO_STATE(word) != IO_TAKEN)
                break;
            next_word = word & IO_GONE ? IO_WORD(IO_NUMBER(word), IO_IDLE)
                                       : IO_WORD(IO_NUMBER(word), IO_POSTED | IO_AGAIN | (word & IO_WAITING));
#ifdef TM_TEST_NO_RETAKE
            /* Test build: what the dead warden had taken is nobody's. */
            next_word = word;
#endif
        } while (!io_swap(thread, &word, next_word));
    }
    asleep = 0;
}

/* The answer goes to the poster; returns the arena's word where it waits, TM_ARENA_WORDS when it does not. */
static uint32_t complete(uint64_t ticket, int64_t result, const uint8_t *data)
{
    uint64_t slot = ticket & 0xffff;
    struct thread *thread;
    struct mailbox *mailbox;
    uint64_t word, next_word;

    if (slot < TM_WARDEN_SLOTS + header()->io_slots || slot >= slot_count())
        return TM_ARENA_WORDS;
    thread = thread_of(slot);
    word = thread->io_word;
    /* An answer to what is no longer asked: of a warden that was too late, or made up. */
    if (IO_STATE(word) != IO_TAKEN || IO_NUMBER(word) != ticket >> 16)
        return TM_ARENA_WORDS;
    mailbox = thread->mailbox;
    if (mailbox->request.op == TM_FILE_OP_READ && result > 0) {
        if ((uint64_t)result > mailbox->request.length)
            result = -TM_EIO;
        else
            memcpy(mailbox->data, data, (size_t)result);
    }
    mailbox->result = result;
    do
        next_word = IO_WORD(IO_NUMBER(word), word & IO_GONE ? IO_IDLE : IO_DONE);
    while (!io_swap(thread, &word, next_word));
    return word & IO_WAITING ? arena_index((const void *)&thread->io_word) : TM_ARENA_WORDS;
}

/* The slot of a request that waits to be taken, 0 when there is none: what was taken before comes first. */
static uint64_t find(void)
{
    uint64_t first = TM_WARDEN_SLOTS + header()->io_slots, count = header()->client_slots, found = 0;

    for (uint64_t i = 0; i < count; i++) {
        uint64_t slot = first + (next + i) % count, word = thread_of(slot)->io_word;

        if (IO_STATE(word) != IO_POSTED)
            continue;
        if (word & IO_AGAIN)
            return slot;
        if (!found)
            found = slot;
    }
    return found;
}

/* The next request goes to `step`: its ticket, 0 when there is none. */
static uint64_t take(struct tm_io_step *step, uint8_t *data)
{
    uint64_t slot, word;

    while ((slot = find())) {
        struct thread *thread = thread_of(slot);
        const struct mailbox *mailbox = thread->mailbox;

        word = thread->io_word;
        if (IO_STATE(word) != IO_POSTED || !io_swap(thread, &word, word + (IO_TAKEN - IO_POSTED)))
            continue; /* its poster has died, or sleeps now */
        next = slot - TM_WARDEN_SLOTS - header()->io_slots + 1;
        step->request = mailbox->request;
        if (word & IO_AGAIN)
            step->request.flags |= TM_FILE_OP_AGAIN;
        if (mailbox->request.op == TM_FILE_OP_WRITE)
            memcpy(data, mailbox->data, mailbox->request.length);
        return IO_NUMBER(word) << 16 | slot;
    }
    return 0;
}

struct gate_result tm_gate_io(uint64_t address)
{
    struct gate_result out = {TM_E_ARGUMENT, 0};
    struct tm_io_step step;
    uint8_t *data;

    if (!range_outside(address, sizeof(step)))
        return out;
    memcpy(&step, (const void *)address, sizeof(step));
    if (step.begins > 1 || !range_outside(step.data, TM_FILE_DATA))
        return out;
    out.status = tm_control_state == CONTROL_READY && io_by_warden() ? 0 : TM_E_NOTREADY;
    if (out.status)
        return out;
    if (step.begins)
        io_retake();
    data = (uint8_t *)step.data;
    step.wake = step.ticket ? complete(step.ticket, step.result, data) : TM_ARENA_WORDS;
    step.ticket = take(&step, data);
    if (!step.ticket) {
        /* The counter before the last look: who posts after it has it incremented. */
        step.idle = arena_index((const void *)&asleep);
        step.expected = arena_read(step.idle);
        __atomic_store_n((uint32_t *)&asleep, 1, __ATOMIC_SEQ_CST);
        step.ticket = take(&step, data);
        if (step.ticket)
            asleep = 0;
    }
    memcpy((void *)address, &step, sizeof(step));
    return out;
}
