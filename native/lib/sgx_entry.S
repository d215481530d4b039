/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Into the vDSO's __vdso_sgx_enter_enclave (arch/x86/entry/vdso/vsgx.S) and out of it.
 *
 * The enclave may do what it likes with the registers, and an asynchronous exit clears
 * R12 to R15 (SDM volume 3D, "Synthetic State"), so nothing of ours lives in a register
 * or is found by RBP: struct entry holds it, and TLS tells which entry.
 *
 * The ways back are
 *   after the call    EEXIT or an exception; EAX is 0, -EINVAL or a user handler's result
 *   sgx_recovered     from a signal handler of ours that found RIP at the ENCLU; EAX is the
 *                     result, and the handler has filled `run`
 *   sgx_landed        from the landing page; RAX is the entry
 */
#include "entry_offsets.h"

#define LEAF_EENTER 2
#define LEAF_EEXIT 4
#define TEEMATE_LANDED 2

        .macro  current register
        mov     entry_current@gottpoff(%rip), \register
        mov     %fs:(\register), \register
        .endm

        .text
        .globl  sgx_trampoline
        .hidden sgx_trampoline
        .type   sgx_trampoline, @function
        .align  16
sgx_trampoline:
        .cfi_startproc
        endbr64
        push    %rbp
        .cfi_def_cfa_offset 16
        .cfi_offset %rbp, -16
        mov     %rsp, %rbp
        .cfi_def_cfa_register %rbp
        push    %rbx
        .cfi_offset %rbx, -24
        push    %r12
        .cfi_offset %r12, -32
        push    %r13
        .cfi_offset %r13, -40
        push    %r14
        .cfi_offset %r14, -48
        push    %r15
        .cfi_offset %r15, -56
        sub     $8, %rsp
        mov     %rsp, ENTRY_RSP(%rdi)
        mov     %rbp, ENTRY_RBP(%rdi)
        stmxcsr ENTRY_MXCSR(%rdi)
        fnstcw  ENTRY_FCW(%rdi)
        pushfq
        pop     %rax
        mov     %rax, ENTRY_FLAGS(%rdi)
        xor     %eax, %eax
        rdsspq  %rax                    /* does nothing without a shadow stack */
        mov     %rax, ENTRY_SSP(%rdi)

        /*
         * The vDSO's frame, from here or from the top of the TCS's stack: RUN at its RBP + 16.
         * Its address is called from memory, since the enclave gets every register.
         */
        mov     ENTRY_STACK(%rdi), %rax
        test    %rax, %rax
        cmovnz  %rax, %rsp
        push    ENTRY_TARGET(%rdi)
        push    ENTRY_RUN(%rdi)
        lea     -16(%rsp), %rax
        mov     %rax, ENTRY_FRAME(%rdi)
        mov     ENTRY_REGS(%rdi), %rax
        mov     ENTRY_FUNCTION(%rdi), %ecx
        xor     %r10d, %r10d
        xor     %r11d, %r11d
        xor     %r12d, %r12d
        xor     %r13d, %r13d
        xor     %r14d, %r14d
        xor     %r15d, %r15d
        cmp     $LEAF_EENTER, %ecx
        jne     1f
        mov     REGS_R12(%rax), %r12
        mov     REGS_R13(%rax), %r13
1:      movq    $0, REGS_R12(%rax)
        movq    $0, REGS_R13(%rax)
        mov     REGS_RSI(%rax), %rsi
        mov     REGS_RDX(%rax), %rdx
        mov     REGS_R8(%rax), %r8
        mov     REGS_R9(%rax), %r9
        mov     REGS_RDI(%rax), %rdi
        call    *8(%rsp)

        current %rcx
        cmpl    $0, ENTRY_KEPT(%rcx)
        jne     .Lstate
        mov     ENTRY_REGS(%rcx), %rbx
        mov     %rdi, REGS_RDI(%rbx)
        mov     %rsi, REGS_RSI(%rbx)
        mov     %rdx, REGS_RDX(%rbx)
        mov     %r8, REGS_R8(%rbx)
        mov     %r9, REGS_R9(%rbx)

        /* RCX is the entry, EAX the result. */
.Lstate:
        mov     ENTRY_RBP(%rcx), %rbp
        mov     ENTRY_RSP(%rcx), %rsp
        fninit
        fldcw   ENTRY_FCW(%rcx)
        ldmxcsr ENTRY_MXCSR(%rcx)
        /* Ways back without a return leave the vDSO's address on the shadow stack. */
        xor     %edx, %edx
        rdsspq  %rdx
        mov     ENTRY_SSP(%rcx), %rsi
        sub     %rdx, %rsi
        jbe     2f
        shr     $3, %rsi
        incsspq %rsi
2:      push    ENTRY_FLAGS(%rcx)       /* DF and AC are the host's again */
        popfq
        add     $8, %rsp
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbx
        pop     %rbp
        .cfi_remember_state
        .cfi_def_cfa %rsp, 8
        ret
        .cfi_restore_state

        .globl  sgx_recovered
        .hidden sgx_recovered
sgx_recovered:
        endbr64
        current %rcx
        jmp     .Lstate

        .globl  sgx_landed
        .hidden sgx_landed
sgx_landed:
        endbr64
        mov     %rax, %rcx
        mov     ENTRY_REGS(%rcx), %rbx
        mov     %rdi, REGS_RDI(%rbx)
        mov     %rsi, REGS_RSI(%rbx)
        mov     %rdx, REGS_RDX(%rbx)
        mov     %r8, REGS_R8(%rbx)
        mov     %r9, REGS_R9(%rbx)
        mov     ENTRY_RUN(%rcx), %rbx
        movl    $LEAF_EEXIT, RUN_FUNCTION(%rbx)
        mov     $TEEMATE_LANDED, %eax
        jmp     .Lstate
        .cfi_endproc
        .size sgx_trampoline, . - sgx_trampoline

        /*
         * What the vDSO calls in place of the caller's user handler, which expects the C ABI's
         * control words, and whose entry is over for the ticker: (rdi, rsi, rdx, rsp, r8, r9, run).
         * A positive result is the next leaf; it gets what `regs` holds, and no key.
         */
        .globl  sgx_user_handler
        .hidden sgx_user_handler
        .type   sgx_user_handler, @function
        .align  16
sgx_user_handler:
        .cfi_startproc
        endbr64
        push    %rbp
        .cfi_def_cfa_offset 16
        .cfi_offset %rbp, -16
        mov     %rsp, %rbp
        .cfi_def_cfa_register %rbp
        push    %rbx
        .cfi_offset %rbx, -24
        sub     $8, %rsp
        current %rax
        mov     ENTRY_REGS(%rax), %rbx
        mov     %rdi, REGS_RDI(%rbx)
        mov     %rsi, REGS_RSI(%rbx)
        mov     %rdx, REGS_RDX(%rbx)
        mov     %r8, REGS_R8(%rbx)
        mov     %r9, REGS_R9(%rbx)
        fninit
        fldcw   ENTRY_FCW(%rax)
        ldmxcsr ENTRY_MXCSR(%rax)
        push    ENTRY_FLAGS(%rax)
        popfq
        mov     %rax, %rdi
        mov     %rcx, %rsi
        call    sgx_run_handler
        test    %eax, %eax
        jle     3f
        current %rcx
        mov     ENTRY_REGS(%rcx), %rcx
        mov     REGS_RDI(%rcx), %rdi
        mov     REGS_RSI(%rcx), %rsi
        mov     REGS_RDX(%rcx), %rdx
        mov     REGS_R8(%rcx), %r8
        mov     REGS_R9(%rcx), %r9
        mov     REGS_R12(%rcx), %r12
        mov     REGS_R13(%rcx), %r13
        movq    $0, REGS_R12(%rcx)
        movq    $0, REGS_R13(%rcx)
        xor     %r10d, %r10d
        xor     %r11d, %r11d
        xor     %r14d, %r14d
        xor     %r15d, %r15d
3:      add     $8, %rsp
        pop     %rbx
        pop     %rbp
        .cfi_def_cfa %rsp, 8
        ret
        .cfi_endproc
        .size sgx_user_handler, . - sgx_user_handler

        .section .note.GNU-stack, "", @progbits
