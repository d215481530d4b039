/* SPDX-License-Identifier: Apache-2.0 */
/* Private enclaves: this process is their warden (the public side is in teemate.h). */
#ifndef TEEMATE_PRIVATE_H
#define TEEMATE_PRIVATE_H

#include "enclave.h"

/*
 * Tell the enclave the time when its image wants that and the last time was told
 * more than 100 ms ago.  0 also when another thread is doing so; fails with
 * -EIO when the enclave refuses, or with the errno of the entry.
 */
int private_tick(struct teemate_enclave *enclave);

/*
 * TM_OCALL_FILE: the request of `length` bytes in `buffer` (SLOT_OCALL_CAPACITY bytes), where its answer of
 * *answer bytes goes.  Returns 0, or TM_E_OCALL when it is none, or the enclave has no storage here.
 */
int32_t private_file(struct teemate_enclave *enclave, uint8_t *buffer, uint64_t length, uint64_t *answer);

/* Forget the keys and unmap the warden's TCSs; called by teemate_close. */
void private_end(struct teemate_enclave *enclave);

#endif
