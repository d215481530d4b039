/* A user handler (run->user_handler) that keeps what an enclave left in registers. */
        .text
        .globl  keep_registers
        .type   keep_registers, @function
keep_registers:
        pushq   %rax
        movq    left_registers@GOTPCREL(%rip), %rax
        movq    %rbx, 0(%rax)
        movq    %r9, 8(%rax)
        movq    %r10, 16(%rax)
        movq    %r11, 24(%rax)
        movq    %r12, 32(%rax)
        movq    %r13, 40(%rax)
        movq    %r14, 48(%rax)
        movq    %r15, 56(%rax)
        fxsave64 64(%rax)
        movq    %rsi, 576(%rax)
        popq    %rax
        xorl    %eax, %eax              /* back to the caller of the enclave */
        ret

/*
 * int enter_by(function of the vDSO, run, rsi, key of 16 bytes, rdi): EENTER with the key in R12:R13.
 */
        .globl  enter_by
        .type   enter_by, @function
enter_by:
        pushq   %rbp
        movq    %rsp, %rbp
        pushq   %rbx
        pushq   %r12
        pushq   %r13
        pushq   %r14
        pushq   %r15
        pushq   %rsi                    /* the seventh argument */
        movq    %rdi, %rax
        movq    %rdx, %rsi
        movq    0(%rcx), %r12
        movq    8(%rcx), %r13
        movq    %r8, %rdi
        xorl    %edx, %edx
        xorl    %r8d, %r8d
        xorl    %r9d, %r9d
        movl    $2, %ecx
        call    *%rax
        addq    $8, %rsp
        popq    %r15
        popq    %r14
        popq    %r13
        popq    %r12
        popq    %rbx
        popq    %rbp
        ret

        .bss
        .balign 64
        .globl  left_registers
        .type   left_registers, @object
        .size   left_registers, 584
left_registers:
        .zero   584
        .section .note.GNU-stack, "", @progbits
