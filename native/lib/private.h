/* SPDX-License-Identifier: Apache-2.0 */
/* Private enclaves: this process is their warden (the public side is in teemate.h). */
#ifndef TEEMATE_PRIVATE_H
#define TEEMATE_PRIVATE_H

#include <stdbool.h>

#include "enclave.h"
#include "teemate_abi.h"

/*
 * Tell the enclave the time when its image wants that and the last time was told
 * more than 100 ms ago.  0 also when another thread is doing so; fails with
 * -EIO when the enclave refuses, or with the errno of the entry.
 */
int private_tick(struct teemate_enclave *enclave);

/* Is it private, and this process the one that made it? */
bool private_has_disk(const struct teemate_enclave *enclave);
/* Do what it asks of its files (teemate_disk); -ENOSYS when it has none. */
int64_t private_file(struct teemate_enclave *enclave, const struct tm_file_request *request, void *data);

/* Forget the keys and unmap the warden's TCSs; called by teemate_close. */
void private_end(struct teemate_enclave *enclave);

#endif
