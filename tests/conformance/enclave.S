/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The conformance enclave: does one thing per entry, as RDI says, with its arguments in a
 * block of host memory at RSI (struct block in runner.c), and EEXITs.  It knows no SDK.
 *
 * A TCS's OGSBASE page starts with the offset of its stack's top; a nested entry (CSSA > 0)
 * uses 512 bytes further down per frame.  Offset 8 of the page is a mark that op_state reads
 * through GS, and through FS, whose page is another one.
 */
#define B_RAX 0
#define B_RBX 8
#define B_RCX 16
#define B_RDX 24
#define B_RFLAGS 32
#define B_OUT_RAX 40
#define B_OUT_RFLAGS 48
#define B_STARTED 56
#define B_STOP 64
#define B_STATE 72 /* RAX RBX RCX RSP RBP RFLAGS FS:8 GS:8 */

#define DUMP 0x7000

        .text
        .org 0
base:
entry:
        mov     %rcx, %r10
        mov     %rsp, %r11
        mov     %rbx, %r9
        mov     %rax, %r12
        lea     base(%rip), %r8
        add     %gs:0, %r8
        mov     %rax, %rcx
        shl     $9, %rcx
        sub     %rcx, %r8
        mov     %r8, %rsp
        pushfq
        pop     %r13
        push    %r10            /* the way out */
        push    %rbp            /* the host's: the vDSO finds its frame by it */
        push    %r11            /* the host's stack */
        cmp     $(ops_end - ops) / 8, %rdi
        jae     out
        lea     ops(%rip), %rax
        mov     (%rax, %rdi, 8), %rcx
        lea     base(%rip), %rax
        add     %rcx, %rax
        jmp     *%rax

out:
        pop     %r11
        pop     %rbp
        pop     %rbx
        mov     %r11, %rsp
        xor     %r10d, %r10d
        mov     $4, %eax
        enclu
        ud2

        .align 8
ops:
        .quad out - base
        .quad op_enclu - base
        .quad op_copy - base
        .quad op_read - base
        .quad op_write - base
        .quad op_call - base
        .quad op_spin - base
        .quad op_fault - base
        .quad op_pattern - base
        .quad op_state - base
        .quad op_eexit - base
ops_end:

op_enclu:
        push    %rsi
        push    B_RFLAGS(%rsi)
        mov     B_RAX(%rsi), %rax
        mov     B_RBX(%rsi), %rbx
        mov     B_RCX(%rsi), %rcx
        mov     B_RDX(%rsi), %rdx
        popfq
        enclu
        pushfq
        mov     8(%rsp), %rsi
        mov     %rax, B_OUT_RAX(%rsi)
        pop     %rax
        mov     %rax, B_OUT_RFLAGS(%rsi)
        pop     %rsi
        jmp     out

op_copy:
        mov     B_RBX(%rsi), %rdi
        mov     B_RCX(%rsi), %rcx
        mov     B_RDX(%rsi), %rsi
        cld
        rep movsb
        jmp     out

op_read:
        mov     B_RBX(%rsi), %rbx
        movzbl  (%rbx), %eax
        mov     %rax, B_OUT_RAX(%rsi)
        jmp     out

op_write:
        mov     B_RBX(%rsi), %rbx
        movb    $0xc3, (%rbx)
        jmp     out

op_call:
        call    *B_RBX(%rsi)
        jmp     out

/* RAX counts the rounds: a frame of the SSA tells when it was written. */
op_spin:
        xor     %eax, %eax
        movq    $1, B_STARTED(%rsi)
1:      pause
        inc     %rax
        cmpq    $0, B_STOP(%rsi)
        je      1b
        jmp     out

op_state:
        mov     %r12, B_STATE(%rsi)
        mov     %r9, B_STATE + 8(%rsi)
        mov     %r10, B_STATE + 16(%rsi)
        mov     %r11, B_STATE + 24(%rsi)
        mov     %rbp, B_STATE + 32(%rsi)
        mov     %r13, B_STATE + 40(%rsi)
        mov     %fs:8, %rax
        mov     %rax, B_STATE + 48(%rsi)
        mov     %gs:8, %rax
        mov     %rax, B_STATE + 56(%rsi)
        jmp     out

/* EEXIT to an address of the block's; R10 tells it the way on. */
op_eexit:
        mov     B_RBX(%rsi), %rbx
        mov     B_RCX(%rsi), %rcx
        pop     %rsp            /* the host's, as in out */
        mov     $4, %eax
        enclu
        ud2

/* RAX of the block says which. */
op_fault:
        mov     B_RAX(%rsi), %rax
        cmp     $(faults_end - faults) / 8, %rax
        jae     out
        lea     faults(%rip), %rcx
        mov     (%rcx, %rax, 8), %rcx
        lea     base(%rip), %rax
        add     %rcx, %rax
        jmp     *%rax
        .align 8
faults:
        .quad fault_de - base
        .quad fault_ud - base
        .quad fault_gp - base
        .quad fault_mf - base
        .quad fault_ac - base
        .quad fault_xm - base
        .quad fault_bp - base
        .quad fault_db - base
faults_end:

fault_de:
        xor     %ecx, %ecx
        xor     %edx, %edx
        mov     $1, %eax
        div     %ecx
        jmp     out
fault_ud:
        ud2
        jmp     out
fault_gp:
        mov     $1, %rax
        shl     $62, %rax
        mov     (%rax), %rax
        jmp     out
fault_mf:
        fninit
        push    $0x0300         /* control word: all exceptions unmasked */
        fldcw   (%rsp)
        pop     %rax
        fld1
        fldz
        fdivrp
        fwait
        jmp     out
fault_ac:
        pushfq
        orq     $0x40000, (%rsp)
        popfq
        mov     1(%rsp), %eax
        jmp     out
fault_xm:
        push    $0x1d80         /* MXCSR: division by zero unmasked */
        ldmxcsr (%rsp)
        pop     %rax
        xorps   %xmm1, %xmm1
        mov     $1, %eax
        cvtsi2ss %eax, %xmm0
        divss   %xmm1, %xmm0
        jmp     out
fault_bp:
        int3
        jmp     out
fault_db:
        .byte   0xf1
        jmp     out

/* All registers get patterns, UD2; what they are after ERESUME (at the NOP) goes to DUMP. */
        .macro  pattern n, reg
        mov     $0x1111111111111111 * \n, %\reg
        .endm
op_pattern:
        pattern 1, rax
        pattern 2, rbx
        pattern 3, rcx
        pattern 4, rdx
        pattern 5, rsi
        pattern 6, rdi
        pattern 7, rbp
        movabs  $0x8888888888888888, %r8
        movabs  $0x9999999999999999, %r9
        movabs  $0xaaaaaaaaaaaaaaaa, %r10
        movabs  $0xbbbbbbbbbbbbbbbb, %r11
        movabs  $0xcccccccccccccccc, %r12
        movabs  $0xdddddddddddddddd, %r13
        movabs  $0xeeeeeeeeeeeeeeee, %r14
        movabs  $0x0123456789abcdef, %r15
        movq    %r15, %xmm7
        pushq   $0x4d7          /* CF PF AF ZF SF DF */
        popfq
        ud2
        nop
        mov     %rax, base + DUMP(%rip)
        mov     %rbx, base + DUMP + 8(%rip)
        mov     %rcx, base + DUMP + 16(%rip)
        mov     %rdx, base + DUMP + 24(%rip)
        mov     %rsi, base + DUMP + 32(%rip)
        mov     %rdi, base + DUMP + 40(%rip)
        mov     %rbp, base + DUMP + 48(%rip)
        mov     %r8, base + DUMP + 56(%rip)
        mov     %r9, base + DUMP + 64(%rip)
        mov     %r10, base + DUMP + 72(%rip)
        mov     %r11, base + DUMP + 80(%rip)
        mov     %r12, base + DUMP + 88(%rip)
        mov     %r13, base + DUMP + 96(%rip)
        mov     %r14, base + DUMP + 104(%rip)
        mov     %r15, base + DUMP + 112(%rip)
        movq    %xmm7, base + DUMP + 120(%rip)
        pushfq
        pop     %rax
        mov     %rax, base + DUMP + 128(%rip)
        mov     %fs:8, %rax
        mov     %rax, base + DUMP + 136(%rip)
        mov     %gs:8, %rax
        mov     %rax, base + DUMP + 144(%rip)
        cld
        jmp     out

        .org    0x1000
        .globl  end
end:
