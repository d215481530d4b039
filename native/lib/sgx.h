/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sgx backend: Linux's driver and the vDSO.
 *
 *   sgx_backend.c  the table of calls; is it here?
 *   sgx_build.c    ECREATE, EADD, EINIT through sgx_driver.c
 *   sgx_map.c      somebody else's enclave; mappings within the pages' permissions
 *   sgx_enter.c    entering; see sgx_enter.h
 */
#ifndef TEEMATE_SGX_H
#define TEEMATE_SGX_H

#include "enclave.h"
#include "sgx_enter.h"

/* sgx_build.c; `struct backend`. */
int sgx_create(struct teemate_enclave *enclave, const struct create_params *params, struct teemate_diag *diag);
int sgx_add_pages(struct teemate_enclave *enclave, uint64_t offset, const void *data, uint64_t size,
                  uint64_t secinfo_flags, bool measured, bool partly, struct teemate_diag *diag);
int sgx_init(struct teemate_enclave *enclave, const struct sgx_sigstruct *sigstruct, const uint8_t mrenclave[32],
             struct teemate_diag *diag);
/*
 * Open /dev/sgx_enclave: an enclave of its own, empty.  The fd is the caller's.
 * Fails with -ENODEV or -EACCES, and the diag says what to do.
 */
int sgx_device_open(struct teemate_diag *diag);

/* sgx_map.c */
int sgx_open(struct teemate_enclave *enclave, struct teemate_diag *diag);
/* 0, or -EACCES when this process has a personality with which Linux lets nobody map an enclave. */
int sgx_may_map(struct teemate_diag *diag);
int sgx_map(struct teemate_enclave *enclave, struct teemate_diag *diag);
int sgx_map_tcs(struct teemate_enclave *enclave, uint64_t offset, struct teemate_diag *diag);
int sgx_unmap_tcs(struct teemate_enclave *enclave, uint64_t offset);
/* These pages were regular ones and are TCSs now: sgx_map_tcs takes them.  -ENOMEM. */
int sgx_made_tcs(struct teemate_enclave *enclave, uint64_t offset, uint64_t size);
void sgx_forget_tcs(struct teemate_enclave *enclave);

#endif
