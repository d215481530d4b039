/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include "sgx.h"

/* Not there yet. */
int sgx_enter(struct teemate_enclave *enclave, uint64_t tcs_offset, struct teemate_regs *regs, uint32_t function,
              uint64_t pause_after_ns, struct sgx_enclave_run *run)
{
    (void)enclave;
    (void)tcs_offset;
    (void)regs;
    (void)function;
    (void)pause_after_ns;
    (void)run;
    return -ENOSYS;
}
