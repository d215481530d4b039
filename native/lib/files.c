/* SPDX-License-Identifier: Apache-2.0 */
/* The files of one enclave: see files.h. */
#include "files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BLOCK 4096u
#define OPEN_MOST 64u /* descriptors; requests carry names, so any may be closed in between */
#define LIST_BYTES 4096u

struct file {
    char name[64]; /* empty: this place is free */
    int fd;
    bool written;  /* since the last sync: closing it could hide an error of writing back */
    bool named;    /* its entry in the folder is on the disk */
    int failed;    /* an error of writing back that nobody has heard of */
    uint64_t used; /* when, in requests */
};

struct files {
    int directory; /* the caller's */
    uint64_t limit;
    uint64_t taken; /* bytes of all files, as the limit counts them */
    uint64_t requests;
    struct file open[OPEN_MOST];
};

/* ---- the limit ----------------------------------------------------------------------- */

static uint64_t cost(uint64_t size)
{
    return size == 0 ? BLOCK : (size + BLOCK - 1) / BLOCK * BLOCK;
}

/* Does a file of `before` bytes (-1: there is none) still fit when it has `after`? */
static bool fits(const struct files *files, int64_t before, uint64_t after)
{
    uint64_t counted = before < 0 ? 0 : cost((uint64_t)before);
    uint64_t rest = files->taken - (counted < files->taken ? counted : files->taken);

    if (before >= 0 && cost(after) <= cost((uint64_t)before))
        return true;
    return files->limit == 0 || (rest <= files->limit && cost(after) <= files->limit - rest);
}

/* Who else writes there is not seen: a file may have become larger than what was counted of it. */
static void account(struct files *files, int64_t before, int64_t after)
{
    uint64_t counted = before < 0 ? 0 : cost((uint64_t)before);

    files->taken -= counted < files->taken ? counted : files->taken;
    files->taken += after < 0 ? 0 : cost((uint64_t)after);
}

static int64_t size_of(int fd)
{
    struct stat status;

    return fstat(fd, &status) == 0 ? (int64_t)status.st_size : -errno;
}

/* ---- names ---------------------------------------------------------------------------- */

static bool name_fits(const char name[64])
{
    size_t length = strnlen(name, 64);

    if (length == 0 || length == 64)
        return false;
    for (size_t i = 0; i < length; i++) {
        char c = name[i];
        bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');

        if (!plain && (i == 0 || (c != '.' && c != '_' && c != '-')))
            return false;
    }
    return true;
}

static int open_beneath(int directory, const char *name, uint64_t flags)
{
    struct open_how how = {
        .flags = flags | O_CLOEXEC | O_NONBLOCK, /* what is no file is refused, not waited for */
        .mode = flags & O_CREAT ? S_IRUSR | S_IWUSR : 0,
        .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS,
    };
    long fd = syscall(SYS_openat2, directory, name, &how, sizeof(how));

    return fd < 0 ? -errno : (int)fd;
}

/* ---- open files ------------------------------------------------------------------------ */

static struct file *find(struct files *files, const char *name)
{
    for (size_t i = 0; i < OPEN_MOST; i++) {
        if (files->open[i].name[0] != '\0' && strcmp(files->open[i].name, name) == 0)
            return &files->open[i];
    }
    return NULL;
}

static void forget(struct file *file)
{
    close(file->fd);
    memset(file, 0, sizeof(*file));
}

/*
 * A free place: that of the file that was used longest ago, of those that have nothing unsynced
 * first.  Writing back may fail, which the next sync of that file has to say: then it stays, and so says this.
 */
static int place(struct files *files, struct file **found)
{
    struct file *oldest = NULL;

    for (size_t i = 0; i < OPEN_MOST; i++) {
        struct file *file = &files->open[i];

        if (file->name[0] == '\0') {
            *found = file;
            return 0;
        }
        if (file->failed != 0)
            continue;
        if (oldest == NULL || file->written < oldest->written ||
            (file->written == oldest->written && file->used < oldest->used))
            oldest = file;
    }
    if (oldest == NULL)
        return -EMFILE;
    if (oldest->written && fdatasync(oldest->fd) != 0) {
        oldest->failed = errno;
        return -oldest->failed;
    }
    forget(oldest);
    *found = oldest;
    return 0;
}

/* The open file of that name; `create`: made when there is none. */
static int open_file(struct files *files, const char *name, bool create, struct file **result)
{
    struct file *file = find(files, name);
    struct stat status;
    int fd, error;

    *result = file;
    if (file != NULL)
        return 0;
    error = place(files, &file);
    if (error < 0)
        return error;
    fd = open_beneath(files->directory, name, O_RDWR);
    if (fd == -ENOENT && create) {
        if (!fits(files, -1, 0))
            return -ENOSPC;
        fd = open_beneath(files->directory, name, O_RDWR | O_CREAT | O_EXCL);
        if (fd >= 0)
            account(files, -1, 0);
    }
    if (fd < 0)
        return fd;
    if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
        close(fd);
        return -EACCES;
    }
    *file = (struct file){.fd = fd};
    memcpy(file->name, name, strlen(name));
    *result = file;
    return 0;
}

/* ---- requests --------------------------------------------------------------------------- */

static int64_t do_read(int fd, uint64_t offset, uint8_t *data, uint64_t length)
{
    uint64_t done = 0;

    while (done < length) {
        ssize_t n = pread(fd, data + done, length - done, (off_t)(offset + done));

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            break;
        done += (uint64_t)n;
    }
    return (int64_t)done;
}

static int64_t write_all(int fd, uint64_t offset, const uint8_t *data, uint64_t length)
{
    uint64_t done = 0;

    while (done < length) {
        ssize_t n = pwrite(fd, data + done, length - done, (off_t)(offset + done));

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        done += (uint64_t)n;
    }
    return (int64_t)length;
}

static int cut(int fd, uint64_t size)
{
    int result;

    do
        result = ftruncate(fd, (off_t)size);
    while (result != 0 && errno == EINTR);
    return result == 0 ? 0 : -errno;
}

static int64_t do_write(struct files *files, struct file *file, uint64_t offset, const uint8_t *data, uint64_t length)
{
    int64_t before = size_of(file->fd), after, result;

    if (before < 0)
        return before;
    if (offset + length > (uint64_t)before && !fits(files, before, offset + length))
        return -ENOSPC;
    file->written = true;
    result = write_all(file->fd, offset, data, length);
    after = size_of(file->fd);
    account(files, before, after < 0 ? before : after);
    return result;
}

static int64_t do_truncate(struct files *files, struct file *file, uint64_t size)
{
    int64_t before = size_of(file->fd);
    int result;

    if (before < 0)
        return before;
    if (!fits(files, before, size))
        return -ENOSPC;
    file->written = true;
    result = cut(file->fd, size);
    if (result < 0)
        return result;
    account(files, before, (int64_t)size);
    return 0;
}

static int64_t do_sync(struct files *files, struct file *file)
{
    int failed = file->failed;

    file->failed = 0;
    if (failed != 0)
        return -failed;
    if (fdatasync(file->fd) != 0)
        return -errno;
    file->written = false;
    /* Not known of a file that another process made: so once for each. */
    if (!file->named && fsync(files->directory) != 0)
        return -errno;
    file->named = true;
    return 0;
}

static int sync_directory(const struct files *files)
{
    return fsync(files->directory) == 0 ? 0 : -errno;
}

static int64_t do_delete(struct files *files, const char *name, bool again)
{
    struct file *file = find(files, name);
    struct stat status;

    if (fstatat(files->directory, name, &status, AT_SYMLINK_NOFOLLOW) != 0)
        return errno != ENOENT || !again ? -errno : sync_directory(files); /* who deleted it may not have got so far */
    if (!S_ISREG(status.st_mode))
        return -EACCES;
    if (unlinkat(files->directory, name, 0) != 0)
        return -errno;
    if (file != NULL)
        forget(file);
    account(files, (int64_t)status.st_size, -1);
    return sync_directory(files);
}

/* As the kernel gives them: readdir() wants a descriptor of its own, and more system calls. */
struct entry {
    uint64_t inode;
    int64_t next;
    unsigned short length;
    unsigned char type;
    char name[];
};

/* Names that requests may have, from number `skip` on, as many whole ones as fit into `room` bytes. */
static int64_t do_list(struct files *files, uint64_t skip, char *out, uint64_t room)
{
    _Alignas(struct entry) char list[LIST_BYTES];
    uint64_t used = 0;

    if (lseek(files->directory, 0, SEEK_SET) != 0)
        return -errno;
    for (;;) {
        long length = syscall(SYS_getdents64, files->directory, list, sizeof(list));

        if (length <= 0)
            return length < 0 ? -errno : (int64_t)used;
        for (long at = 0; at < length;) {
            const struct entry *entry = (const struct entry *)(list + at);
            char name[64] = {0};
            size_t size = strnlen(entry->name, sizeof(name));

            at += entry->length;
            memcpy(name, entry->name, size < sizeof(name) ? size : 0);
            if (!name_fits(name) || (skip != 0 && skip--))
                continue;
            if (used + size + 1 > room)
                return (int64_t)used;
            memcpy(out + used, name, size + 1);
            used += size + 1;
        }
    }
}

int64_t files_do(struct files *files, const struct tm_file_request *request, void *data)
{
    bool transfers = request->op == TM_FILE_OP_READ || request->op == TM_FILE_OP_WRITE;
    bool again = (request->flags & TM_FILE_OP_AGAIN) != 0;
    struct file *file;
    int error;

    if (request->op == TM_FILE_OP_READ && request->name[0] == 0 && request->length <= TM_FILE_DATA)
        return do_list(files, request->offset, data, request->length);
    if (!name_fits(request->name) || request->offset > INT64_MAX / 2 || (transfers && request->length > TM_FILE_DATA))
        return -EINVAL;
    if (request->op == TM_FILE_OP_DELETE)
        return do_delete(files, request->name, again);
    error = open_file(files, request->name, request->op == TM_FILE_OP_OPEN && (request->flags & TM_FILE_OP_CREATE),
                      &file);
    if (error < 0)
        return error;
    file->used = ++files->requests;
    switch (request->op) {
    case TM_FILE_OP_OPEN:
        return 0;
    case TM_FILE_OP_READ:
        return do_read(file->fd, request->offset, data, request->length);
    case TM_FILE_OP_WRITE:
        return do_write(files, file, request->offset, data, request->length);
    case TM_FILE_OP_SYNC:
        return do_sync(files, file);
    case TM_FILE_OP_SIZE:
        return size_of(file->fd);
    case TM_FILE_OP_TRUNCATE:
        return do_truncate(files, file, request->offset);
    default:
        return -EINVAL;
    }
}

int64_t file_do(int fd, const struct tm_file_request *request, void *data)
{
    bool transfers = request->op == TM_FILE_OP_READ || request->op == TM_FILE_OP_WRITE;

    if (request->offset > INT64_MAX / 2 || (transfers && request->length > TM_FILE_DATA))
        return -EINVAL;
    switch (request->op) {
    case TM_FILE_OP_READ:
        return do_read(fd, request->offset, data, request->length);
    case TM_FILE_OP_WRITE:
        return write_all(fd, request->offset, data, request->length);
    case TM_FILE_OP_SYNC:
        return fdatasync(fd) == 0 ? 0 : -errno;
    case TM_FILE_OP_SIZE:
        return size_of(fd);
    case TM_FILE_OP_TRUNCATE:
        return cut(fd, request->offset);
    default:
        return -EINVAL;
    }
}

/* ---- the folder ---------------------------------------------------------------------------- */

static int count_all(struct files *files)
{
    _Alignas(struct entry) char list[LIST_BYTES];

    if (lseek(files->directory, 0, SEEK_SET) != 0)
        return -errno;
    for (;;) {
        long length = syscall(SYS_getdents64, files->directory, list, sizeof(list));

        if (length < 0)
            return -errno;
        if (length == 0)
            return 0;
        for (long at = 0; at < length;) {
            const struct entry *entry = (const struct entry *)(list + at);
            struct stat status;

            at += entry->length;
            if (fstatat(files->directory, entry->name, &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(status.st_mode))
                files->taken += cost((uint64_t)status.st_size);
        }
    }
}

int files_open(int directory, uint64_t limit, struct files **result)
{
    struct files *files = calloc(1, sizeof(*files));
    int error;

    if (files == NULL)
        return -ENOMEM;
    files->directory = directory;
    files->limit = limit;
    error = count_all(files);
    if (error < 0) {
        free(files);
        return error;
    }
    *result = files;
    return 0;
}

void files_close(struct files *files)
{
    if (files == NULL)
        return;
    for (size_t i = 0; i < OPEN_MOST; i++) {
        if (files->open[i].name[0] != '\0')
            close(files->open[i].fd);
    }
    free(files);
}
