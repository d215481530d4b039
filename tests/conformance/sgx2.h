/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The SGX2 calls, on either backend: the driver's ioctls, or the sim's model of them.
 * The arguments are the ioctls' (uapi asm/sgx.h).
 */
#ifndef CONFORMANCE_SGX2_H
#define CONFORMANCE_SGX2_H

#include "teemate.h"

int sgx2_restrict(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t permissions,
                  uint64_t *result, uint64_t *count);
int sgx2_types(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t type, uint64_t *result,
               uint64_t *count);
int sgx2_remove(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t *count);

#endif
