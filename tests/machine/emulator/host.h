/*
 * The untrusted side: build, map and enter the test enclave.
 */

#ifndef HOST_H
#define HOST_H

#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/auxv.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <asm/sgx.h>
#include "pages.h"

#define EENTER  2
#define ERESUME 3
#define EEXIT   4

#define ATTR_DEBUG 2

static void *enter_enclave __attribute__((used));

/*
 * Call the vDSO.  Unlike a C function it does not preserve R12 to R15: an
 * asynchronous exit clears them.
 */
int vdso_call(void *op, unsigned leaf, struct sgx_enclave_run *run);
asm(
"    .text\n"
"vdso_call:\n"
"    push %rbx\n"
"    push %r12\n"
"    push %r13\n"
"    push %r14\n"
"    push %r15\n"
"    sub $8, %rsp\n"
"    push $0\n"
"    push %rdx\n"
"    mov %esi, %ecx\n"
"    xor %esi, %esi\n"
"    xor %edx, %edx\n"
"    xor %r8d, %r8d\n"
"    xor %r9d, %r9d\n"
"    call *enter_enclave(%rip)\n"
"    add $24, %rsp\n"
"    pop %r15\n"
"    pop %r14\n"
"    pop %r13\n"
"    pop %r12\n"
"    pop %rbx\n"
"    ret\n"
);

static inline void find_vdso(void)
{
    char *vdso = (char *)getauxval(AT_SYSINFO_EHDR);
    Elf64_Ehdr *eh = (Elf64_Ehdr *)vdso;
    Elf64_Phdr *ph = (Elf64_Phdr *)(vdso + eh->e_phoff);
    Elf64_Dyn *dyn = NULL;
    Elf64_Sym *sym = NULL;
    char *str = NULL;
    Elf64_Word *hash = NULL;
    unsigned i;

    for (i = 0; i < eh->e_phnum; i++) {
        if (ph[i].p_type == PT_DYNAMIC) {
            dyn = (Elf64_Dyn *)(vdso + ph[i].p_offset);
        }
    }
    for (; dyn->d_tag != DT_NULL; dyn++) {
        void *p = vdso + dyn->d_un.d_ptr;

        if (dyn->d_tag == DT_SYMTAB) {
            sym = p;
        } else if (dyn->d_tag == DT_STRTAB) {
            str = p;
        } else if (dyn->d_tag == DT_HASH) {
            hash = p;
        }
    }
    for (i = 0; i < hash[1]; i++) {
        if (!strcmp(str + sym[i].st_name, "__vdso_sgx_enter_enclave")) {
            enter_enclave = (void *)(vdso + sym[i].st_value);
        }
    }
}

static inline int enclave_create(int fd, unsigned long base,
                                 unsigned long attributes)
{
    unsigned char secs[4096] __attribute__((aligned(4096))) = { 0 };
    struct sgx_enclave_create c = { .src = (unsigned long)secs };
    uint64_t *q = (uint64_t *)secs;
    uint32_t *w = (uint32_t *)secs;

    q[0] = ENCL_SIZE;
    q[1] = base;
    w[4] = 1;                           /* SSAFRAMESIZE */
    w[5] = 1;                           /* MISCSELECT: EXINFO */
    q[6] = 4 | attributes;              /* MODE64BIT */
    q[7] = 7;                           /* XFRM */
    return ioctl(fd, SGX_IOC_ENCLAVE_CREATE, &c);
}

static inline int enclave_add(int fd, struct image *im)
{
    int i;

    for (i = 0; i < im->n; i++) {
        struct segment *g = &im->seg[i];
        uint64_t secinfo[8] __attribute__((aligned(64))) = { g->flags };
        struct sgx_enclave_add_pages a = {
            .src = (unsigned long)g->src,
            .offset = g->offset,
            .length = g->size,
            .secinfo = (unsigned long)secinfo,
            .flags = g->measure ? SGX_PAGE_MEASURE : 0,
        };

        if (ioctl(fd, SGX_IOC_ENCLAVE_ADD_PAGES, &a)) {
            return -1;
        }
    }
    return 0;
}

static inline int enclave_init(int fd, const void *sig)
{
    struct sgx_enclave_init in = { .sigstruct = (unsigned long)sig };

    return ioctl(fd, SGX_IOC_ENCLAVE_INIT, &in);
}

static inline void read_sig(const char *file, unsigned char *sig)
{
    FILE *f = fopen(file, "rb");

    if (!f || fread(sig, 1808, 1, f) != 1) {
        fprintf(stderr, "cannot read %s\n", file);
        exit(2);
    }
    fclose(f);
}

/* Map the enclave's segments, each with its permissions. */
static inline int enclave_map(int fd, unsigned long base, struct image *im)
{
    int i;

    for (i = 0; i < im->n; i++) {
        struct segment *g = &im->seg[i];
        int prot = g->flags == SI_TCS ? PROT_READ | PROT_WRITE
                                      : (int)(g->flags & 7);

        if (mmap((void *)(base + g->offset), g->size, prot,
                 MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
            return -1;
        }
    }
    return 0;
}

/* A new enclave: its file descriptor, or -1 */
static inline int enclave_new(struct image *im, const char *sigfile,
                              unsigned long base, unsigned long attributes)
{
    unsigned char sig[4096];
    int fd = open("/dev/sgx_enclave", O_RDWR);

    read_sig(sigfile, sig);
    if (fd < 0 || enclave_create(fd, base, attributes) ||
        enclave_add(fd, im) || enclave_init(fd, sig)) {
        if (fd >= 0) {
            close(fd);
        }
        return -1;
    }
    return fd;
}

/* What came of an entry */
struct result {
    unsigned function;          /* EEXIT, or the leaf that an AEX led to */
    unsigned vector, error;
    unsigned long addr;
};

static inline struct result enter_at(unsigned long base, int tcs,
                                     unsigned leaf, struct op *op)
{
    struct sgx_enclave_run run = { .tcs = base + OFF_TCS + tcs * PAGE };
    struct result r;

    if (vdso_call(op, leaf, &run)) {
        fprintf(stderr, "bad arguments to the vDSO\n");
        exit(2);
    }
    r.function = run.function;
    r.vector = run.exception_vector;
    r.error = run.exception_error_code;
    r.addr = run.exception_addr;
    return r;
}

static inline struct result enter(int tcs, struct op *op)
{
    return enter_at(ENCL_BASE, tcs, EENTER, op);
}

static inline struct result call(int tcs, struct op *op, unsigned long what,
                                 unsigned long a, unsigned long b)
{
    op->op = what;
    op->a = a;
    op->b = b;
    op->ret = ~0UL;
    return enter(tcs, op);
}

static int failures;

static inline void check(int ok, const char *what)
{
    printf("%s %s\n", ok ? "ok  " : "FAIL", what);
    fflush(stdout);
    failures += !ok;
}

static inline double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

#endif
