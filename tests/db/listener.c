/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Preloaded into a broker: writes every byte that it sends or receives at sockets, its clients' and its wardens', to the
 * file that HEARD names.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void hear(const void *data, ssize_t length)
{
    static int fd = -1;

    if (fd < 0)
        fd = open(getenv("HEARD"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (length > 0 && write(fd, data, (size_t)length) != length)
        abort();
}

static void hear_all(const struct msghdr *message, ssize_t length)
{
    for (size_t i = 0; i < message->msg_iovlen && length > 0; i++) {
        ssize_t part = (ssize_t)message->msg_iov[i].iov_len;

        hear(message->msg_iov[i].iov_base, part < length ? part : length);
        length -= part;
    }
}

ssize_t send(int fd, const void *data, size_t length, int flags)
{
    ssize_t done = REAL(send)(fd, data, length, flags);

    hear(data, done);
    return done;
}

ssize_t sendto(int fd, const void *data, size_t length, int flags, const struct sockaddr *to, socklen_t size)
{
    ssize_t done = REAL(sendto)(fd, data, length, flags, to, size);

    hear(data, done);
    return done;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    ssize_t done = REAL(sendmsg)(fd, message, flags);

    hear_all(message, done);
    return done;
}

ssize_t recv(int fd, void *data, size_t length, int flags)
{
    ssize_t done = REAL(recv)(fd, data, length, flags);

    hear(data, done);
    return done;
}

ssize_t recvfrom(int fd, void *data, size_t length, int flags, struct sockaddr *from, socklen_t *size)
{
    ssize_t done = REAL(recvfrom)(fd, data, length, flags, from, size);

    hear(data, done);
    return done;
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
    ssize_t done = REAL(recvmsg)(fd, message, flags);

    hear_all(message, done);
    return done;
}
