/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The least that an enclave can do: leave.  An entry into it is the floor that
 * the SDK's empty call is measured against.
 */
        .section .text, "ax", @progbits
        .globl  _start
        .type   _start, @function
        .balign 64
_start:
        movq    %rcx, %rbx              /* the way out, as EENTER gave it */
        movl    $4, %eax                /* EEXIT */
        enclu
        ud2
        .size   _start, . - _start

        .section .note.GNU-stack, "", @progbits
