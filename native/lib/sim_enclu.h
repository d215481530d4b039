/* SPDX-License-Identifier: Apache-2.0 */
/* The leaves of ENCLU that the sim performs in C (sim_enclu.c dispatches). */
#ifndef TEEMATE_SIM_ENCLU_H
#define TEEMATE_SIM_ENCLU_H

#include <stddef.h>

#include "sim.h"

/* Each returns 0, or 1 with *fault filled; see sim_enclu. */
int sim_ereport(struct teemate_enclave *enclave, struct sim_leaf_regs *regs, struct sim_fault *fault);
int sim_egetkey(struct teemate_enclave *enclave, struct sim_leaf_regs *regs, struct sim_fault *fault);
int sim_eaccept(struct teemate_enclave *enclave, struct sim_leaf_regs *regs, struct sim_fault *fault);
int sim_emodpe(struct teemate_enclave *enclave, struct sim_leaf_regs *regs, struct sim_fault *fault);
int sim_eacceptcopy(struct teemate_enclave *enclave, struct sim_leaf_regs *regs, struct sim_fault *fault);

/* Fills *fault with #GP(0) and returns 1. */
int sim_gp(struct sim_fault *fault);
/* Sets RAX and the flags as leaves with a return code do, and returns 0. */
int sim_result(struct sim_leaf_regs *regs, enum sgx_error code);
/* Is [addr, addr + length) in ELRANGE? */
bool sim_in_elrange(const struct teemate_enclave *enclave, uint64_t addr, uint64_t length);
bool sim_all_zero(const void *data, size_t length);

#endif
