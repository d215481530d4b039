/*
 * One enclave, entered from processes that share nothing but its file
 * descriptor
 *
 * Every process but the first is a new program (exec), which gets the
 * descriptor with SCM_RIGHTS over a Unix socket.
 */

#include "host.h"
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define SOCKET "/tmp/sgx-share.sock"
#define MAGIC  0x1122334455667788UL
#define MAGIC2 0x8877665544332211UL

static struct image im;
static struct op op;
static int listener;
static const char *me;

#define CHECK(ok, ...) do {                             \
    int ok_ = (ok);                                     \
    char text_[256];                                    \
    snprintf(text_, sizeof(text_), "%s: ", me);         \
    snprintf(text_ + strlen(text_), sizeof(text_) - strlen(text_), \
             __VA_ARGS__);                              \
    check(ok_, text_);                                  \
} while (0)

static void send_fd(int s, int fd)
{
    char c = 'f', buf[CMSG_SPACE(sizeof(int))] = { 0 };
    struct iovec iov = { &c, 1 };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = buf,
                        .msg_controllen = sizeof(buf) };
    struct cmsghdr *h = CMSG_FIRSTHDR(&m);

    h->cmsg_level = SOL_SOCKET;
    h->cmsg_type = SCM_RIGHTS;
    h->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(h), &fd, sizeof(int));
    if (sendmsg(s, &m, 0) != 1) {
        perror("sendmsg");
        exit(2);
    }
}

static int recv_fd(int s)
{
    char c, buf[CMSG_SPACE(sizeof(int))];
    struct iovec iov = { &c, 1 };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = buf,
                        .msg_controllen = sizeof(buf) };
    int fd;

    if (recvmsg(s, &m, MSG_CMSG_CLOEXEC) != 1 || !CMSG_FIRSTHDR(&m)) {
        fprintf(stderr, "%s: no descriptor\n", me);
        exit(2);
    }
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(int));
    return fd;
}

static void tell(int s)
{
    if (write(s, "x", 1) != 1) {
        exit(2);
    }
}

static void await(int s)
{
    char c;

    if (read(s, &c, 1) != 1) {
        fprintf(stderr, "%s: the other one is gone\n", me);
        exit(2);
    }
}

/* Start another program of ours; it connects, and gets the descriptor. */
static int start(const char *role, int fd, pid_t *pid)
{
    int s;

    *pid = fork();
    if (*pid == 0) {
        execl("/proc/self/exe", "share", role, NULL);
        _exit(2);
    }
    s = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    send_fd(s, fd);
    return s;
}

static int finish(pid_t pid)
{
    int status;

    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static unsigned long get(int tcs, unsigned long i)
{
    struct result r = call(tcs, &op, OP_GET, i, 0);

    return r.function == EEXIT ? op.ret : 0xdead;
}

/* A word of a TCS, which the kernel reads with EDBGRD */
static uint64_t tcs_word(int tcs, int i)
{
    int mem = open("/proc/self/mem", O_RDONLY);
    uint64_t v = ~0ULL;

    pread(mem, &v, 8, ENCL_BASE + OFF_TCS + tcs * PAGE + i * 8);
    close(mem);
    return v;
}

static uint64_t tcs_state(int tcs)
{
    return tcs_word(tcs, 0);
}

static uint32_t cssa(int tcs)
{
    return tcs_word(tcs, 3);
}

/* Wait until a client that is to die in the enclave is there. */
static void wait_for_cssa(int tcs, uint32_t n, pid_t pid)
{
    int i;

    for (i = 0; i < 1000 && cssa(tcs) < n; i++) {
        kill(pid, SIGSTOP);
        usleep(10000);
        if (cssa(tcs) < n) {
            kill(pid, SIGCONT);
            usleep(10000);
        }
    }
}

static void *map_at(unsigned long la, unsigned long len, int prot, int flags,
                    int fd)
{
    return mmap((void *)la, len, prot, flags | MAP_FIXED, fd, 0);
}

/* In a child: what does it take to do this? */
#define CHILD(expr) ({                                  \
    pid_t p_ = fork();                                  \
    if (!p_) {                                          \
        _exit(expr);                                    \
    }                                                   \
    finish(p_);                                         \
})

static void rules(int fd)
{
    void *p;

    p = mmap((void *)(ENCL_BASE + ENCL_SIZE), PAGE, PROT_READ,
             MAP_SHARED | MAP_FIXED, fd, 0);
    CHECK(p == MAP_FAILED && errno == EACCES,
          "mmap outside of ELRANGE, after EINIT: EACCES");
    p = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(p == MAP_FAILED && errno == EACCES,
          "mmap without an address: EACCES");
    p = map_at(ENCL_BASE, ENCL_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
    CHECK(p == MAP_FAILED && errno == EACCES,
          "mmap of all of ELRANGE as RW, with RX pages in it: EACCES");
    p = map_at(ENCL_BASE + OFF_DATA, DATA_SIZE,
               PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED, fd);
    CHECK(p == MAP_FAILED && errno == EACCES, "mmap of RW pages as RWX: EACCES");
    p = map_at(ENCL_BASE + OFF_DATA, DATA_SIZE, PROT_READ, MAP_PRIVATE, fd);
    CHECK(p == MAP_FAILED && errno == EINVAL, "MAP_PRIVATE: EINVAL");
    p = map_at(ENCL_BASE, ENCL_SIZE, PROT_NONE, MAP_SHARED, fd);
    CHECK(p != MAP_FAILED, "mmap of all of ELRANGE as PROT_NONE");
    CHECK(mprotect((void *)(ENCL_BASE + OFF_DATA), DATA_SIZE,
                   PROT_READ | PROT_WRITE | PROT_EXEC) && errno == EACCES,
          "mprotect of RW pages to RWX: EACCES");
    CHECK(!mprotect((void *)(ENCL_BASE + OFF_DATA), DATA_SIZE,
                    PROT_READ | PROT_WRITE), "mprotect of RW pages to RW");
    CHECK(!mprotect((void *)(ENCL_BASE + OFF_AUG), 2 * PAGE,
                    PROT_READ | PROT_WRITE | PROT_EXEC),
          "mprotect of a range without pages to RWX");
    munmap((void *)ENCL_BASE, ENCL_SIZE);
}

static void *waiter(void *arg)
{
    call(3, arg, OP_WAIT, 60, 0);
    return NULL;
}

/* The second process; it goes on when the creator is gone. */
static void role_b(int s, int fd)
{
    struct sgx_enclave_modify_types mt = {
        .offset = OFF_DATA + 0x3000, .length = PAGE,
        .page_type = 4,
    };
    struct sgx_enclave_remove_pages rm = {
        .offset = OFF_DATA + 0x3000, .length = PAGE,
    };
    int link[2], fd2, fd3, c, r, i;
    struct result res;
    pthread_t thread;
    struct op o;
    pid_t pid;

    rules(fd);
    CHECK(!enclave_map(fd, ENCL_BASE, &im), "mmap at the same addresses");
    CHECK(get(1, 0) == MAGIC, "sees what the creator wrote");
    call(1, &op, OP_PUT, 1, MAGIC2);
    tell(s);                                                    /* 1 */

    await(s);                                                   /* 2 */
    usleep(200000);
    call(1, &op, OP_PUT, 2, MAGIC);

    await(s);                                                   /* 3 */
    call(1, &op, OP_ADD, 3, 300000);
    tell(s);                                                    /* 4 */

    CHECK(!ioctl(fd, SGX_IOC_ENCLAVE_MODIFY_TYPES, &mt),
          "SGX_IOC_ENCLAVE_MODIFY_TYPES");
    call(1, &op, OP_EACCEPT, ENCL_BASE + OFF_DATA + 0x3000,
         SI_TRIM | SI_MODIFIED);
    CHECK(op.ret == 0, "EACCEPT of it");
    CHECK(!ioctl(fd, SGX_IOC_ENCLAVE_REMOVE_PAGES, &rm),
          "SGX_IOC_ENCLAVE_REMOVE_PAGES");
    map_at(ENCL_BASE + OFF_AUG, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
           fd);
    res = call(1, &op, OP_EACCEPT, ENCL_BASE + OFF_AUG,
               SI_REG | SI_R | SI_W | SI_PENDING);
    CHECK(res.function == EEXIT && op.ret == 0, "adds a page: EAUG, EACCEPT");
    call(1, &op, OP_WRITE, ENCL_BASE + OFF_AUG, MAGIC2);
    pthread_create(&thread, NULL, waiter, &o);
    usleep(100000);
    tell(s);                                                    /* 5 */

    r = read(s, link, 1);
    CHECK(r == 0, "the creator is gone");
    usleep(100000);
    call(1, &op, OP_PUT, 60, MAGIC);
    pthread_join(thread, NULL);
    CHECK(o.ret == MAGIC, "a thread was in the enclave meanwhile, and goes on");
    CHECK(get(1, 0) == MAGIC, "the enclave is still there");
    CHECK(get(0, 0) == MAGIC, "through the creator's TCS, too");
    call(1, &op, OP_READ, ENCL_BASE + OFF_AUG, 0);
    CHECK(op.ret == MAGIC2, "and the page that was added");

    /* fork */
    CHECK(CHILD(get(3, 0) == MAGIC) == 1,
          "a child of fork() has the mapping, and can enter");
    CHECK(get(3, 0) == MAGIC, "after its exit, the TCS is free");

    /* Other ways to the enclave */
    {
        char path[64];

        sprintf(path, "/proc/self/fd/%d", fd);
        fd2 = open(path, O_RDWR);
        CHECK(CHILD((munmap((void *)ENCL_BASE, ENCL_SIZE),
                     enclave_map(fd2, ENCL_BASE, &im) ||
                     call(3, &op, OP_GET, 0, 0).function != EEXIT)) != 0,
              "/proc/self/fd/N opened anew is another, empty enclave");
        close(fd2);
    }
    {
        int pidfd = syscall(434, getpid(), 0);

        fd2 = syscall(438, pidfd, fd, 0);
        CHECK(fd2 >= 0 && CHILD((munmap((void *)ENCL_BASE, ENCL_SIZE),
                                 enclave_map(fd2, ENCL_BASE, &im) ||
                                 get(3, 0) != MAGIC)) == 0,
              "pidfd_getfd() is as good as SCM_RIGHTS");
        close(fd2);
        close(pidfd);
    }

    /* What a client leaves behind that dies in the enclave */
    c = start("d", fd, &pid);
    await(c);
    usleep(200000);
    for (i = 0; i < 100000 && !(tcs_state(2) & 1); i++) {
        /* It may have been interrupted. */
    }
    CHECK(i < 100000 || sysconf(_SC_NPROCESSORS_ONLN) == 1,
          "client d is in the enclave");
    wait_for_cssa(2, 1, pid);
    kill(pid, SIGKILL);
    CHECK(finish(pid) == 1009, "client d was killed");
    close(c);
    CHECK(cssa(2) == 1, "it leaves TCS 2 with CSSA = 1");
    res = call(2, &op, OP_NOP, 0, 0);
    CHECK(res.function == EEXIT && op.ret == 1,
          "with NSSA = 2 it can be entered, and RAX tells CSSA = 1");
    CHECK(cssa(2) == 1, "CSSA is 1 after that");

    c = start("d", fd, &pid);
    await(c);
    wait_for_cssa(2, 2, pid);
    kill(pid, SIGKILL);
    finish(pid);
    close(c);
    CHECK(cssa(2) == 2, "after a second one CSSA = 2");
    res = call(2, &op, OP_NOP, 0, 0);
    CHECK(res.function == EENTER && res.vector == 13,
          "no SSA frame left: EENTER gives #GP");

    /* Go on as the dead client, in a process where its memory is not. */
    call(1, &op, OP_PUT, 50, 1);
    r = CHILD(enter_at(ENCL_BASE, 2, ERESUME, &op).function);
    printf("note %s: plain ERESUME of the dead client's thread: %s %d\n", me,
           r >= 1000 ? "signal" : "vDSO function", r >= 1000 ? r - 1000 : r);
    printf("note %s: CSSA after that: %u\n", me, cssa(2));
    call(1, &op, OP_PUT, 50, 0);

    /* A third process makes the enclave unwind, and resumes. */
    c = start("e", fd, &pid);
    CHECK(finish(pid) == 0, "process e cleans TCS 2 up");
    close(c);
    CHECK(cssa(2) == 0, "TCS 2 has CSSA = 0 again");
    res = call(2, &op, OP_NOP, 0, 0);
    CHECK(res.function == EEXIT && op.ret == 0, "and is as good as new");

    c = start("g", fd, &pid);
    CHECK(finish(pid) == 0, "process g, of another user, enters");
    close(c);

    /* References */
    socketpair(AF_UNIX, SOCK_STREAM, 0, link);
    send_fd(link[0], fd);
    close(fd);
    CHECK(get(1, 0) == MAGIC, "without a descriptor the mapping is enough");
    munmap((void *)ENCL_BASE, ENCL_SIZE);
    fd = recv_fd(link[1]);
    CHECK(!enclave_map(fd, ENCL_BASE, &im) && get(1, 0) == MAGIC,
          "a descriptor in flight keeps the enclave");
    close(link[0]);
    close(link[1]);

    /* Who may do what, before EINIT */
    fd2 = open("/dev/sgx_enclave", O_RDWR | O_CLOEXEC);
    munmap((void *)ENCL_BASE, ENCL_SIZE);
    CHECK(!enclave_create(fd2, ENCL_BASE, 0), "creates another enclave");
    c = start("f", fd2, &pid);
    CHECK(finish(pid) == 0, "process f adds the pages, and initializes it");
    close(c);
    CHECK(!enclave_map(fd2, ENCL_BASE, &im) && get(0, 0) == 0x5a5a,
          "the new enclave can be entered");
    close(fd2);
    munmap((void *)ENCL_BASE, ENCL_SIZE);

    /* A mapping from before the pages were there */
    fd3 = open("/dev/sgx_enclave", O_RDWR | O_CLOEXEC);
    enclave_create(fd3, ENCL_BASE, 0);
    CHECK(map_at(ENCL_BASE, ENCL_SIZE, PROT_READ | PROT_WRITE | PROT_EXEC,
                 MAP_SHARED, fd3) != MAP_FAILED,
          "mmap of all of ELRANGE as RWX, before EADD");
    {
        unsigned char sig[4096];

        read_sig("encl.sig", sig);
        CHECK(!enclave_add(fd3, &im) && !enclave_init(fd3, sig), "EADD, EINIT");
    }
    res = call(0, &op, OP_GET, 0, 0);
    CHECK(res.function == EENTER && res.vector == 14 && !(res.error & 0x8001),
          "entry through it: #PF, error 0x%x, which the kernel cannot serve",
          res.error);
    CHECK(!enclave_map(fd3, ENCL_BASE, &im) && get(0, 0) == 0x5a5a,
          "after mmap with the pages' permissions: fine");
    close(fd3);
    munmap((void *)ENCL_BASE, ENCL_SIZE);

    /* The first enclave lives until its last reference is gone. */
    CHECK(!enclave_map(fd, ENCL_BASE, &im) && get(1, 0) == MAGIC,
          "the first enclave is still there");
    munmap((void *)ENCL_BASE, ENCL_SIZE);
    close(fd);
    for (i = 0; i < 300; i++) {
        fd = enclave_new(&im, "encl.sig", ENCL_BASE, 0);
        if (fd < 0 || enclave_map(fd, ENCL_BASE, &im) ||
            get(i & 3, 0) != 0x5a5a) {
            break;
        }
        munmap((void *)ENCL_BASE, ENCL_SIZE);
        close(fd);
    }
    CHECK(i == 300, "300 enclaves come and go");
}

/* A client that stays in the enclave until it is killed */
static void role_d(int s, int fd)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    enclave_map(fd, ENCL_BASE, &im);
    tell(s);
    call(2, &op, OP_WAIT, 50, 0);
}

/* The one that cleans up after it */
static void role_e(int s, int fd)
{
    struct result r;
    int i;

    CHECK(!enclave_map(fd, ENCL_BASE, &im), "mmap");
    for (i = cssa(2) - 1; i >= 0; i--) {
        call(1, &op, OP_UNWIND, 2, i);
        r = enter_at(ENCL_BASE, 2, ERESUME, &op);
        CHECK(r.function == EEXIT, "ERESUME of frame %d leads to EEXIT", i);
    }
}

/* One that may not open the device */
static void role_g(int s, int fd)
{
    chmod("/dev/sgx_enclave", 0600);
    setuid(65534);
    CHECK(open("/dev/sgx_enclave", O_RDWR) < 0 && errno == EACCES,
          "may not open /dev/sgx_enclave");
    CHECK(!enclave_map(fd, ENCL_BASE, &im) && get(3, 0) == MAGIC,
          "maps and enters with the descriptor it got");
}

static void role_f(int s, int fd)
{
    unsigned char sig[4096];

    read_sig("encl.sig", sig);
    CHECK(!enclave_add(fd, &im), "SGX_IOC_ENCLAVE_ADD_PAGES");
    CHECK(!enclave_init(fd, sig), "SGX_IOC_ENCLAVE_INIT");
}

static void open_listener(void)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };

    sprintf(a.sun_path, "%s.%d", SOCKET, (int)getpid());
    setenv("SHARE_SOCKET", a.sun_path, 1);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&a, sizeof(a)) ||
        listen(listener, 8)) {
        perror("bind");
        exit(2);
    }
}

/* The creator */
static void role_a(void)
{
    pid_t pid;
    int s, fd;

    fd = enclave_new(&im, "encl.sig", ENCL_BASE, ATTR_DEBUG);
    if (fd >= 0) {
        fcntl(fd, F_SETFD, FD_CLOEXEC);
    }
    CHECK(fd >= 0 && !enclave_map(fd, ENCL_BASE, &im), "creates the enclave");
    map_at(ENCL_BASE + OFF_AUG, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
           fd);
    call(0, &op, OP_PUT, 0, MAGIC);
    s = start("b", fd, &pid);
    await(s);                                                   /* 1 */
    CHECK(get(0, 1) == MAGIC2, "sees what b wrote");
    tell(s);                                                    /* 2 */
    call(0, &op, OP_WAIT, 2, 0);
    CHECK(op.ret == MAGIC, "waits in the enclave for what b writes");
    tell(s);                                                    /* 3 */
    call(0, &op, OP_ADD, 3, 300000);
    await(s);                                                   /* 4 */
    CHECK(get(0, 3) == 600000, "both add to one counter at the same time");
    await(s);                                                   /* 5 */
    call(0, &op, OP_READ, ENCL_BASE + OFF_AUG, 0);
    CHECK(op.ret == MAGIC2, "sees the page that b added");
    if (!failures) {
        kill(getpid(), SIGKILL);        /* without any cleaning up */
    }
    _exit(1);
}

int main(int argc, char **argv)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    int s, fd, status, bad = 0;

    setvbuf(stdout, NULL, _IOLBF, 0);
    find_vdso();
    make_image(&im, "encl.bin", 0, 0);

    if (argc == 1) {
        /* Process a starts b, and dies; b is handed to this process. */
        prctl(PR_SET_CHILD_SUBREAPER, 1);
        if (fork() == 0) {
            execl("/proc/self/exe", "share", "a", NULL);
            _exit(2);
        }
        while (wait(&status) > 0) {
            if (WIFSIGNALED(status) ? WTERMSIG(status) != SIGKILL
                                    : WEXITSTATUS(status) != 0) {
                bad = 1;
            }
        }
        printf("%s\n", bad ? "FAILED" : "all passed");
        return bad;
    }

    me = argv[1];
    if (*me == 'a') {
        open_listener();
        role_a();
    }
    strcpy(a.sun_path, getenv("SHARE_SOCKET"));
    s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(s, (struct sockaddr *)&a, sizeof(a))) {
        perror("connect");
        return 2;
    }
    fd = recv_fd(s);
    if (*me == 'b') {
        open_listener();
        role_b(s, fd);
    } else if (*me == 'd') {
        role_d(s, fd);
    } else if (*me == 'e') {
        role_e(s, fd);
    } else if (*me == 'f') {
        role_f(s, fd);
    } else {
        role_g(s, fd);
    }
    return failures != 0;
}
