/* SPDX-License-Identifier: Apache-2.0 */
#include "turn_away.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

/* Who sent more than so many messages without having been let in is left to the caller. */
#define MESSAGES 256

/*
 * Whether nothing is unread in a socket that receives no more; messages without descriptors are
 * thrown away.  An empty message looks like the end, so credentials are asked for: they come with
 * every message, and not with the end.  There is room for those only, so MSG_CTRUNC tells of
 * descriptors, which stay where they are (MSG_PEEK).
 */
static int drained(int fd)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(struct ucred))];
    } control;
    char byte;
    struct iovec data = {.iov_base = &byte, .iov_len = 1};
    int on = 1;

    if (setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)) != 0)
        return 0;
    for (int i = 0; i < MESSAGES; i++) {
        struct msghdr message = {
            .msg_iov = &data,
            .msg_iovlen = 1,
            .msg_control = &control,
            .msg_controllen = sizeof(control),
        };

        if (recvmsg(fd, &message, MSG_PEEK | MSG_DONTWAIT) < 0) {
            if (errno == ECONNRESET) /* told once: the other side left something of ours unread */
                continue;
            return 0;
        }
        if (message.msg_flags & MSG_CTRUNC)
            return 0;
        if (message.msg_controllen == 0)
            return 1;
        if (recv(fd, &byte, 1, MSG_DONTWAIT) < 0)
            return 0;
    }
    return 0;
}

int turn_away(int fd, const char *message, size_t length)
{
    (void)send(fd, message, length, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (shutdown(fd, SHUT_RD) != 0 || !drained(fd))
        return 1;
    close(fd);
    return 0;
}
