/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Entering through the vDSO.
 *
 *   sgx_vdso.c    the kernel's function in this process
 *   sgx_stack.c   host stacks that belong to a TCS
 *   sgx_entry.S   into the vDSO's function and out of it
 *   sgx_enter.c   teemate_enter for the sgx backend; ticks and memory errors
 */
#ifndef TEEMATE_SGX_ENTER_H
#define TEEMATE_SGX_ENTER_H

#include <stdatomic.h>
#include <ucontext.h>

#include "enclave.h"
#include "thread.h"

/* sgx_vdso.c: __vdso_sgx_enter_enclave of this process, or NULL.  Looked up once. */
void *sgx_vdso_function(void);
/* The address of its ENCLU, which is also its AEP; 0 when there is none. */
uint64_t sgx_vdso_enclu(void);

/* A host stack for entries through one TCS. */
struct sgx_stack {
    struct sgx_stack *next;
    uint64_t tcs_offset;
    uint64_t top;
    _Atomic bool taken;         /* an entry stands on it */
    _Atomic uint64_t interrupted; /* 0, or a number that grows: the last entry was left inside */
};

/*
 * sgx_stack.c: a stack for an entry with `function`, NULL when memory is short.  One that was
 * given back with `interrupted` is the next ERESUME's.  Costs no system call but the first time.
 */
struct sgx_stack *sgx_stack_take(struct teemate_enclave *enclave, uint64_t tcs_offset, uint32_t function);
void sgx_stack_give(struct sgx_stack *stack, bool interrupted);
/* When the enclave is closed, in a child of fork too. */
void sgx_stacks_free(struct teemate_enclave *enclave);

/*
 * `struct backend`.  A memory error while inside (SIGBUS) is reported as exception 18 (#MC),
 * which the vDSO does not know.
 */
int sgx_enter(struct teemate_enclave *enclave, uint64_t tcs_offset, struct teemate_regs *regs, uint32_t function,
              uint64_t pause_after_ns, enum entry_stack stack, struct sgx_enclave_run *run);

#pragma GCC visibility push(hidden)

/* sgx_entry.S */
int sgx_trampoline(struct entry *entry);
void sgx_landed(void);
void sgx_recovered(void);
int sgx_user_handler(void);
/* sgx_enter.c: what sgx_user_handler does in C. */
int sgx_run_handler(struct entry *entry, uint64_t rsp);

/* From signals.c, with FS the host's. */
void sgx_on_tick(ucontext_t *context);
/* True when the signal was of an entry in progress, which then returns. */
bool sgx_on_memory_error(const siginfo_t *info, ucontext_t *context);

#pragma GCC visibility pop

#endif
