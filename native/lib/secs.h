/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TEEMATE_SECS_H
#define TEEMATE_SECS_H

#include "enclave.h"

/* What a processor takes: CPUID leaf 12H, or what the sim makes of it. */
struct secs_limits {
    uint64_t size_max;
    uint64_t attributes;
    uint64_t xfrm;
    uint32_t miscselect;
};

/* SDM volume 3D, ECREATE: the checks of SECS.  NULL, or what is wrong. */
const char *secs_fault(const struct create_params *params, const struct secs_limits *limits);

/*
 * SDM volume 3D, EINIT: why it refuses an enclave of these attributes (without INIT) and
 * MISCSELECT; 0 when it does not.  Fills the diag with the SGX error code and the field's
 * offset, and returns -EBADMSG, -EKEYREJECTED, -EKEYEXPIRED or -EACCES (sim_einit.c).
 */
int einit_refusal(const struct sgx_attributes *attributes, uint32_t miscselect,
                  const struct sgx_sigstruct *sigstruct, const uint8_t mrenclave[32], struct teemate_diag *diag);

/* What Linux gives without /dev/sgx_provision (SGX_ATTR_UNPRIV_MASK). */
#define SGX_ATTR_UNPRIVILEGED (SGX_ATTR_DEBUG | SGX_ATTR_MODE64BIT | SGX_ATTR_KSS)

#endif
