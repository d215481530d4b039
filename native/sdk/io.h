/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests to the host: a mailbox for each client slot.
 *
 *   files.c  the slot's side: handles, posting a request, waiting for its answer
 *   io.c     the other side: the warden's I/O thread, and the repair of both
 *
 * A slot asks for one thing at a time, so there is no queue that a death could leave half changed:
 * the I/O thread looks at all mailboxes.  What a mailbox is in is one word of the slot's thread data,
 * changed by compare-and-swap:
 *
 *   IDLE --poster--> POSTED --I/O thread--> TAKEN --I/O thread--> DONE --poster--> IDLE
 *
 * Request and data belong to the poster in IDLE and DONE, to the I/O thread in TAKEN, to nobody in
 * POSTED.  The poster's end (RESET) makes POSTED and DONE idle, and marks TAKEN as GONE: it becomes idle
 * when it has been done, and the slot's next holder waits for that.  The I/O thread's end (REINIT) makes
 * TAKEN to POSTED AGAIN, which goes before everything that was not taken yet, so that what was begun
 * is done before anybody else's later request; when its poster is GONE it was done or not, and that is it.
 *
 * There is ONE I/O thread, whatever the number of I/O slots: so requests are done one after the
 * other, and a dead slot's write cannot come after the write of whoever got its locks.
 */
#ifndef TMSDK_IO_H
#define TMSDK_IO_H

#include "files.h"
#include "thread.h"

#define IO_IDLE 0u
#define IO_POSTED 1u
#define IO_TAKEN 2u
#define IO_DONE 3u
#define IO_STATE(word) ((word) & 0xfu)
#define IO_WAITING 0x10u /* the poster sleeps outside: wake it */
#define IO_AGAIN 0x20u   /* a warden that is no more had taken it */
#define IO_GONE 0x40u    /* nobody waits for the answer */
#define IO_NUMBER(word) ((word) >> 16) /* of the request, counted per slot */
#define IO_WORD(number, state) ((uint64_t)(number) << 16 | (state))

struct handle {
    char name[64]; /* empty: not open */
    uint32_t flags; /* enum tm_file_flags */
    bool direct;    /* the slot's process does it, with its own descriptor */
    /* Not 0: the broker may give the slot's process a descriptor of it.  A number of its own each time, so that
     * who reads this and the rest from another slot sees whether they belong together. */
    _Atomic uint64_t lent;
};

/* What it was lent goes first: nobody finds it with what another file's handle has next. */
static inline void handle_forget(struct handle *handle)
{
    handle->lent = 0;
    memset(handle->name, 0, sizeof(handle->name));
    handle->flags = 0;
    handle->direct = false;
}

/* On the heap, kept for as long as the enclave lives; made by the slot's first holder that opens a file. */
struct mailbox {
    struct tm_file_request request;
    int64_t result;
    struct handle handles[TM_FILE_HANDLES];
    uint8_t data[TM_FILE_DATA];
};
_Static_assert(TM_FILE_MOST == TM_FILE_DATA, "one call, one request");
_Static_assert(TM_FILE_NAME_MAX + 1 == sizeof(((struct handle *)0)->name), "names end with a zero");

static inline bool io_swap(struct thread *thread, uint64_t *expected, uint64_t desired)
{
    return __atomic_compare_exchange_n((uint64_t *)&thread->io_word, expected, desired, false, __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST);
}

/* Who does the requests now. */
enum tm_storage io_mode(void);
/* Is that the warden's I/O thread, but perhaps for what is lent? */
static inline bool io_by_warden(void)
{
    return io_mode() == TM_STORAGE_WARDEN || io_mode() == TM_STORAGE_LENT;
}
/* After a post: was the I/O thread asleep?  Then `word` of the arena wakes it. */
bool io_was_asleep(uint32_t *word);

/* TM_CTL_STORAGE. */
int64_t io_storage(uint64_t mode);
/* TM_CTL_LENT: what the slot is lent of the file `name`. */
enum tm_lent io_lent(const struct thread *thread, const char name[64]);
/* Nobody waits for this slot's last request any more. */
void io_drop(struct thread *thread);
/* RESET: the holder of this slot is no more. */
void io_release(struct thread *dead);
/* REINIT of an I/O slot, and the next warden's first entry: the last warden is no more. */
void io_retake(void);

#endif
