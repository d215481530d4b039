/* SPDX-License-Identifier: Apache-2.0 */
#include "entry_offsets.h"

        .text
        /*
         * Whoever arrives at the landing page goes on here, whichever backend entered: no
         * register and no stack is to be trusted, so the entry in progress is found by FS.
         */
        .globl  entry_landed
        .hidden entry_landed
        .type   entry_landed, @function
        .align  16
entry_landed:
        endbr64
        mov     entry_current@gottpoff(%rip), %rax
        mov     %fs:(%rax), %rax
        test    %rax, %rax
        jz      1f
        mov     ENTRY_RSP(%rax), %rsp   /* at once: a signal wants a stack, and its page may come late */
        jmp     *ENTRY_LANDING(%rax)
1:      ud2                             /* nobody of this thread is in an enclave */
        .size entry_landed, . - entry_landed

        /* As glibc's: debuggers and unwinders know a signal frame by these bytes. */
        .globl  signals_restorer
        .hidden signals_restorer
        .type   signals_restorer, @function
        .align  16
        nop
signals_restorer:
        mov     $15, %rax
        syscall
        .size signals_restorer, . - signals_restorer

        .section .note.GNU-stack, "", @progbits
