/*
 * Layout of the test enclave, shared by the enclave, its signer and its host.
 */

#ifndef LAYOUT_H
#define LAYOUT_H

#define PAGE 4096UL

#define ENCL_BASE 0x100000000000UL  /* the same address in every process */
#define ENCL_SIZE 0x4000000UL       /* 64 MiB of ELRANGE */

#define NTCS 4
#define NSSA 2
#define OFF_TCS   0x0UL             /* NTCS pages */
#define OFF_SSA   0x4000UL          /* NSSA pages for every TCS */
#define OFF_STACK 0xc000UL          /* a page for every TCS */
#define OFF_TEXT  0x10000UL
#define TEXT_SIZE 0x4000UL
#define OFF_DATA  0x14000UL
#define DATA_SIZE 0x4000UL
#define OFF_AUG   0x800000UL        /* pages are added here after EINIT */
#define OFF_HEAP  0x1000000UL       /* for the benchmark */

/* What to ask the enclave for; it is passed in RDI. */
struct op {
    unsigned long op;
    unsigned long a, b, c;
    unsigned long ret;
    unsigned char buf[1024];
};

enum {
    OP_NOP,             /* ret = CSSA */
    OP_PUT,             /* shared[a] = b */
    OP_GET,             /* ret = shared[a] */
    OP_WAIT_OUTSIDE,    /* until *a is not 0, outside of the enclave */
    OP_WAIT,            /* until shared[a] is not 0; ret = shared[a] */
    OP_ADD,             /* b times shared[a]++, atomically */
    OP_READ,            /* ret = *a */
    OP_WRITE,           /* *a = b */
    OP_CALL,            /* call a */
    OP_UD2,
    OP_CPUID,
    OP_SYSCALL,
    OP_RDTSC,
    OP_INT3,
    OP_FAR,             /* load a segment register */
    OP_REGS,            /* keep registers busy for a rounds; ret = errors */
    OP_REPORT,          /* buf = report for self, report key */
    OP_KEY,             /* buf = key b, with policy a; ret = error code */
    OP_EACCEPT,         /* page a, flags b; ret = error code */
    OP_EMODPE,          /* page a, flags b */
    OP_EACCEPTCOPY,     /* page a, flags b, source c; ret = error code */
    OP_SSA,             /* buf = GPRSGX, EXINFO of frame b of TCS a */
    OP_SKIP,            /* in frame b of TCS a: RIP += c */
    OP_UNWIND,          /* make frame b of TCS a leave on ERESUME */
    OP_STAY,            /* *a = 1, then never leave */
};

#endif
