/*
 * What becomes of enclaves when the EPC is lost, and when a page of it has a
 * memory error: loss EPC-TOOL, where EPC-TOOL is guest/epc
 */

#include <setjmp.h>
#include "host.h"

static struct image im;
static struct op op;
static const char *tool;

static int epc(const char *command, unsigned long address)
{
    char line[512];

    if (address) {
        snprintf(line, sizeof(line), "%s %s %#lx", tool, command, address);
    } else {
        snprintf(line, sizeof(line), "%s %s", tool, command);
    }
    return system(line);
}

static int new_at(unsigned long base)
{
    int fd = enclave_new(&im, "encl.sig", base, 0);

    return fd < 0 || enclave_map(fd, base, &im) ? -1 : fd;
}

static void drop(int fd, unsigned long base)
{
    munmap((void *)base, ENCL_SIZE);
    close(fd);
}

static struct result get(unsigned long base, int tcs)
{
    op.op = OP_GET;
    op.a = 0;
    op.ret = 0;
    return enter_at(base, tcs, EENTER, &op);
}

static int works(unsigned long base)
{
    return get(base, 2).function == EEXIT && op.ret == 0x5a5a;
}

/* Refused by the EPCM */
static int refused(struct result r, unsigned leaf)
{
    return r.function == leaf && r.vector == 14 && (r.error & 0x8000);
}

static struct op inside = { .op = OP_STAY };
static struct result left;
static unsigned long entered;       /* set by the enclave, from inside */

static void *stay_inside(void *unused)
{
    inside.a = (unsigned long)&entered;
    left = enter_at(ENCL_BASE, 1, EENTER, &inside);
    return NULL;
}

static void lost(void)
{
    unsigned long other = ENCL_BASE + ENCL_SIZE;
    unsigned char sig[4096];
    pthread_t thread;
    int fd, half, again, r;
    struct image more;

    fd = new_at(ENCL_BASE);
    check(fd >= 0 && works(ENCL_BASE), "an enclave works");
    half = open("/dev/sgx_enclave", O_RDWR);
    check(!enclave_create(half, other, 0) && !enclave_add(half, &im),
          "another one is half built");
    pthread_create(&thread, NULL, stay_inside, NULL);
    while (!*(volatile unsigned long *)&entered) {
        sched_yield();
    }

    check(epc("lose", 0) == 0, "the EPC is lost");
    pthread_join(thread, NULL);
    check(refused(left, ERESUME), "a thread that was inside cannot go on: #PF");
    check(refused(get(ENCL_BASE, 0), EENTER), "and nobody can enter: #PF");
    check(refused(get(ENCL_BASE, 0), EENTER), "however often they try");
    more.n = 0;
    add_segment(&more, OFF_HEAP, PAGE, SI_REG | SI_R | SI_W, 1, NULL);
    errno = 0;
    r = enclave_add(half, &more);
    check(r && errno == EIO, "ADD_PAGES: EIO");
    close(half);

    half = open("/dev/sgx_enclave", O_RDWR);
    check(!enclave_create(half, other, 0) && !enclave_add(half, &im) &&
          epc("lose", 0) == 0, "it is lost again before INIT");
    read_sig("encl.sig", sig);
    errno = 0;
    r = enclave_init(half, sig);
    check(r && errno == EIO, "INIT: EIO");
    close(half);

    again = new_at(other);
    check(again >= 0 && works(other), "a new enclave works beside the lost one");
    check(refused(get(ENCL_BASE, 0), EENTER), "which stays lost");
    drop(again, other);
    drop(fd, ENCL_BASE);
    fd = new_at(ENCL_BASE);
    check(fd >= 0 && works(ENCL_BASE), "and so does one in its place");
    drop(fd, ENCL_BASE);
}

static sigjmp_buf trap;

static void on_bus(int signal)
{
    siglongjmp(trap, 1);
}

/* Does the entry end with SIGBUS? */
static int bus(struct result (*entry)(unsigned long, int), int tcs)
{
    if (sigsetjmp(trap, 1)) {
        return 1;
    }
    entry(ENCL_BASE, tcs);
    return 0;
}

static void poisoned(void)
{
    unsigned long other = ENCL_BASE + ENCL_SIZE;
    int fd, second;

    signal(SIGBUS, on_bus);
    check(epc("poison", ENCL_BASE + OFF_DATA) != 0,
          "there is no page to poison without an enclave");
    fd = new_at(ENCL_BASE);
    second = new_at(other);
    check(works(ENCL_BASE) && works(other), "two enclaves work");
    check(epc("poison", ENCL_BASE + OFF_DATA) == 0, "a page of one is poisoned");
    check(call(0, &op, OP_NOP, 0, 0).function == EEXIT,
          "who does not touch it does not notice");
    check(bus(get, 0), "who does gets SIGBUS");
    check(refused(get(ENCL_BASE, 1), EENTER) &&
          refused(get(ENCL_BASE, 2), EENTER), "the enclave cannot be entered");
    check(refused(enter_at(ENCL_BASE, 0, ERESUME, &op), ERESUME), "nor resumed");
    check(works(other), "the other one is not harmed");
    drop(fd, ENCL_BASE);
    fd = new_at(ENCL_BASE);
    check(fd >= 0 && works(ENCL_BASE), "one in its place works");
    check(epc("poison", ENCL_BASE + OFF_TCS) == 0, "its first TCS is poisoned");
    check(works(ENCL_BASE), "another TCS works");
    check(bus(get, 0), "entering through that one gives SIGBUS");
    check(refused(get(ENCL_BASE, 2), EENTER), "and then none of them works");
    drop(fd, ENCL_BASE);
    drop(second, other);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        return 2;
    }
    tool = argv[1];
    setvbuf(stdout, NULL, _IOLBF, 0);
    find_vdso();
    make_image(&im, "encl.bin", 0, 0);
    lost();
    poisoned();
    printf("%d failures\n", failures);
    return failures != 0;
}
