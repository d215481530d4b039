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
        popq    %rax
        xorl    %eax, %eax              /* back to the caller of the enclave */
        ret

        .bss
        .balign 64
        .globl  left_registers
        .type   left_registers, @object
        .size   left_registers, 576
left_registers:
        .zero   576
        .section .note.GNU-stack, "", @progbits
