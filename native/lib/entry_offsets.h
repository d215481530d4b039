/* SPDX-License-Identifier: Apache-2.0 */
/* Where assembly finds the fields of struct entry; checked in thread.c. */
#ifndef TEEMATE_ENTRY_OFFSETS_H
#define TEEMATE_ENTRY_OFFSETS_H

#define ENTRY_RSP 0
#define ENTRY_RBP 8
#define ENTRY_REGS 16
#define ENTRY_RUN 24
#define ENTRY_TARGET 32
#define ENTRY_FUNCTION 40
#define ENTRY_ERROR 44
#define ENTRY_VECTOR 48
#define ENTRY_KEPT 52
#define ENTRY_ADDR 56
#define ENTRY_LANDING 64
#define ENTRY_STACK 72
#define ENTRY_FRAME 80
#define ENTRY_SSP 88
#define ENTRY_FLAGS 96
#define ENTRY_MXCSR 104
#define ENTRY_FCW 108

#define REGS_RDI 0
#define REGS_RSI 8
#define REGS_RDX 16
#define REGS_R8 24
#define REGS_R9 32
#define REGS_R12 40
#define REGS_R13 48

/* struct sgx_enclave_run */
#define RUN_FUNCTION 8
#define RUN_VECTOR 12
#define RUN_ERROR 14
#define RUN_ADDR 16
#define RUN_HANDLER 24

#endif
