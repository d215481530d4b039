/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Preloaded into a program that serves an enclave's files: writes down what it does to them, in order, in the file
 * that RECORD names.  One entry: struct entry, the file's name, the data.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum kind { WRITE, TRUNCATE, SYNC, DELETE, MARK };

struct entry {
    uint32_t kind, name_length;
    uint64_t offset, length;
};

static int record_fd(void)
{
    static int fd = -1;

    if (fd < 0 && getenv("RECORD"))
        fd = open(getenv("RECORD"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    return fd;
}

static void put(enum kind kind, const char *name, uint64_t offset, const void *data, uint64_t length)
{
    struct entry entry = {kind, (uint32_t)strlen(name), offset, length};

    if (write(record_fd(), &entry, sizeof(entry)) < 0 || write(record_fd(), name, entry.name_length) < 0 ||
        (data && write(record_fd(), data, length) < 0))
        abort();
}

/* The last part of the path, if the file lies in the folder FOLDER. */
static const char *name_of(int fd, char path[PATH_MAX])
{
    const char *folder = getenv("FOLDER");
    char link[64];
    ssize_t length;

    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    length = readlink(link, path, PATH_MAX - 1);
    if (length < 0 || !folder || record_fd() < 0)
        return NULL;
    path[length] = 0;
    if (strncmp(path, folder, strlen(folder)) || path[strlen(folder)] != '/')
        return NULL;
    return path + strlen(folder) + 1;
}

ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset)
{
    ssize_t (*real)(int, const void *, size_t, off_t) = (ssize_t (*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
    ssize_t done = real(fd, data, length, offset);
    char path[PATH_MAX];
    const char *name = name_of(fd, path);

    if (name && done > 0)
        put(WRITE, name, (uint64_t)offset, data, (uint64_t)done);
    return done;
}

int ftruncate64(int fd, off_t size)
{
    int (*real)(int, off_t) = (int (*)(int, off_t))dlsym(RTLD_NEXT, "ftruncate64");
    int done = real(fd, size);
    char path[PATH_MAX];
    const char *name = name_of(fd, path);

    if (name && !done)
        put(TRUNCATE, name, (uint64_t)size, NULL, 0);
    return done;
}

int fdatasync(int fd)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    int done = real(fd);
    char path[PATH_MAX];
    const char *name = name_of(fd, path);

    if (name && !done)
        put(SYNC, name, 0, NULL, 0);
    return done;
}

/* From the program: everything before this has been acknowledged. */
void record_mark(uint64_t number)
{
    put(MARK, "", number, NULL, 0);
}
