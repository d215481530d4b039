/* SPDX-License-Identifier: Apache-2.0 */
/* The test enclave's layout and its operations (EDI at entry). */
#ifndef TEST_ENCLAVE_H
#define TEST_ENCLAVE_H

#define BASE 0x400000000000
#define SIZE 0x200000
#define CODE 0x0
#define CODE_SIZE 0x4000
#define ENTRY 0x8
#define DATA 0x10000 /* read and write: 16 pages */
#define DATA_SIZE 0x10000
#define FSPAGE 0x20000
#define GSPAGE 0x21000
#define SSA 0x40000 /* 16 KiB for each TCS: NSSA frames */
#define SSA_STRIDE 0x4000
#define TCS 0x80000
#define TCS_COUNT 16
#define NSSA 3
#define UNMAPPED 0x100000 /* nothing was added there */

#define OP_NOTHING 0
#define OP_REGISTERS 1
#define OP_SPIN 2
#define OP_DIVIDE 3
#define OP_READ 4
#define OP_WRITE 5
#define OP_ILLEGAL 6
#define OP_ENTER_INSIDE 7
#define OP_COUNT 8
#define OP_INT3 9
#define OP_LANDING 10
#define OP_LEAF 11
#define OP_NONCANONICAL_EXIT 12
#define OP_FLAGS 13
#define OP_SIMD_FAULT 14
#define OP_X87_FAULT 15
#define OP_JUMP 16
#define OP_PATTERN 17
#define OP_GP 18
#define OP_PUSH 19
#define OP_SPIN_URSP 20

#endif
