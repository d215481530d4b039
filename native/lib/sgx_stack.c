/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Host stacks that belong to a TCS.
 *
 * An enclave that keeps RBP in a register comes back with that of its EENTER, and the
 * vDSO's function finds its frame by it.  A call that was paused goes on from wherever its
 * caller is then.  So the frame lies at the top of a stack that does not move; each entry
 * writes it anew.
 *
 * A TCS has one stack, unless it is entered while another entry of it stands in a user
 * handler, or by two threads at once.
 */
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "sgx_enter.h"

/* For the user handler and signal handlers without an alternate stack; untouched pages cost nothing. */
#define STACK_SIZE (256u * 1024u)
#define STACK_FLAGS (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK)

static struct sgx_stack *stack_new(struct teemate_enclave *enclave, uint64_t tcs_offset)
{
    struct sgx_stack *stack = calloc(1, sizeof(*stack));
    uint8_t *memory;

    if (!stack)
        return NULL;
    memory = mmap(NULL, SGX_PAGE + STACK_SIZE, PROT_READ | PROT_WRITE, STACK_FLAGS, -1, 0);
    if (memory == MAP_FAILED) {
        free(stack);
        return NULL;
    }
    if (mprotect(memory, SGX_PAGE, PROT_NONE)) {
        munmap(memory, SGX_PAGE + STACK_SIZE);
        free(stack);
        return NULL;
    }
    stack->tcs_offset = tcs_offset;
    stack->top = (uint64_t)(uintptr_t)(memory + SGX_PAGE + STACK_SIZE);
    atomic_init(&stack->taken, true);
    stack->next = atomic_load(&enclave->stacks);
    while (!atomic_compare_exchange_weak(&enclave->stacks, &stack->next, stack))
        ;
    return stack;
}

struct sgx_stack *sgx_stack_take(struct teemate_enclave *enclave, uint64_t tcs_offset, uint32_t function)
{
    struct sgx_stack *best = NULL;

    /* Two passes: the one that ERESUME goes on with, else any that is free. */
    for (struct sgx_stack *stack = atomic_load(&enclave->stacks); function == SGX_ERESUME && stack; stack = stack->next)
        if (stack->tcs_offset == tcs_offset && stack->interrupted && (!best || stack->interrupted > best->interrupted) &&
            !atomic_load(&stack->taken))
            best = stack;
    if (best && !atomic_exchange(&best->taken, true))
        return best;
    for (struct sgx_stack *stack = atomic_load(&enclave->stacks); stack; stack = stack->next)
        if (stack->tcs_offset == tcs_offset && !atomic_load(&stack->taken) && !atomic_exchange(&stack->taken, true))
            return stack;
    return stack_new(enclave, tcs_offset);
}

void sgx_stack_give(struct sgx_stack *stack, bool interrupted)
{
    static _Atomic uint64_t last;

    stack->interrupted = interrupted ? atomic_fetch_add(&last, 1) + 1 : 0;
    atomic_store(&stack->taken, false);
}

void sgx_stacks_free(struct teemate_enclave *enclave)
{
    struct sgx_stack *stack = atomic_exchange(&enclave->stacks, NULL);

    while (stack) {
        struct sgx_stack *next = stack->next;

        munmap((void *)(uintptr_t)(stack->top - STACK_SIZE - SGX_PAGE), SGX_PAGE + STACK_SIZE);
        free(stack);
        stack = next;
    }
}
