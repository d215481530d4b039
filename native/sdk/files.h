/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Files for enclave code, kept by the host.
 *
 * Those of a shared enclave lie in its folder of the broker's state directory, and a thread of
 * the warden does what is asked for: clients never hold a descriptor of them, unless the policy has
 * io = "client" and the code lends them one (tm_file_lend()).  Of a private enclave the calling process
 * does it, in the folder that the enclave was created with.
 *
 * THE HOST SEES AND CAN CHANGE EVERYTHING HERE: names, sizes, contents, and which old version of
 * a file it brings back.  Write what is sealed or authenticated, and check what is read.
 *
 * All of this works within an ECALL of a client only (not in tm_on_start(), tm_on_slot_reset() or
 * a control ECALL: -TM_EPERM) and not while a tm_mutex is held (-TM_EDEADLK).  It returns when the
 * thing is done, however long the disk takes, or a new warden after the old one's end; meanwhile
 * the caller outside can pause and abandon the call, as any other.
 *
 * When the caller dies in here, its request has been done, or is done before any later request of
 * anybody, or never: a dead slot's write does not come after one of whoever took over.  When the
 * warden dies, its successor does again what was not answered, before anything else: what was
 * answered has been done, and its effect is that of doing it once.
 *
 * Images that use it need an I/O slot: `teemate image build --io-slots 1`, `io_slots = 1`.
 */
#ifndef TMSDK_FILES_H
#define TMSDK_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TM_FILE_NAME_MAX 63u /* bytes: A-Z a-z 0-9 first, then also . _ - */
#define TM_FILE_MOST 65536u  /* bytes in one read or write; more is -TM_EINVAL */
#define TM_FILE_HANDLES 64u  /* open at once in one slot */

/* Failures are negative: Linux' numbers, whatever the host is.  Others of Linux may come too. */
enum tm_errno {
    TM_EPERM = 1,     /* not in an ECALL of a client */
    TM_ENOENT = 2,    /* no file of that name; of an open file: somebody has deleted it */
    TM_EIO = 5,       /* the disk failed, or the host answered what cannot be */
    TM_EBADF = 9,     /* no such handle in this slot, or it was opened to be read only */
    TM_ENOMEM = 12,   /* the enclave's heap is full, or its lock was not to be had */
    TM_EACCES = 13,   /* the host may not */
    TM_EINVAL = 22,   /* a name that cannot be, too many bytes, an offset beyond 2^62 */
    TM_EMFILE = 24,   /* TM_FILE_HANDLES are open in this slot */
    TM_EFBIG = 27,    /* larger than the file system takes */
    TM_ENOSPC = 28,   /* the disk is full, or the enclave's storage_limit is reached */
    TM_EDEADLK = 35,  /* while a mutex is held */
    TM_ENOSYS = 38,   /* this enclave has no storage: [[enclave]] storage = true, create_enclave(storage=) */
    TM_ESTALE = 116,  /* its storage was taken away: the enclave's next generation has it */
    TM_EDQUOT = 122,  /* the host's quota is reached */
};

enum tm_file_flags {
    TM_FILE_READ_ONLY = 1, /* writes and truncates are -TM_EBADF; never with CREATE */
    TM_FILE_CREATE = 2,    /* make it, empty, when there is none */
};

/*
 * Handles are numbers of the running slot, which forgets them when it gets its next holder; they
 * lock nothing.  A handle means the file's NAME: who deletes a file takes it from all.
 */
int tm_file_open(const char *name, unsigned flags, uint32_t *handle);
/* Never fails but with -TM_EBADF; says nothing about what was written (tm_file_sync() does). */
int tm_file_close(uint32_t handle);

/* Whether the policy lets clients have descriptors of files (io = "client"). */
bool tm_file_lends(void);
/*
 * From now on the broker gives the slot's process a descriptor of the file when it asks for one: until the
 * handle is closed or the slot's holder is gone.  One that only reads for a handle that was opened so.  What was given
 * cannot be taken back: WHO HAS IT CAN CHANGE, CUT AND FILL THE FILE FOR AS LONG AS IT LIKES.  -TM_EPERM where the
 * policy has none of that; a failure of tm_file_sync(), since the file's name has to be on the disk first.
 */
int tm_file_lend(uint32_t handle);
/*
 * The slot's process has its descriptor now: it does what is asked of this handle from here on, in an OCALL, and
 * can lie about that.  What is under way when it dies is done or not, or done in part, and never later.  -TM_EBADF
 * when it was not lent.
 */
int tm_file_direct(uint32_t handle);

/* The number of bytes read: fewer than `length` only at the end of the file.  Buffers are the enclave's memory. */
int64_t tm_file_read(uint32_t handle, uint64_t offset, void *buffer, size_t length);
/*
 * `length`, or a failure, after which some of the bytes may have been written.  Beyond the end the
 * file grows, with zeros in between.  Others see it at once; it outlives the host's crash only
 * after tm_file_sync().
 */
int64_t tm_file_write(uint32_t handle, uint64_t offset, const void *buffer, size_t length);
/*
 * Everything that was written to the file, by whomever, its size and its name are on the disk.
 * After a failure nobody knows how much of it is: a later success says nothing about what was
 * written before that.
 */
int tm_file_sync(uint32_t handle);
int64_t tm_file_size(uint32_t handle);
/* Shorter, or longer with zeros. */
int tm_file_truncate(uint32_t handle, uint64_t size);
/* On the disk too when it returns.  -TM_ENOENT when there is none. */
int tm_file_delete(const char *name);
/*
 * Names of files, each with its zero, as many whole ones as fit; the first `from` of them are left out.  The number of
 * bytes, 0 when there are no more.  They come in no order, and where files are made or deleted meanwhile one may
 * be missing or come twice.  The host can leave out what it likes, and make names up: check them.
 */
int64_t tm_file_list(uint64_t from, void *buffer, size_t length);

#endif
