/*
 * Instructions and rules that the kernel's selftests do not cover, from one
 * process: isa [bench]
 */

#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/cmac.h>
#include <setjmp.h>
#include "host.h"

static struct image im;
static struct op op;

static void crypto(void)
{
    unsigned char mac[16], seal[16];
    CMAC_CTX *ctx = CMAC_CTX_new();
    size_t len;

    call(0, &op, OP_REPORT, 0, 0);
    CMAC_Init(ctx, op.buf + 432, 16, EVP_aes_128_cbc(), NULL);
    CMAC_Update(ctx, op.buf, 384);
    CMAC_Final(ctx, mac, &len);
    check(op.ret == 0 && !memcmp(mac, op.buf + 416, 16),
          "EREPORT's MAC is the CMAC with EGETKEY's report key");
    check(op.buf[320] == 0 && op.buf[383] == 63, "REPORTDATA is in the report");
    check(op.buf[256] == 1 && op.buf[258] == 2, "ISVPRODID and ISVSVN, too");

    call(0, &op, OP_KEY, 1, 4);
    memcpy(seal, op.buf, 16);
    check(op.ret == 0, "EGETKEY gives a seal key");
    call(0, &op, OP_KEY, 1, 4);
    check(!memcmp(seal, op.buf, 16), "the same one the next time");
    call(0, &op, OP_KEY, 2, 4);
    check(op.ret == 0 && memcmp(seal, op.buf, 16),
          "and another one with another policy");
    call(0, &op, OP_KEY, 2, 1);
    check(op.ret == 2, "EGETKEY of a provisioning key: error 2");
    call(0, &op, OP_KEY, 0, 9);
    check(op.ret == 256, "EGETKEY of an unknown key: error 256");
}

/* The attribute that gives access to provisioning keys */
static void provision(void)
{
    unsigned long base = ENCL_BASE + ENCL_SIZE;
    struct sgx_enclave_provision p;
    unsigned char sig[4096];
    int fd, r;

    read_sig("encl.sig", sig);
    fd = enclave_new(&im, "encl.sig", base, 0x10);
    check(fd < 0 && errno == EACCES, "PROVISIONKEY without asking: EACCES");

    fd = open("/dev/sgx_enclave", O_RDWR);
    p.fd = open("/dev/sgx_provision", O_RDONLY);
    r = enclave_create(fd, base, 0x10);
    check(!r && !ioctl(fd, SGX_IOC_ENCLAVE_PROVISION, &p) &&
          !enclave_add(fd, &im) &&
          !enclave_init(fd, sig) && !enclave_map(fd, base, &im),
          "PROVISIONKEY with /dev/sgx_provision");
    op.op = OP_KEY;
    op.a = 0;
    op.b = 1;
    enter_at(base, 0, EENTER, &op);
    check(op.ret == 0, "EGETKEY of a provisioning key");
    munmap((void *)base, ENCL_SIZE);
    close(p.fd);
    close(fd);
}

static sigjmp_buf trap;

static void on_trap(int signal)
{
    siglongjmp(trap, 1);
}

static void exceptions(void)
{
    static const struct {
        int op, vector;
        const char *what;
    } t[] = {
        { OP_UD2, 6, "UD2: #UD" },
        { OP_CPUID, 6, "CPUID: #UD" },
        { OP_SYSCALL, 6, "SYSCALL: #UD" },
        { OP_FAR, 6, "MOV to ES: #UD" },
    };
    struct result r;
    uint64_t *gpr = (uint64_t *)op.buf;
    struct op o2;
    unsigned i;

    for (i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
        r = call(0, &op, t[i].op, 0, 0);
        check(r.function == ERESUME && r.vector == t[i].vector, t[i].what);
        /* The exception handler is entered with CSSA 1 and looks at the SSA. */
        call(0, &o2, OP_NOP, 0, 0);
        check(o2.ret == 1, "  entry with CSSA = 1");
        call(0, &o2, OP_SSA, 0, 0);
        gpr = (uint64_t *)o2.buf;
        check(((uint32_t *)gpr)[40] ==
              (1U << 31 | 3 << 8 | t[i].vector),
              "  SSA.GPRSGX.EXITINFO");
        /* Skip the instruction and resume. */
        o2.c = 2;
        call(0, &o2, OP_SKIP, 0, 0);
        r = enter_at(ENCL_BASE, 0, ERESUME, &op);
        check(r.function == EEXIT, "  ERESUME after it");
    }
    /* The kernel does not give #BP to the vDSO. */
    signal(SIGTRAP, on_trap);
    if (!sigsetjmp(trap, 1)) {
        call(0, &op, OP_INT3, 0, 0);
    }
    call(0, &o2, OP_SSA, 0, 0);
    check(((uint32_t *)gpr)[40] == (1U << 31 | 6 << 8 | 3),
          "INT3: #BP, EXITINFO says software");
    o2.c = 1;
    call(0, &o2, OP_SKIP, 0, 0);
    r = enter_at(ENCL_BASE, 0, ERESUME, &op);
    check(r.function == EEXIT, "  ERESUME after it");

    call(0, &o2, OP_NOP, 0, 0);
    check(o2.ret == 0, "CSSA is 0 again");

    r = call(0, &op, OP_RDTSC, 0, 0);
    check(r.function == EEXIT && op.ret, "RDTSC is allowed");

    r = call(0, &op, OP_READ, ENCL_BASE + OFF_DATA + 0x2000, 0);
    check(r.function == EEXIT, "read of enclave data");
    r = call(2, &op, OP_WRITE, ENCL_BASE + OFF_TEXT, 1);
    check(r.vector == 14 && r.error == 7 && r.addr == ENCL_BASE + OFF_TEXT,
          "write to code that is mapped RX: #PF, error 7 of the page table");
    r = call(1, &op, OP_READ, ENCL_BASE + OFF_TCS + 0x10, 0);
    check(r.vector == 14 && r.error == 0x8005 && r.addr == ENCL_BASE + OFF_TCS,
          "read of a TCS: #PF, error 0x8005, address without offset");
    call(1, &o2, OP_SSA, 1, 0);
    gpr = (uint64_t *)o2.buf;
    check(gpr[23] == ENCL_BASE + OFF_TCS + 0x10 &&
          (uint32_t)gpr[24] == 0x8005, "EXINFO has the address with offset");
    r = call(0, &op, OP_READ, (unsigned long)&failures, 0);
    check(r.function == EEXIT && op.ret == (unsigned long)failures,
          "read of the host's memory");
    r = call(2, &op, OP_CALL, (unsigned long)&exceptions, 0);
    check(r.function == ERESUME && r.vector == 13,
          "jump to the host's code: #GP");

    /* TCS 1 is at CSSA 1 now, and TCS 2 at 2. */
    r = call(1, &op, OP_UD2, 0, 0);
    check(r.vector == 6, "another exception, with CSSA = 1");
    r = call(1, &op, OP_NOP, 0, 0);
    check(r.function == EENTER && r.vector == 13, "EENTER with CSSA = NSSA: #GP");
    r = enter_at(ENCL_BASE, 3, ERESUME, &op);
    check(r.function == ERESUME && r.vector == 13, "ERESUME with CSSA = 0: #GP");
    r = enter_at(ENCL_BASE + OFF_DATA, 0, EENTER, &op);
    check(r.function == EENTER && r.vector == 14 && (r.error & 0x8000),
          "EENTER of a page that is no TCS: #PF of the EPCM");
    /* Clean up. */
    o2.op = OP_UNWIND;
    o2.a = 1;
    o2.b = 1;
    enter(0, &o2);
    o2.b = 0;
    enter(0, &o2);
    o2.a = 2;
    enter(0, &o2);
    o2.b = 1;
    enter(0, &o2);
    for (i = 1; i <= 2; i++) {
        r = enter_at(ENCL_BASE, i, ERESUME, &op);
        check(r.function == EEXIT, "unwound once");
        r = enter_at(ENCL_BASE, i, ERESUME, &op);
        check(r.function == EEXIT, "unwound twice");
        call(i, &op, OP_NOP, 0, 0);
        check(r.function == EEXIT && op.ret == 0, "CSSA is 0 again");
    }
}

/*
 * Two processes use one TCS, as they must not.  This is done in an enclave,
 * and in processes, that are of no more use after that: with bad luck one of
 * them resumes the other one's thread.
 */
static void busy(void)
{
    unsigned long base = ENCL_BASE + ENCL_SIZE;
    int fd = enclave_new(&im, "encl.sig", base, 0), status, i;
    struct result r;
    pid_t p, q;

    enclave_map(fd, base, &im);
    op.op = OP_WAIT;
    op.a = 100;
    p = fork();
    if (!p) {
        enter_at(base, 0, EENTER, &op);
        _exit(0);
    }
    op.op = OP_NOP;
    q = fork();
    if (!q) {
        alarm(10);
        for (i = 0; i < 1000; i++) {
            usleep(10000);
            r = enter_at(base, 0, EENTER, &op);
            if (r.function == EENTER && r.vector == 13) {
                _exit(0);
            }
        }
        _exit(1);
    }
    waitpid(q, &status, 0);
    check(!status || sysconf(_SC_NPROCESSORS_ONLN) == 1,
          "EENTER of a busy TCS: #GP");
    kill(p, SIGKILL);
    waitpid(p, NULL, 0);
    munmap((void *)base, ENCL_SIZE);
    close(fd);
}

static void *spinner(void *arg)
{
    struct op *o = arg;

    call(o->c, o, OP_WAIT, 100, 0);
    return NULL;
}

static void *adder(void *arg)
{
    struct op *o = arg;

    call(o->c, o, OP_ADD, 101, 200000);
    return NULL;
}

static void *regs(void *arg)
{
    struct op *o = arg;

    call(o->c, o, OP_REGS, 60000000, 0);
    return NULL;
}

static void threads(void)
{
    struct op o[4];
    pthread_t t[4];
    double start;
    int i;

    o[0].c = 0;
    pthread_create(&t[0], NULL, spinner, &o[0]);
    usleep(300000);
    call(1, &op, OP_PUT, 100, 77);
    pthread_join(t[0], NULL);
    check(o[0].ret == 77, "a thread in the enclave sees another one's write");

    for (i = 0; i < 4; i++) {
        o[i].c = i;
        pthread_create(&t[i], NULL, adder, &o[i]);
    }
    for (i = 0; i < 4; i++) {
        pthread_join(t[i], NULL);
    }
    call(0, &op, OP_GET, 101, 0);
    check(op.ret == 800000, "atomic additions of 4 threads");

    start = now();
    for (i = 0; i < 4; i++) {
        o[i].c = i;
        pthread_create(&t[i], NULL, regs, &o[i]);
    }
    for (i = 0; i < 4; i++) {
        pthread_join(t[i], NULL);
    }
    printf("# 4 threads, %.1f s in the enclave\n", now() - start);
    check(!o[0].ret && !o[1].ret && !o[2].ret && !o[3].ret,
          "interrupts keep GPRs, flags, x87, SSE, AVX and FSBASE");
}

static void outside(int fd)
{
    volatile unsigned long *p = (void *)(ENCL_BASE + OFF_DATA);
    unsigned long v;
    int mem;

    call(0, &op, OP_PUT, 0, 0x1234);
    check(p[0] == ~0UL, "from outside, enclave memory reads as all ones");
    p[0] = 0;
    call(0, &op, OP_GET, 0, 0);
    check(op.ret == 0x1234, "and writes to it are dropped");

    mem = open("/proc/self/mem", O_RDWR);
    v = 0;
    pread(mem, &v, 8, ENCL_BASE + OFF_DATA);
    check(v == 0x1234, "EDBGRD through /proc/self/mem");
    v = 0x4321;
    pwrite(mem, &v, 8, ENCL_BASE + OFF_DATA);
    call(0, &op, OP_GET, 0, 0);
    check(op.ret == 0x4321, "EDBGWR, too");
    close(mem);
}

static void dynamic(int fd)
{
    unsigned long la = ENCL_BASE + OFF_AUG;
    struct sgx_enclave_restrict_permissions rp = {
        .offset = OFF_AUG, .length = PAGE, .permissions = SI_R,
    };
    struct result r;

    mmap((void *)la, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
         fd, 0);
    r = call(0, &op, OP_READ, la, 0);
    check(r.vector == 14 && r.error == 0x8005,
          "access to an added page before EACCEPT: #PF, error 0x8005");
    op.op = OP_UNWIND;
    op.a = op.b = 0;
    enter(1, &op);
    enter_at(ENCL_BASE, 0, ERESUME, &op);
r =     call(0, &op, OP_EACCEPT, la, SI_REG | SI_R | SI_W | SI_X | SI_PENDING);
printf("# f %d vec %d err %x addr %lx ret %lx\n", r.function, r.vector, r.error, r.addr, op.ret);
    check(op.ret == 19, "EACCEPT with other attributes: error 19");
    call(0, &op, OP_EACCEPT, la, SI_REG | SI_R | SI_W | SI_PENDING);
    check(op.ret == 0, "EACCEPT");
    r = call(0, &op, OP_WRITE, la, 42);
    check(r.function == EEXIT, "write");
    op.op = OP_EACCEPTCOPY;
    op.a = la + PAGE;
    op.b = SI_REG | SI_R | SI_W;
    op.c = la;
    r = enter(0, &op);
    check(r.function == EEXIT && op.ret == 0, "EACCEPTCOPY");
    call(0, &op, OP_READ, la + PAGE, 0);
    check(op.ret == 42, "copied");
    check(!ioctl(fd, SGX_IOC_ENCLAVE_RESTRICT_PERMISSIONS, &rp), "EMODPR");
    call(0, &op, OP_EACCEPT, la, SI_REG | SI_R | SI_PR);
    check(op.ret == 0, "EACCEPT of it");
    r = call(1, &op, OP_WRITE, la, 43);
    check(r.vector == 14 && r.error == 0x8007,
          "write to a restricted page: #PF, error 0x8007");
    call(0, &op, OP_EMODPE, la, SI_R | SI_W);
    r = enter_at(ENCL_BASE, 1, ERESUME, &op);
    check(r.function == EEXIT, "the write goes on after EMODPE");
}

static void refusals(void)
{
    unsigned char sig[4096], bad[4096];
    int fd, r;

    read_sig("encl.sig", sig);
    fd = open("/dev/sgx_enclave", O_RDWR);
    enclave_create(fd, ENCL_BASE, 0);
    enclave_add(fd, &im);
    memcpy(bad, sig, 1808);
    bad[960] ^= 1;
    r = enclave_init(fd, bad);
    check(r && errno == EPERM, "EINIT with a changed SIGSTRUCT: refused");
    memcpy(bad, sig, 1808);
    bad[1040] ^= 1;
    r = enclave_init(fd, bad);
    check(r && errno == EPERM, "EINIT with a wrong Q1: refused");
    check(!enclave_init(fd, sig), "EINIT with the right one");
    close(fd);

    im.seg[2].src[100] ^= 1;
    fd = enclave_new(&im, "encl.sig", ENCL_BASE, 0);
    check(fd < 0 && errno == EPERM, "EINIT of a changed enclave: refused");
    im.seg[2].src[100] ^= 1;
    fd = open("/dev/sgx_enclave", O_RDWR);
    r = enclave_create(fd, ENCL_BASE + PAGE, 0);
    check(r != 0, "ECREATE with an unaligned base: refused");
    close(fd);
}

static void bench(void)
{
    static const char *const name[] = { "not measured", "measured" };
    double start;
    int i, n = 200000, fd, m;

    start = now();
    for (i = 0; i < n; i++) {
        call(0, &op, OP_NOP, 0, 0);
    }
    printf("BENCH round trip through the vDSO: %.2f us\n",
           (now() - start) / n * 1e6);

    for (m = 0; m < 2; m++) {
        make_image(&im, "encl.bin", 0x1000000, m);
        start = now();
        fd = enclave_new(&im, m ? "encl16m.sig" : "encl16.sig",
                         ENCL_BASE + ENCL_SIZE, 0);
        check(fd >= 0, "16 MiB enclave");
        printf("BENCH 16 MiB enclave, heap %s: %.2f s\n", name[m],
               now() - start);
        close(fd);
    }
}

int main(int argc, char **argv)
{
    int fd;

    setvbuf(stdout, NULL, _IOLBF, 0);
    find_vdso();
    make_image(&im, "encl.bin", 0, 0);
    refusals();
    fd = enclave_new(&im, "encl.sig", ENCL_BASE, ATTR_DEBUG);
    check(fd >= 0, "a debug enclave");
    check(!enclave_map(fd, ENCL_BASE, &im), "mmap");
    call(0, &op, OP_GET, 0, 0);
    check(op.ret == 0x5a5a, "EENTER, EEXIT");
    if (argc > 1) {
        bench();
        return failures != 0;
    }
    crypto();
    provision();
    exceptions();
    busy();
    threads();
    outside(fd);
    dynamic(fd);
    printf("%d failures\n", failures);
    return failures != 0;
}
