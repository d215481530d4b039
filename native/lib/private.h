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

/* Forget the keys and unmap the warden's TCSs; called by teemate_close. */
void private_end(struct teemate_enclave *enclave);

#endif
