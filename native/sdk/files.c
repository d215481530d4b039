/* SPDX-License-Identifier: Apache-2.0 */
/* Files of the host, the slot's side: handles, a request, its answer; io.h tells how they travel. */
#include "files.h"

#include "io.h"
#include "lock.h"

#define SPINS 2000u /* PAUSEs, some 50 us: most reads are answered from the host's cache */
#define OFFSET_MOST (1ull << 62)

/* May this slot ask for something now? */
static int refusal(const struct thread *self)
{
    if (!self->in_call)
        return -TM_EPERM;
    if (self->lock_count)
        return -TM_EDEADLK;
    switch (io_mode()) {
    case TM_STORAGE_NONE:
        return -TM_ENOSYS;
    case TM_STORAGE_MOVED:
        return -TM_ESTALE;
    default:
        return 0;
    }
}

static int name_check(const char *name)
{
    size_t length = 0;

    for (; name[length]; length++) {
        char c = name[length];
        bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');

        if (length == TM_FILE_NAME_MAX || !(plain || (length && (c == '.' || c == '_' || c == '-'))))
            return -TM_EINVAL;
    }
    return length ? 0 : -TM_EINVAL;
}

/* The slot's mailbox, made by the first who wants one; a death leaves it made or the block the slot's own. */
static int mailbox_get(struct thread *self, struct mailbox **mailbox)
{
    if (!self->mailbox) {
        struct tm_txn txn;
        void *made;

        if (tm_try_alloc(sizeof(**mailbox), &made))
            return -TM_ENOMEM;
        tm_txn_begin(&txn);
        tm_txn_keep(&txn, made);
        tm_txn_set_ptr(&txn, &self->mailbox, made);
        tm_txn_commit(&txn);
    }
    *mailbox = self->mailbox;
    return 0;
}

/* Sleep outside until the word changes, 100 ms at the longest; false when it has changed already. */
static bool sleep(struct thread *self, uint64_t word, uint32_t counter)
{
    if (!(word & IO_WAITING) && !io_swap(self, &word, word | IO_WAITING))
        return false;
    ocall_wait(TM_OCALL_WAIT, arena_index((const void *)&self->io_word), counter, WAIT_NS);
    return true;
}

/* What an earlier holder had asked for is still being done: its data is the I/O thread's. */
static int64_t await_idle(struct thread *self)
{
    uint32_t index = arena_index((const void *)&self->io_word);

    io_drop(self);
    for (;;) {
        uint32_t counter = arena_read(index);
        uint64_t word = self->io_word;

        if (IO_STATE(word) == IO_IDLE)
            return 0;
        if (!io_by_warden())
            return -TM_ESTALE;
        sleep(self, word, counter);
    }
}

static int64_t await_answer(struct thread *self, const struct mailbox *mailbox)
{
    uint32_t index = arena_index((const void *)&self->io_word);
    uint64_t word = self->io_word;

    for (uint32_t spins = 0; spins < SPINS && IO_STATE(word) != IO_DONE; spins++) {
        __builtin_ia32_pause();
        word = self->io_word;
    }
    for (;;) {
        uint32_t counter = arena_read(index);

        word = self->io_word;
        if (IO_STATE(word) == IO_DONE)
            return mailbox->result;
        /* Nobody takes it any more; what was taken is answered, or given back by the next warden. */
        if (IO_STATE(word) == IO_POSTED && !io_by_warden()) {
            if (io_swap(self, &word, IO_WORD(IO_NUMBER(word), IO_IDLE)))
                return -TM_ESTALE;
            continue;
        }
        sleep(self, word, counter);
    }
}

/* Through the warden.  `data` is the caller's: written from, or read into. */
static int64_t post(struct thread *self, struct mailbox *mailbox, const struct tm_file_request *request, void *data)
{
    int64_t result = await_idle(self);
    uint32_t word;

    if (result)
        return result;
    mailbox->request = *request;
    if (request->op == TM_FILE_OP_WRITE)
        memcpy(mailbox->data, data, request->length);
    __atomic_store_n((uint64_t *)&self->io_word, IO_WORD(IO_NUMBER(self->io_word) + 1, IO_POSTED), __ATOMIC_SEQ_CST);
    if (io_was_asleep(&word))
        ocall_wait(TM_OCALL_WAKE, word, 1, 0);
    result = await_answer(self, mailbox);
    if (IO_STATE(self->io_word) == IO_DONE) {
        if (request->op == TM_FILE_OP_READ && result > 0)
            memcpy(data, mailbox->data, (size_t)result);
        self->io_word = IO_WORD(IO_NUMBER(self->io_word), IO_IDLE);
    }
    return result;
}

/* The host's word for it: a failure, or what can be. */
static int64_t plausible(const struct tm_file_request *request, int64_t result)
{
    if (result < 0)
        return result >= -4095 ? result : -TM_EIO;
    switch (request->op) {
    case TM_FILE_OP_READ:
        return (uint64_t)result <= request->length ? result : -TM_EIO;
    case TM_FILE_OP_WRITE:
        return (uint64_t)result == request->length ? result : -TM_EIO;
    case TM_FILE_OP_SIZE:
        return result;
    default:
        return 0;
    }
}

/* `direct`: of a file that the slot's process has a descriptor of. */
static int64_t ask(const struct tm_file_request *request, void *data, bool direct)
{
    struct thread *self = thread_self();
    struct mailbox *mailbox;
    int status = refusal(self);

    if (!status)
        status = mailbox_get(self, &mailbox);
    if (status)
        return status;
    if (io_mode() == TM_STORAGE_CALLER || (direct && io_mode() == TM_STORAGE_LENT))
        return plausible(request, ocall_file(request, data));
    return plausible(request, post(self, mailbox, request, data));
}

static struct handle *handle_of(uint32_t number)
{
    struct mailbox *mailbox = thread_self()->mailbox;

    if (!mailbox || number >= TM_FILE_HANDLES || !mailbox->handles[number].name[0])
        return NULL;
    return &mailbox->handles[number];
}

/* `op` on an open file; -EBADF when there is none, or it is not open for that. */
static int64_t ask_of(uint32_t number, enum tm_file_op op, uint64_t offset, void *data, size_t length)
{
    bool changes = op == TM_FILE_OP_WRITE || op == TM_FILE_OP_TRUNCATE;
    struct tm_file_request request = {.op = op, .offset = offset, .length = length};
    const struct handle *handle = handle_of(number);

    if (!handle || (changes && handle->flags & TM_FILE_READ_ONLY))
        return -TM_EBADF;
    if (length > TM_FILE_MOST || offset > OFFSET_MOST)
        return -TM_EINVAL;
    memcpy(request.name, handle->name, sizeof(request.name));
    return ask(&request, data, handle->direct);
}

int tm_file_open(const char *name, unsigned flags, uint32_t *number)
{
    struct thread *self = thread_self();
    struct tm_file_request request = {.op = TM_FILE_OP_OPEN};
    struct mailbox *mailbox;
    uint32_t place = 0;
    int status = refusal(self);

    if (status)
        return status;
    if (flags & ~(TM_FILE_READ_ONLY | TM_FILE_CREATE) || flags == (TM_FILE_READ_ONLY | TM_FILE_CREATE) ||
        name_check(name))
        return -TM_EINVAL;
    status = mailbox_get(self, &mailbox);
    if (status)
        return status;
    while (place < TM_FILE_HANDLES && mailbox->handles[place].name[0])
        place++;
    if (place == TM_FILE_HANDLES)
        return -TM_EMFILE;
    memcpy(request.name, name, strlen(name));
    request.flags = flags & TM_FILE_CREATE ? TM_FILE_OP_CREATE : 0;
    status = (int)ask(&request, NULL, false);
    if (status)
        return status;
    memcpy(mailbox->handles[place].name, request.name, sizeof(request.name));
    mailbox->handles[place].flags = flags;
    *number = place;
    return 0;
}

int tm_file_close(uint32_t number)
{
    struct handle *handle = handle_of(number);

    if (!handle)
        return -TM_EBADF;
    handle_forget(handle);
    return 0;
}

bool tm_file_lends(void)
{
    return io_mode() == TM_STORAGE_LENT;
}

int tm_file_lend(uint32_t number)
{
    static _Atomic uint64_t lent;
    struct handle *handle = handle_of(number);
    int status = 0;

    if (!handle)
        return -TM_EBADF;
    if (!tm_file_lends())
        return -TM_EPERM;
    if (handle->lent)
        return 0;
    /* Its name is on the disk from here on: who has its descriptor only cannot see to that. */
    if (!(handle->flags & TM_FILE_READ_ONLY))
        status = tm_file_sync(number);
    if (!status)
        handle->lent = ++lent;
    return status;
}

int tm_file_direct(uint32_t number)
{
    struct handle *handle = handle_of(number);

    if (!handle || !handle->lent)
        return -TM_EBADF;
    handle->direct = true;
    return 0;
}

int64_t tm_file_read(uint32_t number, uint64_t offset, void *buffer, size_t length)
{
    return ask_of(number, TM_FILE_OP_READ, offset, buffer, length);
}

int64_t tm_file_write(uint32_t number, uint64_t offset, const void *buffer, size_t length)
{
    return ask_of(number, TM_FILE_OP_WRITE, offset, (void *)buffer, length);
}

int tm_file_sync(uint32_t number)
{
    return (int)ask_of(number, TM_FILE_OP_SYNC, 0, NULL, 0);
}

int64_t tm_file_size(uint32_t number)
{
    return ask_of(number, TM_FILE_OP_SIZE, 0, NULL, 0);
}

int tm_file_truncate(uint32_t number, uint64_t size)
{
    return (int)ask_of(number, TM_FILE_OP_TRUNCATE, size, NULL, 0);
}

int tm_file_delete(const char *name)
{
    struct tm_file_request request = {.op = TM_FILE_OP_DELETE};

    if (name_check(name))
        return -TM_EINVAL;
    memcpy(request.name, name, strlen(name));
    return (int)ask(&request, NULL, false);
}

int64_t tm_file_list(uint64_t from, void *buffer, size_t length)
{
    struct tm_file_request request = {.op = TM_FILE_OP_READ, .offset = from, .length = length};

    if (length > TM_FILE_MOST || from > OFFSET_MOST)
        return -TM_EINVAL;
    return ask(&request, buffer, false);
}
