/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests.h"

static int pair[2];

static void send_fd(int socket, int fd)
{
    char control[CMSG_SPACE(sizeof(int))] = {0}, byte = 0;
    struct iovec data = {&byte, 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);

    *header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(header), &fd, sizeof(fd));
    CHECK(sendmsg(socket, &message, 0) == 1);
}

static int receive_fd(int socket)
{
    char control[CMSG_SPACE(sizeof(int))], byte;
    struct iovec data = {&byte, 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    int fd;

    CHECK(recvmsg(socket, &message, MSG_CMSG_CLOEXEC) == 1);
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
    return fd;
}

static void count_in_another_process(void *unused)
{
    struct teemate_enclave *enclave = test_enclave_from_fd(receive_fd(pair[1]), true);

    (void)unused;
    LEFT(call(enclave, 1, OP_COUNT, 1, 3000000));
    LEFT(call(enclave, 1, OP_WRITE, BASE + DATA + 0x800, 0xabc));
    teemate_close(enclave);
}

static void two_processes_see_each_others_writes(void)
{
    struct teemate_enclave *enclave;
    struct result r;
    int pid;

    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    pid = start_child(count_in_another_process, NULL);
    enclave = test_enclave_mapped(NULL);
    send_fd(pair[0], enclave->fd);
    LEFT(call(enclave, 0, OP_COUNT, 1, 3000000));
    child_ends(pid);
    EQUAL(board_get(enclave, COUNTER), 6000000);
    r = call(enclave, 0, OP_READ, BASE + DATA + 0x800, 0);
    LEFT(r);
    EQUAL(r.regs.rsi, 0xabc);
}

static void spin_in_another_process(void *unused)
{
    struct teemate_enclave *enclave = test_enclave_from_fd(receive_fd(pair[1]), true);

    (void)unused;
    call(enclave, 2, OP_SPIN, 0, 0);
    abort_test();
}

static void wait_until_inside(struct teemate_enclave *enclave)
{
    while (board_get(enclave, ROUNDS) == 0)
        sched_yield();
}

static void the_dead_leave_a_busy_tcs_that_can_be_buried(void)
{
    static uint8_t stack[65536]; /* for signals that come at the landing page */
    struct teemate_enclave *enclave;
    int pid, status;

    SIM_ONLY("hardware does the AEX of the dead itself");
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    pid = start_child(spin_in_another_process, NULL);
    enclave = test_enclave_mapped(NULL);
    send_fd(pair[0], enclave->fd);
    wait_until_inside(enclave);
    do { /* stop it while it is inside, not at a tick */
        kill(pid, SIGCONT);
        kill(pid, SIGSTOP);
        CHECK(waitpid(pid, &status, WUNTRACED) == pid);
    } while (!(tcs_word(enclave, 2) & SIM_TCS_BUSY));
    EQUAL(SIM_TCS_HOLDER(tcs_word(enclave, 2)), (uint32_t)pid);
    FAULTED(call(enclave, 2, OP_NOTHING, 0, 0), SGX_EENTER, SGX_VECTOR_GP);
    FAULTED(resume(enclave, 2), SGX_ERESUME, SGX_VECTOR_GP);
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(tcs_word(enclave, 2) & SIM_TCS_BUSY);
    EQUAL(sim_tcs_bury(enclave, tcs_of(2)), 1);
    EQUAL(tcs_word(enclave, 2), IDLE(1));
    EQUAL(sim_tcs_bury(enclave, tcs_of(2)), 0);
    /* The poisoned frame cannot be resumed as it is, ... */
    FAULTED(resume(enclave, 2), SGX_ERESUME, SGX_VECTOR_GP);
    LEFT(call(enclave, 2, OP_REGISTERS, 0, 0));
    EQUAL(board_get(enclave, 0), 1);
    /* ... but once the enclave has written GPRs into it, those are. */
    frame_set(enclave, 2, 0, &(struct sgx_gprs){.rip = BASE + ENTRY,
                                              .rdi = OP_LANDING,
                                              .rsp = (uint64_t)(uintptr_t)(stack + sizeof(stack)),
                                              .fsbase = BASE + FSPAGE,
                                              .gsbase = BASE + GSPAGE});
    EQUAL(resume(enclave, 2).outcome, TEEMATE_LANDED);
    EQUAL(tcs_word(enclave, 2), IDLE(0));
    EQUAL(sim_tcs_bury(enclave, DATA), -EINVAL);
}

/*
 * Killed at any moment of entries, ticks and exits: what is left is idle, or busy and can be
 * buried, and with its frames gone the TCS works as before.
 */
static void enter_for_ever(void *unused)
{
    struct teemate_enclave *enclave = test_enclave_from_fd(receive_fd(pair[1]), true);
    struct result r;

    (void)unused;
    for (;;) {
        LEFT(call(enclave, 2, OP_COUNT, 1, 300));
        FAULTED(call(enclave, 2, OP_DIVIDE, 0, 0), SGX_ERESUME, SGX_VECTOR_DE);
        frame_skip(enclave, 2, 0, 3);
        do
            r = resume(enclave, 2);
        while (r.outcome == TEEMATE_PAUSED);
        LEFT(r);
    }
}

static void whoever_is_killed_leaves_the_state_before_or_after(void)
{
    static uint8_t stack[65536]; /* for signals that come at the landing page */
    struct teemate_enclave *enclave;
    unsigned seed = 1, buried = 0;

    setenv("TEEMATE_TICK", "20us-60us", 1);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    enclave = test_enclave_mapped(NULL); /* of which the forks see nothing */
    for (int round = 0; round < 40; round++) {
        int pid = start_child(enter_for_ever, NULL), status;
        uint64_t before = board_get(enclave, COUNTER), word;
        struct timespec pause = {.tv_nsec = 0};

        send_fd(pair[0], enclave->fd);
        while (board_get(enclave, COUNTER) == before) /* until it has begun */
            sched_yield();
        pause.tv_nsec = 10000 + rand_r(&seed) % 1000000;
        nanosleep(&pause, NULL);
        kill(pid, SIGKILL);
        CHECK(waitpid(pid, &status, 0) == pid);
        CHECK(WIFSIGNALED(status));
        word = tcs_word(enclave, 2);
        if (word & SIM_TCS_BUSY) {
            CHECK(SIM_TCS_CSSA(word) <= 1);
            EQUAL(sim_tcs_bury(enclave, tcs_of(2)), 1);
            EQUAL(tcs_word(enclave, 2), IDLE(SIM_TCS_CSSA(word) + 1));
            buried++;
        }
        CHECK(SIM_TCS_CSSA(tcs_word(enclave, 2)) <= 2);
        while (SIM_TCS_CSSA(tcs_word(enclave, 2))) {
            unsigned last = SIM_TCS_CSSA(tcs_word(enclave, 2)) - 1;
            struct result r;

            frame_set(enclave, 2, last, &(struct sgx_gprs){.rip = BASE + ENTRY,
                                                           .rdi = OP_LANDING,
                                                           .rsp = (uint64_t)(uintptr_t)(stack + sizeof(stack)),
                                                           .fsbase = BASE + FSPAGE,
                                                           .gsbase = BASE + GSPAGE});
            do
                r = resume(enclave, 2);
            while (r.outcome == TEEMATE_PAUSED);
            EQUAL(r.outcome, TEEMATE_LANDED);
        }
        LEFT(call(enclave, 2, OP_NOTHING, 0, 0));
    }
    CHECK(on_sgx() || buried > 0);
}

static struct teemate_enclave *parents;

static void stop_spinning(int sig)
{
    (void)sig;
    board_set(parents, STOP, 1);
}

static void child_of_a_holder(void *unused)
{
    struct itimerval timer = {.it_value.tv_usec = 3000};
    struct teemate_diag diag = {0};
    struct teemate_enclave *mine;
    void *there;

    (void)unused;
    EQUAL(call(parents, 0, OP_NOTHING, 0, 0).outcome, -ENOTCONN);
    EQUAL(teemate_map(parents, &diag), -ENOTCONN);
    CHECK(strstr(diag.text, "fork"));
    EQUAL(teemate_map_tcs(parents, tcs_of(0), &diag), -ENOTCONN);
    EQUAL(teemate_unmap_tcs(parents, tcs_of(0)), -ENOTCONN);
    if (!on_sgx())
        EQUAL(sim_tcs_bury(parents, tcs_of(0)), -ENOTCONN);
    /* Nothing of the parent's is there. */
    there = mmap((void *)BASE, 2 * SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    EQUAL((uintptr_t)there, BASE);
    munmap(there, 2 * SIZE);
    mine = test_enclave_from_fd(dup(parents->fd), true);
    teemate_close(parents); /* does not take the new mapping along */
    LEFT(call(mine, 1, OP_NOTHING, 0, 0));
    parents = mine;
    signal(SIGALRM, stop_spinning);
    setitimer(ITIMER_REAL, &timer, NULL);
    LEFT(call(mine, 1, OP_SPIN, 0, 0)); /* needs a ticker of its own */
}

static void a_child_of_fork_holds_nothing_and_attaches_itself(void)
{
    parents = test_enclave_mapped(NULL);
    LEFT(call(parents, 0, OP_NOTHING, 0, 0));
    child_ends(start_child(child_of_a_holder, NULL));
    LEFT(call(parents, 0, OP_NOTHING, 0, 0));
}

static void a_bare_clone_is_another_process_too(void)
{
    long pid;

    parents = test_enclave_mapped(NULL);
    LEFT(call(parents, 0, OP_NOTHING, 0, 0));
    pid = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0); /* no pthread_atfork handler runs */
    CHECK(pid >= 0);
    if (!pid) {
        EQUAL(call(parents, 0, OP_NOTHING, 0, 0).outcome, -ENOTCONN);
        _exit(0);
    }
    child_ends((int)pid);
    LEFT(call(parents, 0, OP_NOTHING, 0, 0));
}

static volatile bool other_stops;

static void *spin_thread(void *unused)
{
    (void)unused;
    while (!other_stops)
        LEFT(call(parents, 3, OP_COUNT, 1, 2000000));
    return NULL;
}

static void forking_while_another_thread_is_inside_hurts_nobody(void)
{
    pthread_t other;

    parents = test_enclave_mapped(NULL);
    CHECK(pthread_create(&other, NULL, spin_thread, NULL) == 0);
    while (board_get(parents, COUNTER) == 0)
        sched_yield();
    for (int i = 0; i < 5; i++)
        child_ends(start_child(child_of_a_holder, NULL));
    other_stops = true;
    pthread_join(other, NULL);
    EQUAL(tcs_word(parents, 3), IDLE(0));
}

const struct test process_tests[] = {
    TEST(two_processes_see_each_others_writes),
    TEST(the_dead_leave_a_busy_tcs_that_can_be_buried),
    TEST(whoever_is_killed_leaves_the_state_before_or_after),
    TEST(a_child_of_fork_holds_nothing_and_attaches_itself),
    TEST(a_bare_clone_is_another_process_too),
    TEST(forking_while_another_thread_is_inside_hurts_nobody),
    {0},
};
