/*
 * The test enclave
 */

#include "layout.h"

typedef unsigned long u64;

struct gpr {
    u64 regs[16];
    u64 rflags, rip, ursp, urbp;
    unsigned exitinfo, reserved;
    u64 fsbase, gsbase;
};

volatile u64 shared[512] __attribute__((aligned(4096))) = { 0x5a5a };
static unsigned char buffer[2048] __attribute__((aligned(2048)));

extern char encl_base[] __attribute__((visibility("hidden")));
extern char unwind[] __attribute__((visibility("hidden")));
u64 regs_test(u64 rounds) __attribute__((visibility("hidden")));

asm(
"    .section .entry, \"ax\"\n"
"    .globl entry\n"
/* RAX = CSSA, RBX = TCS, RCX = where to return to, RDI = op */
"entry:\n"
"    lea 0xd000(%rbx), %r11\n"      /* end of this TCS's stack page */
"    mov %rax, %rsi\n"
"    shl $11, %rax\n"               /* a half of it for every CSSA */
"    sub %rax, %r11\n"
"    xchg %r11, %rsp\n"
"    push %r11\n"
"    push %rbp\n"
"    push %rcx\n"
"    push %rcx\n"
"    mov %rcx, %rdx\n"
"    cld\n"
"    call body\n"
"    pop %rbx\n"
"    pop %rbx\n"
"    pop %rbp\n"
"    pop %rsp\n"
"    xor %ecx, %ecx\n"
"    xor %edx, %edx\n"
"    xor %esi, %esi\n"
"    xor %edi, %edi\n"
"    mov $4, %eax\n"
"    .byte 0x0f, 0x01, 0xd7\n"
/* RCX = GPRSGX, RBX = where to return to */
"unwind:\n"
"    mov 144(%rcx), %rsp\n"
"    mov 152(%rcx), %rbp\n"
"    xor %ecx, %ecx\n"
"    mov $4, %eax\n"
"    .byte 0x0f, 0x01, 0xd7\n"
"    .text\n"
/* Fill the registers, spend time, and see whether they are still the same. */
"regs_test:\n"
"    push %rbx\n"
"    push %rbp\n"
"    push %r12\n"
"    push %r13\n"
"    push %r14\n"
"    push %r15\n"
"    mov %rdi, %rcx\n"
"    mov $0x1111111111111111, %rbx\n"
"    mov $0x2222222222222222, %rdx\n"
"    mov $0x3333333333333333, %rsi\n"
"    mov $0x4444444444444444, %rdi\n"
"    mov $0x5555555555555555, %rbp\n"
"    mov $0x0000666666666666, %r8\n"
"    mov $0x7777777777777777, %r9\n"
"    mov $0x1888888888888888, %r10\n"
"    mov $0x1999999999999999, %r11\n"
"    mov $0x1aaaaaaaaaaaaaaa, %r12\n"
"    mov $0x1bbbbbbbbbbbbbbb, %r13\n"
"    mov $0x1ccccccccccccccc, %r14\n"
"    mov $0x1ddddddddddddddd, %r15\n"
"    fninit\n"
"    fld1\n"
"    fldpi\n"
"    movq %rbx, %xmm1\n"
"    movq %r15, %xmm15\n"
"    vbroadcastsd %xmm1, %ymm2\n"
"    vmovapd %ymm2, %ymm13\n"
"    wrfsbase %r8\n"
"    xor %eax, %eax\n"
"1:  stc\n"
"    jnc 8f\n"
"    dec %rcx\n"
"    jnc 8f\n"
"    jnz 1b\n"
"    rdfsbase %rcx\n"
"    cmp %rcx, %r8\n"
"    jne 9f\n"
"    vpcmpeqq %ymm2, %ymm13, %ymm3\n"
"    vpmovmskb %ymm3, %ecx\n"
"    cmp $-1, %ecx\n"
"    jne 9f\n"
"    vextractf128 $1, %ymm13, %xmm3\n"
"    movq %xmm3, %rcx\n"
"    cmp %rcx, %rbx\n"
"    jne 9f\n"
"    movq %xmm15, %rcx\n"
"    cmp %rcx, %r15\n"
"    jne 9f\n"
"    fldpi\n"
"    fcomip %st(1), %st\n"
"    jne 9f\n"
"    fstp %st\n"
"    fld1\n"
"    fcomip %st(1), %st\n"
"    jne 9f\n"
"    add %rdx, %rbx\n"
"    cmp %rbx, %rsi\n"
"    jne 9f\n"
"    add %rbp, %rbx\n"      /* 0x88.. */
"    sub %rdi, %rbx\n"      /* 0x44.. */
"    cmp %rbx, %rdi\n"
"    jne 9f\n"
"    lea (%r8,%r9), %rcx\n"
"    add %r10, %rcx\n"
"    add %r11, %rcx\n"
"    add %r12, %rcx\n"
"    add %r13, %rcx\n"
"    add %r14, %rcx\n"
"    add %r15, %rcx\n"
"    mov $0x1aab11111111110c, %rdx\n"
"    cmp %rcx, %rdx\n"
"    jne 9f\n"
"    jmp 7f\n"
"8:  mov $2, %eax\n"
"    jmp 7f\n"
"9:  mov $1, %eax\n"
"7:  fninit\n"
"    vzeroupper\n"
"    pop %r15\n"
"    pop %r14\n"
"    pop %r13\n"
"    pop %r12\n"
"    pop %rbp\n"
"    pop %rbx\n"
"    ret\n"
);

static u64 enclu(u64 leaf, const void *rbx, u64 rcx, u64 rdx)
{
    u64 rax = leaf;

    asm volatile(".byte 0x0f, 0x01, 0xd7"
                 : "+a" (rax)
                 : "b" (rbx), "c" (rcx), "d" (rdx)
                 : "memory", "cc");
    return rax;
}

static void copy(void *to, const void *from, u64 n)
{
    unsigned char *t = to;
    const unsigned char *f = from;

    while (n--) {
        *(volatile unsigned char *)t++ = *f++;
    }
}

static void zero(void *to, u64 n)
{
    unsigned char *t = to;

    while (n--) {
        *(volatile unsigned char *)t++ = 0;
    }
}

static struct gpr *frame(u64 tcs, u64 n)
{
    return (void *)(encl_base + OFF_SSA + (tcs * NSSA + n + 1) * PAGE -
                    sizeof(struct gpr));
}

__attribute__((used)) static void body(struct op *op, u64 cssa, u64 ret)
{
    struct { u64 flags, reserved[7]; } secinfo __attribute__((aligned(64)));
    u64 a = op->a, b = op->b, c = op->c, lo, hi, i;
    struct gpr *g;

    zero(&secinfo, sizeof(secinfo));
    secinfo.flags = b;

    switch (op->op) {
    case OP_NOP:
        op->ret = cssa;
        break;
    case OP_PUT:
        shared[a] = b;
        break;
    case OP_GET:
        op->ret = shared[a];
        break;
    case OP_WAIT_OUTSIDE:
        while (!*(volatile u64 *)a) {
        }
        op->ret = *(volatile u64 *)a;
        break;
    case OP_STAY:
        for (;;) {
            *(volatile u64 *)a = 1;
        }
        break;
    case OP_WAIT:
        while (!shared[a]) {
        }
        op->ret = shared[a];
        break;
    case OP_ADD:
        for (i = 0; i < b; i++) {
            __atomic_fetch_add(&shared[a], 1, __ATOMIC_SEQ_CST);
        }
        break;
    case OP_READ:
        op->ret = *(volatile u64 *)a;
        break;
    case OP_WRITE:
        *(volatile u64 *)a = b;
        break;
    case OP_CALL:
        ((void (*)(void))a)();
        break;
    case OP_UD2:
        asm volatile("ud2");
        break;
    case OP_CPUID:
        asm volatile("cpuid" : "=a" (lo) : "a" (0) : "rbx", "rcx", "rdx");
        op->ret = lo;
        break;
    case OP_SYSCALL:
        asm volatile("syscall" : "=a" (lo) : "a" (39) : "rcx", "r11");
        op->ret = lo;
        break;
    case OP_RDTSC:
        asm volatile("rdtsc" : "=a" (lo), "=d" (hi));
        op->ret = hi << 32 | lo;
        break;
    case OP_INT3:
        asm volatile("int3");
        break;
    case OP_FAR:
        asm volatile("mov %0, %%es" : : "r" (0));
        break;
    case OP_REGS:
        op->ret = regs_test(a);
        break;
    case OP_REPORT:
        /* TARGETINFO at 0, REPORTDATA at 512, REPORT at 1024 */
        zero(buffer, sizeof(buffer));
        for (i = 0; i < 64; i++) {
            buffer[512 + i] = i;
        }
        enclu(0, buffer, (u64)buffer + 512, (u64)buffer + 1024);
        /* That was for no one; now the target is this enclave. */
        copy(buffer, buffer + 1024 + 64, 32);           /* MRENCLAVE */
        copy(buffer + 32, buffer + 1024 + 48, 16);      /* ATTRIBUTES */
        copy(buffer + 52, buffer + 1024 + 16, 4);       /* MISCSELECT */
        enclu(0, buffer, (u64)buffer + 512, (u64)buffer + 1024);
        copy(op->buf, buffer + 1024, 432);
        zero(buffer, 512);
        buffer[0] = 3;                                  /* report key */
        copy(buffer + 40, op->buf + 384, 32);           /* KEYID */
        op->ret = enclu(1, buffer, (u64)buffer + 512, 0);
        copy(op->buf + 432, buffer + 512, 16);
        break;
    case OP_KEY:
        zero(buffer, 512);
        buffer[0] = b;
        buffer[2] = a;
        op->ret = enclu(1, buffer, (u64)buffer + 512, 0);
        copy(op->buf, buffer + 512, 16);
        break;
    case OP_EACCEPT:
        op->ret = enclu(5, &secinfo, a, 0);
        break;
    case OP_EMODPE:
        enclu(6, &secinfo, a, 0);
        break;
    case OP_EACCEPTCOPY:
        op->ret = enclu(7, &secinfo, a, c);
        break;
    case OP_SSA:
        copy(op->buf, frame(a, b), sizeof(struct gpr));
        copy(op->buf + sizeof(struct gpr), (char *)frame(a, b) - 16, 16);
        break;
    case OP_SKIP:
        frame(a, b)->rip += c;
        break;
    case OP_UNWIND:
        g = frame(a, b);
        g->rip = (u64)unwind;
        g->regs[1] = (u64)g;
        g->regs[3] = ret;
        break;
    }
}
