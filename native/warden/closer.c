/* SPDX-License-Identifier: Apache-2.0 */
/*
 * teemate-closer SOCKET: holds the descriptors that it inherited until the other end of SOCKET is
 * closed, and ends.
 *
 * Closing the last reference to a socket that somebody else made can take as long as that one
 * chose: SO_LINGER, and a Unix socket closes what is on its way in it, too.  The kernel does not
 * linger for a process that ends (PF_EXITING, net/ipv4/af_inet.c inet_release).  So the broker has
 * the last reference dropped by a process that does nothing but end.
 */
#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct pollfd watched = {.events = 0};

    if (argc != 2)
        return 2;
    watched.fd = atoi(argv[1]);
    while (poll(&watched, 1, -1) <= 0 || (watched.revents & (POLLHUP | POLLERR | POLLNVAL)) == 0)
        ;
    _exit(0);
}
