/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The driver's SGX2 calls, on both backends.  The other side of each, EACCEPT, is the
 * enclave's own.
 *
 * Offsets are from the base; offset and length are whole pages.  All return 0 or a
 * negative errno; *count is the number of bytes done, also when they fail, and *result
 * the error code of the SGX instruction that refused (0: none did).
 *   -ENODEV   the processor has no SGX2          -EINVAL  range, permissions or type
 *   -EFAULT   there is no such page, or *result  -EPERM   see each
 *   -EBUSY    another caller kept the enclave or a page of it busy for a second
 *   -ENOTCONN in a child of fork
 * The driver gives EBUSY at once when somebody else, in whatever process, works on the
 * enclave, and EAGAIN when a page is just being swapped out: both are waited for here.
 */
#ifndef TEEMATE_SGX2_H
#define TEEMATE_SGX2_H

#include <stdint.h>

struct teemate_enclave;

/* Take permissions away (EMODPR): `permissions` are SGX_SECINFO_R, W and X that stay. */
int enclave_restrict_permissions(struct teemate_enclave *enclave, uint64_t offset, uint64_t length,
                                 uint64_t permissions, uint64_t *result, uint64_t *count);
/* SGX_PT_REG to SGX_PT_TCS (-EPERM: pages that were not added as RW), and both to SGX_PT_TRIM. */
int enclave_modify_types(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t type,
                         uint64_t *result, uint64_t *count);
/* Free pages that are SGX_PT_TRIM and accepted (-EPERM: others). */
int enclave_remove_pages(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t *count);

#endif
