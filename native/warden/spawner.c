/* SPDX-License-Identifier: Apache-2.0 */
/*
 * teemate-spawner: starts the broker's programs, so that the broker need not.
 *
 * A process that starts another one copies its table of descriptors, and the copy is closed at exec.
 * With a file on FUSE in it that close asks the file system, which may be a client's program that
 * never answers: who may send the broker an image could keep it from starting wardens.  This process
 * was started before there was any client and has no descriptors but those that the broker sends
 * for a new program.
 *
 * On descriptor 3 comes a message per program: its words, each ended by a zero byte, the first being
 * its path, and the descriptors that it gets as 3, 4, ...; the answer is a struct answer.  The
 * programs are children of the broker, not of this process (CLONE_PARENT), with an empty environment,
 * /dev/null as standard input, the broker's log as output, and ordinary signals.  It ends with the
 * broker.
 */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BROKER 3
#define FIRST 3 /* of a program */
#define MOST 253 /* descriptors that come with one message: SCM_MAX_FD, include/net/scm.h */
#define WORDS 16

struct answer {
    int32_t pid;   /* 0: there is none; else the broker waits for it, also after an error */
    int32_t error; /* an errno, or 0 */
};

struct order {
    char text[8192];
    char *words[WORDS + 1];
    int fds[MOST];
    int count;
};

/* Returns 1, 0 when the broker has gone, or a negative errno for an order that cannot be one. */
static int receive(struct order *order)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(MOST * sizeof(int))];
    } control;
    struct iovec data = {.iov_base = order->text, .iov_len = sizeof(order->text)};
    struct msghdr message = {
        .msg_iov = &data,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    struct cmsghdr *part;
    ssize_t length;
    int words = 0;

    do
        length = recvmsg(BROKER, &message, MSG_CMSG_CLOEXEC);
    while (length < 0 && errno == EINTR);
    order->count = 0;
    if (length <= 0)
        return 0;
    for (part = CMSG_FIRSTHDR(&message); part != NULL; part = CMSG_NXTHDR(&message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        order->count = (int)((part->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(order->fds, CMSG_DATA(part), (size_t)order->count * sizeof(int));
    }
    if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC) || order->text[length - 1] != '\0')
        return -EMSGSIZE;
    for (char *word = order->text; word < order->text + length; word += strlen(word) + 1) {
        if (words == WORDS)
            return -E2BIG;
        order->words[words++] = word;
    }
    order->words[words] = NULL;
    return 1;
}

/*
 * In the child: becomes the program, or returns an errno.  What is left over is closed by exec: all
 * of it is close-on-exec, and nothing of it is a file.
 */
static int become(struct order *order)
{
    char *const nothing[] = {NULL};
    const struct sigaction ordinary = {.sa_handler = SIG_DFL};
    sigset_t none;
    int null;

    for (int i = 0; i < order->count; i++) { /* out of the way of the numbers that they get */
        order->fds[i] = fcntl(order->fds[i], F_DUPFD_CLOEXEC, FIRST + order->count);
        if (order->fds[i] < 0)
            return errno;
    }
    null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0 || dup2(null, 0) < 0 || dup2(2, 1) < 0)
        return errno;
    for (int i = 0; i < order->count; i++) {
        if (dup2(order->fds[i], FIRST + i) < 0)
            return errno;
    }
    for (int number = 1; number < 32; number++)
        (void)sigaction(number, &ordinary, NULL);
    sigemptyset(&none);
    (void)sigprocmask(SIG_SETMASK, &none, NULL);
    execve(order->words[0], order->words, nothing);
    return errno;
}

static struct answer start(struct order *order)
{
    struct answer answer = {0};
    int pipe[2], error;
    long pid;

    if (pipe2(pipe, O_CLOEXEC) != 0) {
        answer.error = errno;
        return answer;
    }
    pid = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, NULL, NULL, 0);
    if (pid == 0) {
        /* Out of the way as well. */
        int report = fcntl(pipe[1], F_DUPFD_CLOEXEC, FIRST + order->count);

        error = report < 0 ? errno : become(order);
        _exit(write(report < 0 ? pipe[1] : report, &error, sizeof(error)) == sizeof(error) ? 1 : 2);
    }
    answer.error = pid < 0 ? errno : 0;
    answer.pid = pid < 0 ? 0 : (int32_t)pid;
    close(pipe[1]);
    if (pid > 0 && read(pipe[0], &error, sizeof(error)) == sizeof(error))
        answer.error = error;
    close(pipe[0]);
    return answer;
}

int main(void)
{
    static struct order order;
    int result;

    if (syscall(SYS_close_range, BROKER + 1, ~0U, 0) != 0)
        return 1;
    while ((result = receive(&order)) != 0) {
        struct answer answer = {.error = -result};

        if (result > 0)
            answer = start(&order);
        for (int i = 0; i < order.count; i++)
            close(order.fds[i]);
        if (send(BROKER, &answer, sizeof(answer), MSG_NOSIGNAL) != sizeof(answer))
            return 1;
    }
    return 0;
}
