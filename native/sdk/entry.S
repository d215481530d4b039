/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gate: the only code that runs before somebody has shown a key.
 *
 * At entry (SDM, EENTER): RAX = CSSA, RBX = TCS, RCX = the way out, FS = thread
 * data, everything else is the caller's.  Until a key has matched nothing
 * outside of ELRANGE is read or written, RSP is not used, and no branch depends
 * on anything but the outcome of a comparison as a whole.
 *
 * Order against revocation (control.c, CLEAR): load the slot word, compare,
 * then swap the same word to INSIDE; CLEAR changes the word before it wipes the
 * key, so exactly one of the two wins.
 *
 * One entry's frame, at the top of its stack, 32 bytes:
 *   0, 8  scratch   16  GPRSGX of this entry's SSA frame   24  way out
 * The caller's RSP and RBP are taken from that GPRSGX at the exit, since ERESUME renews
 * them there.
 */
#include "thread.h"

#define SEL_OCALL_RETURN 1
#define SEL_CONTROL 16
#define SEL_UNWIND 17
#define SEL_IO 18
#define SLOT_ARMED 1
#define SLOT_PARKED 3
#define EXIT_OCALL 1
#define EXIT_UNWOUND 2
#define EXIT_INTERRUPTED 3
#define EEXIT 4
#define GPRS_SIZE 184
#define GPRS_R14 112
#define GPRS_R15 120
#define GPRS_RFLAGS 128
#define GPRS_RIP 136
#define GPRS_URSP 144
#define GPRS_URBP 152
#define GPRS_EXITINFO 160
#define GPRS_FSBASE 168
#define GPRS_GSBASE 176
#define XSAVE_MXCSR 24
#define XSAVE_STATE 512                 /* XSTATE_BV (SDM volume 1, 13.4) */

        /* R15 := GPRSGX of our SSA frame number RAX; changes RBX and R10. */
        .macro  own_gprs
        leaq    __tm_base(%rip), %rbx
        movl    HEADER_NSSA(%rbx), %r15d
        imulq   %fs:TD_INDEX, %r15
        leaq    1(%r15, %rax), %r15
        movl    HEADER_SSA_FRAME_SIZE(%rbx), %r10d
        imulq   %r10, %r15
        addq    HEADER_SSA_OFFSET(%rbx), %r15
        leaq    -GPRS_SIZE(%rbx, %r15), %r15
        .endm

        /*
         * The SSA frame of R14 bytes at RDI goes to tm_gate_reset when it is resumed, with R13
         * for its FS and GS.  What it was interrupted by and where stays to be told: EXITINFO, and
         * RIP as R14.  RDI moves on to the next; changes RAX, RCX, RDX, R11 and R15.  No stack:
         * another process may finish it (see .Lunwind), or begin again, so RIP comes last.
         */
        .macro  reset_frame
#ifndef TM_TEST_NO_UNWIND
        leaq    -GPRS_SIZE(%rdi, %r14), %r15
        leaq    tm_gate_reset(%rip), %rax
        movq    GPRS_RIP(%r15), %rdx
        cmpq    %rax, %rdx
        je      8f
        movl    GPRS_EXITINFO(%r15), %r11d
        xorl    %eax, %eax
        movq    %r14, %rcx
        shrq    $3, %rcx
        rep stosq
        movq    %rdi, %rax
        subq    %r14, %rax
        movw    $0x37f, (%rax)          /* FCW */
        movl    $0x1f80, XSAVE_MXCSR(%rax)
        movq    $3, XSAVE_STATE(%rax)   /* x87 and SSE, as they stand there */
        movq    %rdx, GPRS_R14(%r15)
        movl    %r11d, GPRS_EXITINFO(%r15)
        movq    %r15, GPRS_R15(%r15)
        movq    $0x202, GPRS_RFLAGS(%r15)
        movq    %r13, GPRS_FSBASE(%r15)
        movq    %r13, GPRS_GSBASE(%r15)
        leaq    tm_gate_reset(%rip), %rax
        movq    %rax, GPRS_RIP(%r15)
        jmp     9f
8:      addq    %r14, %rdi
9:
#else
        /* Test build: frames stay as they are. */
        addq    %r14, %rdi
#endif
        .endm

        .section .text.tm_entry, "ax", @progbits
        .globl  tm_entry
        .type   tm_entry, @function
        .balign 64
tm_entry:
        cld
        movq    %fs:TD_WORD, %r10
        movq    %r12, %r11
        xorq    %fs:TD_KEY, %r11
        movq    %r13, %r14
        xorq    %fs:TD_KEY + 8, %r14
        orq     %r14, %r11
#ifdef TM_TEST_NO_GATE
        /* Test build: whatever key is shown opens the slot. */
        cmpq    $SEL_CONTROL, %rdi
        je      .Lnot_slot
        xorl    %r11d, %r11d
#endif
        testq   %r11, %r11
        jnz     .Lnot_slot

        /* A slot's key (or zeros against zeros: then the state is FREE). */
        xorl    %r12d, %r12d
        xorl    %r13d, %r13d
        testl   %eax, %eax
        jnz     .Linterrupted           /* CSSA >= 1 is for the control key alone */
        cmpb    $SLOT_ARMED, %r10b
        jne     .Lperhaps_parked
        cmpq    $SEL_OCALL_RETURN, %rdi
        je      .Lrefuse_call           /* no OCALL is under way */
        leaq    1(%r10), %r14           /* ARMED + 1 = INSIDE */
        movq    %r10, %rax
        lock cmpxchgq %r14, %fs:TD_WORD
        jne     .Lrefuse_call
        xorl    %eax, %eax
        own_gprs
        leaq    (%rbx), %r14
        addq    %fs:TD_STACK_TOP, %r14
        movq    %rcx, -8(%r14)
        movq    %r15, -16(%r14)
        leaq    -32(%r14), %rsp
        pushq   $2                      /* AC, DF, TF and the rest of the flags */
        popfq
        fninit
        ldmxcsr .Lmxcsr(%rip)
        xorl    %ebx, %ebx
        xorl    %ebp, %ebp
        call    tm_gate_client          /* (selector, argument) */
tm_gate_leave:                          /* for who looks where a thread is: the way out, up to the next label */
        movq    %rax, %rsi              /* status; RDX is the length */

        /* INSIDE - 1 = ARMED, unless the slot was cleared meanwhile. */
        movq    %fs:TD_WORD, %rax
        testb   %al, %al
        js      .Lcleared
        leaq    -1(%rax), %r10
        lock cmpxchgq %r10, %fs:TD_WORD
        jne     .Lcleared
.Ldone:
        xorl    %edi, %edi              /* TM_EXIT_DONE */
        xorl    %r8d, %r8d
.Lleave:
        movq    24(%rsp), %rbx
        movq    16(%rsp), %r15
        /*
         * The only exit: to RBX, with R15 the GPRSGX of this entry.  The RSP and RBP there are of
         * whoever runs this by now: a paused call goes on from another frame, and in a slot that is
         * repaired another process may have resumed what this one began.  What follows needs them, if
         * only for the frame of a signal that comes at once.  An interrupt in here may change them
         * again, so they are taken last.
         */
.Lexit:
#ifndef TM_TEST_NO_SCRUB
        fxrstor64 .Lclean(%rip)         /* x87, XMM, MXCSR */
        xorl    %r9d, %r9d
        xorl    %r10d, %r10d
        xorl    %r11d, %r11d
        xorl    %r12d, %r12d
        xorl    %r13d, %r13d
        xorl    %r14d, %r14d
#endif
        xorl    %ecx, %ecx
        movl    $EEXIT - 1, %eax
        addl    $1, %eax                /* 4: clears CF, PF, AF, ZF, SF and OF */
        movq    GPRS_URBP(%r15), %rbp
        movq    GPRS_URSP(%r15), %rsp
#ifndef TM_TEST_NO_SCRUB
        movl    $0, %r15d
#endif
        enclu
        ud2

        /* Revoked while inside: the call is over, its result is nobody's. */
.Lcleared:
        lock andq $-256, %fs:TD_WORD    /* FREE */
tm_gate_turned_away:
.Lrefuse_call:                          /* at CSSA 0 */
        xorl    %eax, %eax
.Lrefuse:                               /* RAX is CSSA */
        xorl    %edi, %edi
        xorl    %esi, %esi
.Lrefused:
        own_gprs
.Lland:                                 /* RBX is the base */
        addq    HEADER_SIZE(%rbx), %rbx /* the landing page */
        xorl    %edx, %edx
        xorl    %r8d, %r8d
        jmp     .Lexit

        /* Who has the key hears that it still fits: the call in there is its own, and was interrupted. */
.Linterrupted:
        movl    $EXIT_INTERRUPTED, %edi
        xorl    %esi, %esi
        jmp     .Lrefused

        /* Parked in an OCALL: only its return, with its nonce. */
.Lperhaps_parked:
        cmpb    $SLOT_PARKED, %r10b
        jne     .Lrefuse_call
        cmpq    $SEL_OCALL_RETURN, %rdi
        jne     .Lrefuse_call
        cmpq    %fs:TD_NONCE, %rsi
        jne     .Lrefuse_call
        leaq    -1(%r10), %r14          /* PARKED - 1 = INSIDE */
        movq    %r10, %rax
        lock cmpxchgq %r14, %fs:TD_WORD
        jne     .Lrefuse_call
        xorl    %eax, %eax
        own_gprs
        leaq    (%rbx), %r14
        addq    %fs:TD_STACK_TOP, %r14
        movq    %rcx, -8(%r14)
        movq    %r15, -16(%r14)
        movq    $0, %fs:TD_NONCE
        movq    %fs:TD_SAVED_RSP, %rsp
        pushq   $2
        popfq
        fninit
        ldmxcsr .Lmxcsr(%rip)
        movq    %rdx, %rax              /* status */
        movq    %r8, %rdx               /* length of the answer, unchecked */
        popq    %r15
        popq    %r14
        popq    %r13
        popq    %r12
        popq    %rbx
        popq    %rbp
        ret

        /* The control key, or the very first entry. */
.Lnot_slot:
        movl    tm_control_state(%rip), %r10d
        testl   %r10d, %r10d
        jz      .Lfirst
        movq    %r12, %r11
        xorq    tm_control_key(%rip), %r11
        movq    %r13, %r14
        xorq    tm_control_key + 8(%rip), %r14
        orq     %r14, %r11
#ifdef TM_TEST_NO_GATE
        xorl    %r11d, %r11d
#endif
        testq   %r11, %r11
        jnz     .Lrefuse_wipe
        cmpq    $SEL_UNWIND, %rdi
        je      .Lunwind
        cmpq    $SEL_IO, %rdi
        je      .Lio
.Lfirst:                                /* no key yet: tm_gate_control takes SET_KEY only */
        cmpq    $SEL_CONTROL, %rdi
        jne     .Lrefuse_wipe
        movq    %rsi, %rdi              /* struct tm_control */
        movl    %eax, %esi              /* CSSA */
        movq    %r12, %rdx
        movq    %r13, %r8
        xorl    %r12d, %r12d
        xorl    %r13d, %r13d
        /*
         * A warden's TCS that nobody was interrupted on has its own stack.  All
         * other control entries share one that no slot uses: there is one warden.
         */
        leaq    tm_gate_control(%rip), %r9
        testl   %eax, %eax
        jnz     .Lcontrol_stack
        cmpq    $TM_WARDEN_TCS, %fs:TD_INDEX
        jae     .Lcontrol_stack
.Lown_stack:
        leaq    __tm_base(%rip), %r14
        addq    %fs:TD_STACK_TOP, %r14
        jmp     .Lcontrol
        /* The warden's I/O thread: on an I/O slot, beside whatever control ECALL is under way. */
.Lio:
        testl   %eax, %eax
        jnz     .Lrefuse_wipe
        leaq    __tm_base(%rip), %rbx
        movl    HEADER_IO_SLOTS(%rbx), %r10d
        movq    %fs:TD_INDEX, %r11
        subq    $TM_WARDEN_TCS, %r11
        cmpq    %r10, %r11
        jae     .Lrefuse_wipe
        movq    %rsi, %rdi              /* struct tm_io_step */
        xorl    %r12d, %r12d
        xorl    %r13d, %r13d
        leaq    tm_gate_io(%rip), %r9
        jmp     .Lown_stack
.Lcontrol_stack:
        leaq    tm_control_stack + CONTROL_STACK_SIZE(%rip), %r14
.Lcontrol:
        own_gprs
        movq    %rcx, -8(%r14)
        movq    %r15, -16(%r14)
        leaq    -32(%r14), %rsp
        pushq   $2
        popfq
        fninit
        ldmxcsr .Lmxcsr(%rip)
        /* The first control entry of a thread gives it its canary. */
        cmpq    $0, %fs:TD_CANARY
        jne     2f
1:      rdrand  %r10
        jnc     1b
        movq    %r10, %fs:TD_CANARY
2:      movq    %r8, %rcx
        xorl    %ebx, %ebx
        xorl    %ebp, %ebp
        call    *%r9                    /* tm_gate_control(request, CSSA, key, key), tm_gate_io(step) */
        movq    %rax, %rsi
        jmp     .Ldone
        /*
         * The warden looks at a client's slot through its own TCS, and undoes what was
         * interrupted there: RSI is the generation whose frames are to go, or 0 to look only.
         * While it is inside nobody can resume.  But at each interrupt of its own the TCS is
         * idle, and the thread of a living holder, at its AEP, resumes the warden's frame in its
         * own process.  So all of this can be finished by anybody: it uses no stack and no
         * memory outside, and leaves to the landing page, never to where the warden came from.
         */
.Lunwind:
        movl    %eax, %r12d             /* CSSA */
        xorl    %r13d, %r13d
        xorl    %r8d, %r8d
        movq    %fs:TD_WORD, %r10
        testq   %rsi, %rsi
        jz      .Lunwound
        cmpq    $TM_WARDEN_TCS, %fs:TD_INDEX
        jb      .Lunwound               /* these have REWRITE */
        movq    %r10, %rax
        shrq    $8, %rax
        cmpq    %rax, %rsi
        jne     .Lunwound               /* it has another holder by now */
        testb   %r10b, %r10b
        js      1f                      /* cleared while in use */
        jnz     .Lunwound               /* its key opens it */
1:      leaq    __tm_base(%rip), %rbx
        movl    HEADER_SSA_FRAME_SIZE(%rbx), %r14d
        movl    HEADER_NSSA(%rbx), %edi
        imulq   %fs:TD_INDEX, %rdi
        imulq   %r14, %rdi
        addq    HEADER_SSA_OFFSET(%rbx), %rdi
        addq    %rbx, %rdi
        movq    %fs:TD_SELF, %r13
        addq    %rbx, %r13
        movl    %r12d, %r9d
2:      testl   %r9d, %r9d
        jz      3f
        reset_frame
        decl    %r9d
        jmp     2b
        /* Nothing of the call is left: no key opens it, and RESET may have it. */
3:      movq    %r10, %rax
        movq    %r10, %r11
        andq    $-256, %r11             /* FREE */
        lock cmpxchgq %r11, %fs:TD_WORD
        sete    %r8b
.Lunwound:
        movq    %r10, %rdx              /* the slot word as it was */
        movl    %r12d, %eax
        own_gprs
        addq    HEADER_SIZE(%rbx), %rbx /* the landing page */
        movl    %r12d, %esi
        movl    $EXIT_UNWOUND, %edi     /* R8 tells whether it was done */
        jmp     .Lexit
.Lrefuse_wipe:
        xorl    %r12d, %r12d
        xorl    %r13d, %r13d
        jmp     .Lrefuse
        .size   tm_entry, . - tm_entry

/*
 * struct ocall_answer tm_gate_ocall(kind, length, nonce): leave with an OCALL.
 * Comes back through .Lperhaps_parked above.
 */
        .globl  tm_gate_ocall
        .hidden tm_gate_ocall
        .type   tm_gate_ocall, @function
        .balign 16
tm_gate_ocall:
        pushq   %rbp
        pushq   %rbx
        pushq   %r12
        pushq   %r13
        pushq   %r14
        pushq   %r15
        movq    %rsp, %fs:TD_SAVED_RSP
        movq    %rdx, %r8
        movq    %rdx, %fs:TD_NONCE
        movq    %rsi, %rdx
        movq    %rdi, %rsi
        movl    $EXIT_OCALL, %edi
        leaq    __tm_base(%rip), %r14
        addq    %fs:TD_STACK_TOP, %r14
        leaq    -32(%r14), %rsp
        /* Parked from here on.  A cleared slot stays cleared and parked. */
        movl    $1, %eax
        lock xaddq %rax, %fs:TD_WORD
        testb   %al, %al
        jns     .Lleave
        jmp     .Lrefuse_call
        .size   tm_gate_ocall, . - tm_gate_ocall

/*
 * Where an SSA frame goes that the warden has rewritten: R15 is its GPRSGX,
 * where ERESUME has put the resumer's RSP and RBP.
 */
        .globl  tm_gate_reset
        .hidden tm_gate_reset
        .type   tm_gate_reset, @function
        .balign 16
tm_gate_reset:
        leaq    __tm_base(%rip), %rbx
        xorl    %edi, %edi
        xorl    %esi, %esi
        jmp     .Lland
        .size   tm_gate_reset, . - tm_gate_reset

        /*
         * void tm_gate_rewrite(frames, count, frame size, thread): the same to a TCS that cannot
         * be entered any more, by whoever came in through another.
         */
        .globl  tm_gate_rewrite
        .hidden tm_gate_rewrite
        .type   tm_gate_rewrite, @function
        .balign 16
tm_gate_rewrite:
        pushq   %r13
        pushq   %r14
        pushq   %r15
        movq    %rdx, %r14
        movq    %rcx, %r13
1:      testq   %rsi, %rsi
        jz      2f
        reset_frame
        decq    %rsi
        jmp     1b
2:      popq    %r15
        popq    %r14
        popq    %r13
        ret
        .size   tm_gate_rewrite, . - tm_gate_rewrite

        .section .rodata.gate, "a", @progbits
        .balign 64
        /* FXSAVE image (SDM volume 1, 10.5.1): FCW 0x37f, MXCSR 0x1f80, the rest empty. */
.Lclean:
        .short  0x37f
        .fill   22, 1, 0
        .long   0x1f80
        .fill   484, 1, 0
.Lmxcsr:
        .long   0x1f80

        .section .bss.tm_control_stack, "aw", @nobits
        .balign 4096
        .globl  tm_control_stack
        .hidden tm_control_stack
tm_control_stack:
        .fill   CONTROL_STACK_SIZE, 1, 0

        .section .note.GNU-stack, "", @progbits
