/* SPDX-License-Identifier: Apache-2.0 */
/* Who connected: in the order, and for the reasons, of broker/connections/identity.py. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "attending.h"

#ifndef SO_PEERGROUPS
#define SO_PEERGROUPS 59
#endif
#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif
#define STARTED 20 /* fields of proc(5), stat, behind the command: `starttime` is so manieth */

bool peer_credentials(int fd, struct attendant_peer *peer)
{
    struct ucred credentials;
    socklen_t size = sizeof(credentials);

    *peer = (struct attendant_peer){.pidfd = -1, .uid = UINT32_MAX};
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0)
        return false;
    peer->pid = credentials.pid;
    peer->uid = credentials.uid;
    peer->gid = credentials.gid;
    return credentials.pid > 0;
}

static bool read_start(int32_t pid, uint64_t *started)
{
    char path[32], stat[1024], *at;
    ssize_t size;
    int fd;

    snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    size = read(fd, stat, sizeof(stat) - 1);
    close(fd);
    if (size <= 0)
        return false;
    stat[size] = 0;
    at = strrchr(stat, ')'); /* the command may have any in it */
    for (int field = 0; at != NULL && field < STARTED; field++)
        at = strchr(at + 1, ' ');
    if (at == NULL)
        return false;
    *started = strtoull(at + 1, NULL, 10);
    return true;
}

static bool ended(int pidfd)
{
    struct pollfd poll_fd = {.fd = pidfd, .events = POLLIN};

    return poll(&poll_fd, 1, 0) != 0;
}

bool peer_details(int fd, bool with_start, struct attendant_peer *peer)
{
    socklen_t size = sizeof(peer->groups);
    int pidfd = -1;

    if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, peer->groups, &size) != 0)
        return false;
    peer->groups_size = size;
    size = sizeof(peer->label);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERSEC, peer->label, &size) == 0)
        peer->label_size = size;
    else if (errno != ENOPROTOOPT) /* no security module gives labels */
        return false;
    size = sizeof(pidfd);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &size) != 0)
        return false;
    /* What was read by number is its own if it lives now, as its number was never free then. */
    if ((with_start && !read_start(peer->pid, &peer->started)) || ended(pidfd)) {
        close(pidfd);
        return false;
    }
    peer->pidfd = pidfd;
    return true;
}
