/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An enclave with an entry of its own and no SDK, for tests of raw entries.  It has
 * no gate and no stack.  RDI says what to do with RSI and RDX; RSI comes back as
 * CSSA at entry, RDI as the result.
 *
 *   0  RSI + RDX             4  divide by zero       8  INT3
 *   1  the word at RSI       5  loop for ever        9  a counter in the enclave, + 1
 *   2  RDX to the word at RSI  6  until the word at RSI is not 0
 *   3  UD2                   7  CPUID (illegal inside)
 */
        .section .text, "ax", @progbits
        .globl  _start
        .type   _start, @function
        .balign 64
_start:
        movq    %rcx, %rbx
        movq    %rax, %r10
        cmpq    $9, %rdi
        ja      .Lunknown
        leaq    .Ltable(%rip), %r11
        movslq  (%r11, %rdi, 4), %rax
        addq    %r11, %rax
        xorl    %edi, %edi
        jmp     *%rax
.Lsum:  leaq    (%rsi, %rdx), %rdi
        jmp     .Lleave
.Lload: movq    (%rsi), %rdi
        jmp     .Lleave
.Lstore:
        movq    %rdx, (%rsi)
        jmp     .Lleave
.Lud2:  ud2
.Ldivide:
        xorl    %edx, %edx
        xorl    %eax, %eax
        divq    %rdx
        jmp     .Lleave
.Lloop: pause
        jmp     .Lloop
.Lspin: pause
        movq    (%rsi), %rdi
        testq   %rdi, %rdi
        jz      .Lspin
        jmp     .Lleave
.Lcpuid:
        movq    %rbx, %r8
        xorl    %eax, %eax
        cpuid
        movq    %r8, %rbx
        jmp     .Lleave
.Lint3: int3
        jmp     .Lleave
.Lcount:
        movl    $1, %edi
        lock xaddq %rdi, counter(%rip)
        incq    %rdi
        jmp     .Lleave
.Lunknown:
        movq    $-1, %rdi
.Lleave:
        movq    %r10, %rsi
        xorl    %edx, %edx
        movl    $4, %eax
        enclu
        ud2
        .balign 4
.Ltable:
        .long   .Lsum - .Ltable, .Lload - .Ltable, .Lstore - .Ltable, .Lud2 - .Ltable
        .long   .Ldivide - .Ltable, .Lloop - .Ltable, .Lspin - .Ltable, .Lcpuid - .Ltable
        .long   .Lint3 - .Ltable, .Lcount - .Ltable
        .size   _start, . - _start

        .section .data, "aw", @progbits
        .balign 8
counter:
        .quad   0

        .section .note.GNU-stack, "", @progbits
