/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A bare enclave for tests of entering and leaving: code at offset 0, no SDK, no stack of its
 * own.  EDI chooses what it does; RCX at entry is the way out.  Position independent: it is
 * copied into the enclave.  Words of the page at DATA are the tests' blackboard.
 */
#include "enclave.h"

#define EEXIT 4
        .macro  enclu
        .byte   0x0f, 0x01, 0xd7
        .endm

        .macro  leave_enclave
        mov     %rcx, %rbx
        mov     $EEXIT, %eax
        enclu
        .endm

        /* reg = address of the blackboard; clobbers nothing else */
        .macro  board reg
        lea     enclave_code+DATA(%rip), \reg
        .endm

        .section .rodata
        .globl  enclave_code, enclave_code_end
        .hidden enclave_code, enclave_code_end, enclave_divide
        .balign 4096
enclave_code:
        .rept   8
        nop
        .endr
        /* OENTRY is here, at ENTRY */
        cmp     $OP_NOTHING, %edi
        je      op_nothing
        cmp     $OP_REGISTERS, %edi
        je      op_registers
        cmp     $OP_SPIN, %edi
        je      op_spin
        cmp     $OP_DIVIDE, %edi
        je      op_divide
        cmp     $OP_READ, %edi
        je      op_read
        cmp     $OP_WRITE, %edi
        je      op_write
        cmp     $OP_ILLEGAL, %edi
        je      op_illegal
        cmp     $OP_ENTER_INSIDE, %edi
        je      op_enter_inside
        cmp     $OP_COUNT, %edi
        je      op_count
        cmp     $OP_INT3, %edi
        je      op_int3
        cmp     $OP_LANDING, %edi
        je      op_landing
        cmp     $OP_LEAF, %edi
        je      op_leaf
        cmp     $OP_NONCANONICAL_EXIT, %edi
        je      op_noncanonical_exit
        cmp     $OP_FLAGS, %edi
        je      op_flags
        cmp     $OP_SIMD_FAULT, %edi
        je      op_simd_fault
        cmp     $OP_X87_FAULT, %edi
        je      op_x87_fault
        cmp     $OP_JUMP, %edi
        je      op_jump
        cmp     $OP_PATTERN, %edi
        je      op_pattern
        cmp     $OP_GP, %edi
        je      op_gp
        cmp     $OP_PUSH, %edi
        je      op_push
        cmp     $OP_SPIN_URSP, %edi
        je      op_spin_ursp
op_illegal:
        ud2
        leave_enclave

op_nothing:
        leave_enclave

        /* RAX, RBX, RCX, RSP, RBP, FS base, GS base, RFLAGS, R12, R13 to the blackboard */
op_registers:
        mov     %r11, %r10
        board   %r11
        mov     %rax, 0(%r11)
        mov     %rbx, 8(%r11)
        mov     %rcx, 16(%r11)
        mov     %rsp, 24(%r11)
        mov     %rbp, 32(%r11)
        mov     %fs:0, %rax
        mov     %rax, 40(%r11)
        mov     %gs:0, %rax
        mov     %rax, 48(%r11)
        mov     %r12, 64(%r11)
        mov     %r13, 72(%r11)
        mov     %rsi, 80(%r11)
        mov     %rdx, 88(%r11)
        mov     %r8, 96(%r11)
        mov     %r9, 104(%r11)
        lea     1(%rsi), %rsi
        lea     2(%rdx), %rdx
        lea     3(%r8), %r8
        lea     4(%r9), %r9
        leave_enclave

        /* until the word at offset 128 is not 0; counts in the word at 136 */
op_spin:
        board   %r11
1:      lock incq 136(%r11)
        cmpq    $0, 128(%r11)
        je      1b
        leave_enclave

        /* As the SDK: RSI is where the GPRs of its SSA frame lie, with the caller's RSP and RBP. */
op_spin_ursp:
        lea     enclave_code(%rip), %r10
        add     %rsi, %r10
        xor     %esp, %esp
        xor     %ebp, %ebp
        board   %r11
1:      lock incq 136(%r11)
        cmpq    $0, 128(%r11)
        je      1b
        mov     144(%r10), %rsp
        mov     152(%r10), %rbp
        leave_enclave

op_divide:
        xor     %edx, %edx
        xor     %r8d, %r8d
        mov     $7, %eax
        .globl  enclave_divide
enclave_divide:
        div     %r8
        mov     %rax, %rsi
        leave_enclave

        /* RSI = *RSI */
op_read:
        mov     (%rsi), %rsi
        leave_enclave

        /* *RSI = RDX */
op_write:
        mov     %rdx, (%rsi)
        leave_enclave

op_enter_inside:
        mov     %esi, %eax
        enclu
        leave_enclave

        /* add RSI to the word at offset 144, RDX times */
op_count:
        board   %r11
1:      test    %rdx, %rdx
        jz      2f
        lock addq %rsi, 144(%r11)
        dec     %rdx
        jmp     1b
2:      leave_enclave

op_int3:
        mov     $1, %esi
        int3
        mov     $2, %esi
        leave_enclave

        /*
         * To the landing page with nothing left.  With RSI that is the stack, of somebody else's; there is one
         * in any case, since the host may take a signal on it at once.
         */
op_landing:
        lea     enclave_code+SIZE(%rip), %rbx
        test    %rsi, %rsi
        cmovnz  %rsi, %rsp
        xor     %ecx, %ecx
        xor     %edx, %edx
        xor     %esi, %esi
        xor     %edi, %edi
        xor     %ebp, %ebp
        xor     %r8d, %r8d
        std
        mov     $EEXIT, %eax
        enclu

        /* ENCLU leaf R8 with RBX = RSI, RCX = RDX; result in RSI */
op_leaf:
        mov     %rcx, %r10
        mov     %r8, %rax
        mov     %rsi, %rbx
        mov     %rdx, %rcx
        mov     %r9, %rdx
        enclu
        mov     %rax, %rsi
        mov     %r10, %rcx
        leave_enclave

op_noncanonical_exit:
        mov     $1, %rbx
        shl     $63, %rbx
        mov     $EEXIT, %eax
        enclu

        /* leave with DF and AC set, another MXCSR and x87 control word, and a full x87 stack */
op_flags:
        pushfq
        orl     $0x40400, (%rsp)
        popfq
        push    $0x7f80
        ldmxcsr (%rsp)
        movq    $0x0f7f, (%rsp)
        fldcw   (%rsp)
        .rept   8
        fld1
        .endr
        add     $8, %rsp
        leave_enclave

op_simd_fault:
        push    $0x1d80                 /* divide by zero unmasked */
        ldmxcsr (%rsp)
        add     $8, %rsp
        xorps   %xmm0, %xmm0
        mov     $1, %eax
        cvtsi2ss %eax, %xmm1
        divss   %xmm0, %xmm1
        leave_enclave

op_x87_fault:
        push    $0x037b                 /* zero divide unmasked */
        fldcw   (%rsp)
        add     $8, %rsp
        fld1
        fldz
        fdivrp
        fwait
        leave_enclave

op_jump:
        jmp     *%rsi

op_gp:
        mov     $1, %rax
        shl     $63, %rax
        mov     (%rax), %rax
        leave_enclave

        /* leave data on the untrusted stack, as Intel's sgx_ocalloc does */
op_push:
        push    $0x1234
        leave_enclave

        /*
         * Fill every register from the word at 512.. of the blackboard, go round RDX times, and store
         * what they hold then at 1024.. : GPRs without RSP, RFLAGS, XMM or YMM (R8 != 0).
         * Way out and counter lie in memory.
         */
op_pattern:
        board   %r11
        add     %rsi, %r11              /* each thread has its own part */
        mov     %rcx, 0(%r11)
        mov     %rdx, 8(%r11)
        mov     %rsp, 16(%r11)
        mov     %rbp, 24(%r11)
        mov     %r8, 32(%r11)
        test    %r8, %r8
        jz      1f
        .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        vmovdqu 512+128+32*\n(%r11), %ymm\n
        .endr
        jmp     2f
1:
        .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        movdqu  512+128+32*\n(%r11), %xmm\n
        .endr
2:
        fninit
        fldl    512+120(%r11)
        mov     512+0(%r11), %rax
        mov     512+8(%r11), %rcx
        mov     512+16(%r11), %rdx
        mov     512+24(%r11), %rbx
        mov     512+32(%r11), %rbp
        mov     512+40(%r11), %rsi
        mov     512+48(%r11), %rdi
        mov     512+56(%r11), %r8
        mov     512+64(%r11), %r9
        mov     512+72(%r11), %r10
        mov     512+80(%r11), %r12
        mov     512+88(%r11), %r13
        mov     512+96(%r11), %r14
        mov     512+104(%r11), %r15
        /* Odd flags, and RSP is one of the registers under test: it points to no stack. */
        push    512+112(%r11)
        popfq
        mov     %r11, %rsp
3:
        /* DEC leaves CF alone and LEA and JRCXZ touch no flag: count with them. */
        mov     %rcx, 40(%rsp)
        mov     8(%rsp), %rcx
        lea     -1(%rcx), %rcx
        mov     %rcx, 8(%rsp)
        jrcxz   4f
        mov     40(%rsp), %rcx
        jmp     3b
4:
        lea     1536+120(%rsp), %rsp
        pushfq
        lea     -1536-112(%rsp), %rsp
        mov     40(%rsp), %rcx
        mov     %rax, 1536+0(%rsp)
        mov     %rcx, 1536+8(%rsp)
        mov     %rdx, 1536+16(%rsp)
        mov     %rbx, 1536+24(%rsp)
        mov     %rbp, 1536+32(%rsp)
        mov     %rsi, 1536+40(%rsp)
        mov     %rdi, 1536+48(%rsp)
        mov     %r8, 1536+56(%rsp)
        mov     %r9, 1536+64(%rsp)
        mov     %r10, 1536+72(%rsp)
        mov     %r12, 1536+80(%rsp)
        mov     %r13, 1536+88(%rsp)
        mov     %r14, 1536+96(%rsp)
        mov     %r15, 1536+104(%rsp)
        cmp     %rsp, %r11
        mov     %rsp, %r11
        mov     16(%r11), %rsp
        jne     5f
        pushq   $0                      /* R11 and RSP were the same all the time */
        jmp     6f
5:      pushq   $1
6:      pop     48(%r11)
        fstpl   1536+120(%r11)
        mov     32(%r11), %r8
        test    %r8, %r8
        jz      7f
        .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        vmovdqu %ymm\n, 1536+128+32*\n(%r11)
        .endr
        vzeroupper
        jmp     8f
7:
        .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        movdqu  %xmm\n, 1536+128+32*\n(%r11)
        .endr
8:
        mov     0(%r11), %rcx
        mov     24(%r11), %rbp
        cld
        leave_enclave
enclave_code_end:
        .section .note.GNU-stack, "", @progbits
