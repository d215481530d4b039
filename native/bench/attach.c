/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The least that attaching through a broker can cost, whatever the broker and the client are written in:
 * one request, one reply that brings a descriptor, one mapping at a fixed address, one page touched.
 *
 *   teemate-floor attach SOCKET BYTES
 *
 * "warm" does that on a connection that is there; "cold" connects first.  Two children play the broker, one
 * for each, with nothing but blocking system calls; they end with this program.  BYTES are mapped: as many
 * as the enclave has.  Unmapping and closing are not timed, neither here nor there.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "floor.h"

/* Where enclaves are (DESIGN: one window), so that the page tables have as much to do. */
#define ADDRESS ((void *)0x400000000000)
#define MESSAGE 64u

struct attach {
    struct sockaddr_un address;
    size_t bytes;
    int connection; /* "warm" */
};

static int listen_at(const struct sockaddr_un *address)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    if (fd < 0 || bind(fd, (const struct sockaddr *)address, sizeof(*address)) || listen(fd, 8))
        floor_fail(address->sun_path, errno);
    return fd;
}

static int connect_to(const struct sockaddr_un *address)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    if (fd < 0 || connect(fd, (const struct sockaddr *)address, sizeof(*address)))
        floor_fail("connect", errno);
    return fd;
}

union control {
    struct cmsghdr header;
    char room[CMSG_SPACE(sizeof(int))];
};

static void reply(int connection, int memory)
{
    char message[MESSAGE] = {0};
    struct iovec part = {message, sizeof(message)};
    union control control = {0};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                            .msg_controllen = sizeof(control)};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&header);

    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(rights), &memory, sizeof(int));
    sendmsg(connection, &header, MSG_NOSIGNAL);
}

/* A broker that does nothing; never returns. */
static _Noreturn void serve(int listener, int memory, pid_t parent)
{
    char message[MESSAGE];

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(0);
    for (;;) {
        int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

        if (connection < 0)
            floor_fail("accept", errno);
        while (recv(connection, message, sizeof(message), 0) > 0)
            reply(connection, memory);
        close(connection);
    }
}

static void start_server(int listener, int memory)
{
    pid_t parent = getpid();
    pid_t child = fork();

    if (child < 0)
        floor_fail("fork", errno);
    if (child == 0)
        serve(listener, memory, parent);
    close(listener);
}

/* Ask, take the descriptor, map, touch; returns the descriptor. */
static int attach(int connection, size_t bytes)
{
    char message[MESSAGE] = {0};
    struct iovec part = {message, sizeof(message)};
    union control control = {0};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                            .msg_controllen = sizeof(control)};
    struct cmsghdr *rights;
    int fd;

    if (send(connection, message, sizeof(message), MSG_NOSIGNAL) < 0)
        floor_fail("send", errno);
    if (recvmsg(connection, &header, MSG_CMSG_CLOEXEC) <= 0)
        floor_fail("recvmsg", errno);
    rights = CMSG_FIRSTHDR(&header);
    if (rights == NULL || rights->cmsg_type != SCM_RIGHTS)
        floor_fail("no descriptor came", EPROTO);
    memcpy(&fd, CMSG_DATA(rights), sizeof(fd));
    if (mmap(ADDRESS, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0) != ADDRESS)
        floor_fail("mmap", errno);
    ++*(volatile char *)ADDRESS;
    return fd;
}

static void detach(int fd, size_t bytes)
{
    munmap(ADDRESS, bytes);
    close(fd);
}

static double warm_once(void *state)
{
    const struct attach *floor = state;
    double start = floor_now_ns();
    int fd = attach(floor->connection, floor->bytes);
    double end = floor_now_ns();

    detach(fd, floor->bytes);
    return end - start;
}

static double cold_once(void *state)
{
    const struct attach *floor = state;
    double start = floor_now_ns();
    int connection = connect_to(&floor->address);
    int fd = attach(connection, floor->bytes);
    double end = floor_now_ns();

    detach(fd, floor->bytes);
    close(connection);
    return end - start;
}

int floor_attach(int argc, char **argv)
{
    struct attach floor = {.address = {.sun_family = AF_UNIX}};
    struct sockaddr_un warm = {.sun_family = AF_UNIX};
    const struct floor floors[] = {{warm_once, "warm", &floor}, {cold_once, "cold", &floor}};
    int memory;

    if (argc != 3 || strlen(argv[1]) + 6 > sizeof(warm.sun_path)) {
        fprintf(stderr, "usage: teemate-floor attach SOCKET BYTES\n");
        return 2;
    }
    floor.bytes = strtoull(argv[2], NULL, 0);
    snprintf(floor.address.sun_path, sizeof(floor.address.sun_path), "%s", argv[1]);
    snprintf(warm.sun_path, sizeof(warm.sun_path), "%s.warm", argv[1]);
    memory = memfd_create("teemate-floor", MFD_CLOEXEC);
    /* The page that is touched is there, as an enclave's are. */
    if (memory < 0 || ftruncate(memory, (off_t)floor.bytes) || fallocate(memory, 0, 0, 4096))
        floor_fail("cannot make the memory", errno);
    start_server(listen_at(&floor.address), memory);
    start_server(listen_at(&warm), memory);
    floor.connection = connect_to(&warm);
    return floor_serve(floors, 2);
}
