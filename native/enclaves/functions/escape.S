/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Leaving the engine from wherever it stands: only registers and the stack are put back, and nothing of
 * what it has begun is undone.  struct escape (slot.h) is the stack pointer.
 */
        .text

/* int escape_run(struct escape *escape, int (*body)(void *), void *argument) */
        .globl  escape_run
        .hidden escape_run
        .type   escape_run, @function
        .balign 16
escape_run:
        pushq   %rbp
        pushq   %rbx
        pushq   %r12
        pushq   %r13
        pushq   %r14
        pushq   %r15
        subq    $8, %rsp
        movq    %rsp, (%rdi)
        movq    %rsi, %rax
        movq    %rdx, %rdi
        call    *%rax
.Lback:
        addq    $8, %rsp
        popq    %r15
        popq    %r14
        popq    %r13
        popq    %r12
        popq    %rbx
        popq    %rbp
        ret
        .size   escape_run, . - escape_run

/* void escape_leave(struct escape *escape, int status): escape_run() returns `status` */
        .globl  escape_leave
        .hidden escape_leave
        .type   escape_leave, @function
        .balign 16
escape_leave:
        movq    (%rdi), %rsp
        movl    %esi, %eax
        jmp     .Lback
        .size   escape_leave, . - escape_leave

        .section .note.GNU-stack, "", @progbits
