/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An enclave without the SDK that answers an ECALL with whatever its input says:
 * RDI, RSI, RDX, R8, then 16 bytes that go to the OCALL buffer.  The return of an
 * OCALL ends the call; its status (RDX) becomes the call's.
 */
        .section .text, "ax", @progbits
        .globl  _start
        .type   _start, @function
        .balign 64
_start:
        movq    %rcx, %rbx
        cmpq    $1, %rdi                /* TM_SEL_OCALL_RETURN */
        je      1f
        movq    16(%rsi), %rax          /* tm_call.in */
        movq    48(%rsi), %r9           /* tm_call.ocall_buf */
        movq    32(%rax), %rcx
        movq    %rcx, (%r9)
        movq    40(%rax), %rcx
        movq    %rcx, 8(%r9)
        movq    (%rax), %rdi
        movq    8(%rax), %rsi
        movq    16(%rax), %rdx
        movq    24(%rax), %r8
        jmp     2f
1:      movq    %rdx, %rsi
        xorl    %edi, %edi
        xorl    %edx, %edx
2:      movl    $4, %eax                /* EEXIT */
        enclu
        ud2
        .size   _start, . - _start

        .section .note.GNU-stack, "", @progbits
