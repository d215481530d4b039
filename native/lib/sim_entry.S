/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Into a sim enclave and out of it.  sim_trampoline keeps what the C ABI wants kept
 * and has the contract of the vDSO's __vdso_sgx_enter_enclave: the enclave may do
 * what it likes with the registers (RSP may be lower than it was; RBP must come back
 * only for a user handler to find what the enclave left on the stack).
 *
 * The ways out (SIGILL at EEXIT, an exception, a tick) arrive by sigreturn: the
 * handler has put back mask, alternate stack, FS and GS, and RIP is one of
 *   sim_exit       EEXIT went to the address after "ENCLU"
 *   sim_exception  RAX leaf, DI vector, SI error code, RDX address
 *   sim_aep        after a tick: signals have been delivered right here; resume
 *   sim_paused     after a tick that ends the call for now
 */
#include "sim_offsets.h"

/* Our frame, from RBP. */
#define F_ENTRY -48
#define F_THREAD -56
#define F_TARGET -64
#define F_MXCSR -72
#define F_FCW -68
#define F_FLAGS -80
#define F_FLAGS_IN -88
#define F_SIZE 56 /* below the five saved registers; keeps RSP 16-byte aligned */

#define LEAF_ERESUME 3
#define LEAF_EEXIT 4
#define TEEMATE_PAUSED 1
#define TEEMATE_LANDED 2

#define SYS_arch_prctl 158
#define ARCH_SET_FS 0x1002
#define ARCH_SET_GS 0x1001

        .text
        .globl sim_trampoline
        .hidden sim_trampoline
        .type sim_trampoline, @function
        .align 16
sim_trampoline:
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
        sub     $F_SIZE, %rsp
        mov     %rdi, F_THREAD(%rbp)
        mov     %rsi, F_ENTRY(%rbp)
        stmxcsr F_MXCSR(%rbp)
        fnstcw  F_FCW(%rbp)
        pushfq
        pop     %rax
        mov     %rax, F_FLAGS(%rbp)
        and     $~0x100, %rax           /* EENTER suppresses TF (SDM, EENTER) */
        mov     %rax, F_FLAGS_IN(%rbp)

        /* ENCLU[EENTER] or [ERESUME], by entry->function.  RSP is what the enclave gets. */
.Lgo:
        mov     F_ENTRY(%rbp), %rsi
        mov     F_THREAD(%rbp), %rdi
        mov     %rsp, ENTRY_RSP(%rsi)
        mov     %rbp, ENTRY_RBP(%rsi)
        mov     %rsp, %rbx
        sub     $128, %rsp
        and     $-16, %rsp
        call    sim_go
        mov     %rbx, %rsp
        mov     F_THREAD(%rbp), %r11
        mov     F_ENTRY(%rbp), %r10
        cmp     $SIM_GO_EENTER, %eax
        je      .Leenter
        cmp     $SIM_GO_ERESUME, %eax
        je      .Leresume
        cmp     $SIM_GO_FAULT, %eax
        jne     .Lout                   /* a negative errno */
        mov     ENTRY_FUNCTION(%r10), %eax
        mov     ENTRY_VECTOR(%r10), %edi
        mov     ENTRY_ERROR(%r10), %esi
        mov     ENTRY_ADDR(%r10), %rdx
        jmp     .Lreport

        /*
         * The critical region: the TCS is busy, the registers are half the host's and
         * half the enclave's.  A tick that finds RIP here returns and comes again.
         */
        .globl  sim_region_start
        .hidden sim_region_start
sim_region_start:
.Leenter:
        mov     ENTRY_TARGET(%r10), %rax
        mov     %rax, F_TARGET(%rbp)
        cmpl    $0, THREAD_NO_FSGSBASE(%r11)
        jne     .Leenter_prctl
        mov     THREAD_FS(%r11), %rax
        wrfsbase %rax
        mov     THREAD_GS(%r11), %rax
        wrgsbase %rax
.Leenter_based:
        movl    $1, THREAD_INSIDE(%r11)
        mov     ENTRY_REGS(%r10), %rcx
        mov     REGS_R12(%rcx), %r12
        mov     REGS_R13(%rcx), %r13
        movq    $0, REGS_R12(%rcx)
        movq    $0, REGS_R13(%rcx)
        mov     REGS_RDI(%rcx), %rdi
        mov     REGS_RSI(%rcx), %rsi
        mov     REGS_RDX(%rcx), %rdx
        mov     REGS_R8(%rcx), %r8
        mov     REGS_R9(%rcx), %r9
        mov     THREAD_TCS(%r11), %rbx
        mov     THREAD_CSSA(%r11), %eax
        lea     sim_exit(%rip), %rcx
        xor     %r10d, %r10d
        xor     %r11d, %r11d
        push    F_FLAGS_IN(%rbp)
        popfq
        jmp     *F_TARGET(%rbp)

.Leenter_prctl:
        call    .Lset_bases
        mov     F_THREAD(%rbp), %r11
        mov     F_ENTRY(%rbp), %r10
        jmp     .Leenter_based

.Leresume:
        cmpl    $0, THREAD_NO_FSGSBASE(%r11)
        jne     .Leresume_prctl
        mov     THREAD_FS(%r11), %rax
        wrfsbase %rax
        mov     THREAD_GS(%r11), %rax
        wrgsbase %rax
.Leresume_based:
        movl    $1, THREAD_INSIDE(%r11)
        mov     THREAD_XFRM(%r11), %rax
        mov     %rax, %rdx
        shr     $32, %rdx
        mov     THREAD_XSAVE(%r11), %rcx
        xrstor64 (%rcx)
        mov     THREAD_GPRS+0(%r11), %rax
        mov     THREAD_GPRS+8(%r11), %rcx
        mov     THREAD_GPRS+16(%r11), %rdx
        mov     THREAD_GPRS+24(%r11), %rbx
        mov     THREAD_GPRS+40(%r11), %rbp
        mov     THREAD_GPRS+48(%r11), %rsi
        mov     THREAD_GPRS+56(%r11), %rdi
        mov     THREAD_GPRS+64(%r11), %r8
        mov     THREAD_GPRS+72(%r11), %r9
        mov     THREAD_GPRS+80(%r11), %r10
        mov     THREAD_GPRS+96(%r11), %r12
        mov     THREAD_GPRS+104(%r11), %r13
        mov     THREAD_GPRS+112(%r11), %r14
        mov     THREAD_GPRS+120(%r11), %r15
        /*
         * RIP, RFLAGS and RSP at once.  IRETQ needs no stack of the enclave's (its red
         * zone stays as it was) and none of the kernel's frame formats that a crafted
         * sigreturn would; the frame lies in the thread's block.
         */
        lea     THREAD_FRAME(%r11), %rsp
        mov     THREAD_GPRS+88(%r11), %r11
        iretq

.Leresume_prctl:
        call    .Lset_bases
        mov     F_THREAD(%rbp), %r11
        jmp     .Leresume_based

.Lset_bases:
        mov     %r11, %rbx
        mov     THREAD_FS(%rbx), %rsi
        mov     $ARCH_SET_FS, %edi
        mov     $SYS_arch_prctl, %eax
        syscall
        mov     THREAD_GS(%rbx), %rsi
        mov     $ARCH_SET_GS, %edi
        mov     $SYS_arch_prctl, %eax
        syscall
        ret
        .globl  sim_region_end
        .hidden sim_region_end
sim_region_end:

        .globl  sim_exit
        .hidden sim_exit
sim_exit:
        endbr64
        /* Not by RBP: a call that was resumed from elsewhere has that of its EENTER. */
        mov     entry_current@gottpoff(%rip), %rax
        mov     %fs:(%rax), %rax
        cmp     ENTRY_RBP(%rax), %rbp
        je      1f
        mov     ENTRY_RBP(%rax), %rbp
        mov     ENTRY_RSP(%rax), %rsp
1:      mov     ENTRY_RUN(%rax), %rbx
        movl    $LEAF_EEXIT, RUN_FUNCTION(%rbx)
        jmp     .Lkeep

        .globl  sim_exception
        .hidden sim_exception
sim_exception:
        endbr64
.Lreport:
        mov     F_ENTRY(%rbp), %rcx
        mov     ENTRY_RUN(%rcx), %rbx
        mov     %eax, RUN_FUNCTION(%rbx)
        mov     %di, RUN_VECTOR(%rbx)
        mov     %si, RUN_ERROR(%rbx)
        mov     %rdx, RUN_ADDR(%rbx)
        mov     %rcx, %rax
.Lkeep:
        mov     ENTRY_REGS(%rax), %rcx
        mov     %rdi, REGS_RDI(%rcx)
        mov     %rsi, REGS_RSI(%rcx)
        mov     %rdx, REGS_RDX(%rcx)
        mov     %r8, REGS_R8(%rcx)
        mov     %r9, REGS_R9(%rcx)
        fninit
        fldcw   F_FCW(%rbp)
        ldmxcsr F_MXCSR(%rbp)
        cld
        cmpq    $0, RUN_HANDLER(%rbx)
        jne     .Lhandler
        xor     %eax, %eax

        /* EAX is the result. */
.Lout:
        lea     -40-F_SIZE(%rbp), %rsp
        push    F_FLAGS(%rbp)           /* DF and AC are the host's again */
        popfq
        lea     -40(%rbp), %rsp
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

        /*
         * handler(rdi, rsi, rdx, rsp, r8, r9, run): what the enclave left in the registers
         * and above its RSP is the handler's to see, so it runs below.  A positive result is
         * the next leaf to execute, with the stack pointer that the enclave left.
         */
.Lhandler:
        mov     %rsp, %rcx
        mov     %rsp, %r12
        sub     $128, %rsp
        and     $-16, %rsp
        push    %rbx
        push    %rbx
        push    F_FLAGS(%rbp)
        popfq
        call    *RUN_HANDLER(%rbx)
        mov     %r12, %rsp
        test    %eax, %eax
        jle     .Lout
        mov     F_ENTRY(%rbp), %rcx
        mov     %eax, ENTRY_FUNCTION(%rcx)
        jmp     .Lgo

        .globl  sim_aep
        .hidden sim_aep
sim_aep:
        endbr64
        fninit
        fldcw   F_FCW(%rbp)
        ldmxcsr F_MXCSR(%rbp)
        cld
        mov     F_ENTRY(%rbp), %rcx
        movl    $LEAF_ERESUME, ENTRY_FUNCTION(%rcx)
        jmp     .Lgo

        .globl  sim_paused
        .hidden sim_paused
sim_paused:
        endbr64
        mov     F_ENTRY(%rbp), %rcx
        mov     ENTRY_RUN(%rcx), %rbx
        movl    $LEAF_ERESUME, RUN_FUNCTION(%rbx)
        fninit
        fldcw   F_FCW(%rbp)
        ldmxcsr F_MXCSR(%rbp)
        mov     $TEEMATE_PAUSED, %eax
        jmp     .Lout

        /* From the landing page: RAX is the entry, no other register and no stack to be trusted. */
        .globl  sim_landed
        .hidden sim_landed
sim_landed:
        endbr64
        mov     ENTRY_RBP(%rax), %rbp
        mov     ENTRY_RUN(%rax), %rbx
        mov     ENTRY_REGS(%rax), %rcx
        mov     %rdi, REGS_RDI(%rcx)
        mov     %rsi, REGS_RSI(%rcx)
        mov     %rdx, REGS_RDX(%rcx)
        mov     %r8, REGS_R8(%rcx)
        mov     %r9, REGS_R9(%rcx)
        lea     -40-F_SIZE(%rbp), %rsp
        movl    $LEAF_EEXIT, RUN_FUNCTION(%rbx)
        fninit
        fldcw   F_FCW(%rbp)
        ldmxcsr F_MXCSR(%rbp)
        mov     $TEEMATE_LANDED, %eax
        jmp     .Lout
        .cfi_endproc
        .size sim_trampoline, . - sim_trampoline

        .section .note.GNU-stack, "", @progbits
