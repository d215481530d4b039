/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One thread's entries into sim enclaves.
 *
 *   enter.c       teemate_enter
 *   sim_enter.c   the checks and commits of EENTER and ERESUME
 *   sim_entry.S   the instructions: into the enclave, the AEP, the ways out
 *   sim_aex.c     ENCLU and exceptions inside, found by signals.c
 *   sim_block.c   this structure's life; thread.c has what both backends share
 */
#ifndef TEEMATE_SIM_THREAD_H
#define TEEMATE_SIM_THREAD_H

#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "enclave.h"
#include "sgx_arch.h"
#include "sim.h"
#include "sim_offsets.h"
#include "teemate.h"
#include "thread.h"

#define SIM_THREAD_MAGIC 0x64616572687473ull

/*
 * [guard page][header: struct sim_thread and its XSAVE area][alternate stack].
 * The stack's size is odd enough that a foreign one of equal size is unlikely; who
 * finds it in a ucontext may look at the header below it.
 */
#define SIM_HEADER_PAGES 8u
#define SIM_STACK_SIZE (96u * 1024u - 208u)
#define SIM_BLOCK_SIZE ((1u + SIM_HEADER_PAGES) * SGX_PAGE + 96u * 1024u)
#define SIM_XSAVE_MAX (6u * SGX_PAGE)

/* The kernel's stack_t and sigset. */
struct sim_host {
    uint64_t mask;
    stack_t stack;
};

struct sim_thread {
    uint64_t magic;
    struct sim_thread *self;
    /* Read and written by sim_entry.S, offsets in sim_offsets.h. */
    _Atomic uint32_t inside; /* enclave mode, unless RIP is in sim_entry.S's critical region */
    uint32_t no_fsgsbase;    /* the kernel wants arch_prctl instead of WRFSBASE */
    uint64_t enclave_fs;
    uint64_t enclave_gs;
    uint64_t tcs_addr; /* RBX */
    uint32_t cssa;     /* index of the frame that an AEX fills */
    uint32_t handling; /* our signal handler works for a thread inside; a fault now is the handler's */
    uint64_t xfrm;
    uint64_t xsave; /* address of the XSAVE area, 64-byte aligned */
    uint64_t host_fs;
    uint64_t host_gs;
    uint32_t host_tf;
    uint32_t tid;
    struct sim_tcs *tcs;
    uint64_t word; /* of the TCS while we are inside */
    uint8_t *ssa;  /* the frame cssa in the view */
    uint32_t ssa_size;
    uint32_t padding;
    uint64_t frame[5];   /* for IRETQ: RIP, CS, RFLAGS, RSP, SS */
    struct sgx_gprs gprs; /* what ERESUME loads */
    struct teemate_enclave *enclave;
    struct entry *entry;
    struct sim_host host;
    struct thread *owner;
};

/* Whatever the build's flags: a lazily bound call would run the dynamic linker with the enclave's FS. */
#pragma GCC visibility push(hidden)

/* sim_entry.S */
int sim_trampoline(struct sim_thread *thread, struct entry *entry);
void sim_landed(void);
extern const char sim_region_start[], sim_region_end[];
extern const char sim_exit[], sim_aep[], sim_exception[], sim_paused[];

/* sim_block.c: this thread's block, made on first use; NULL when memory is short. */
struct sim_thread *sim_thread_get(void);

/* sim_enter.c */
int sim_enter(struct teemate_enclave *enclave, uint64_t tcs_offset, struct teemate_regs *regs, uint32_t function,
              uint64_t pause_after_ns, enum entry_stack stack, struct sgx_enclave_run *run);
int sim_go(struct sim_thread *thread, struct entry *entry);
bool sim_canonical(uint64_t address);
/* What the operating system lets us save and restore, XCR0; 0 when that is nothing (no XSAVE). */
uint64_t sim_xcr0(void);
/* Before an enclave with these components is entered. */
void sim_xsave_prepare(uint64_t xfrm);
/* Bytes of the XSAVE area (standard form) for these components. */
uint32_t sim_xsave_size(uint64_t xfrm);
/* Copy the components in `xfrm` of one XSAVE area to another. */
void sim_xsave_copy(uint8_t *to, const uint8_t *from, uint64_t xfrm);

/* sim_aex.c: a signal while inside.  Changes the context to where the thread goes on. */
void sim_inside(struct sim_thread *thread, int sig, siginfo_t *info, void *context);

#pragma GCC visibility pop

#endif
