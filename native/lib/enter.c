/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include "enclave.h"

int teemate_enter(struct teemate_enclave *enclave, uint64_t tcs_offset, struct teemate_regs *regs,
                  uint32_t function, uint64_t pause_after_ns, struct sgx_enclave_run *run)
{
    int result;

    if (!enclave_is_ours(enclave)) {
        result = -ENOTCONN;
    } else if (!enclave->mapped) {
        result = -EINVAL;
    } else {
        run->tcs = enclave->base + tcs_offset;
        run->function = function;
        result = enclave->backend->enter(enclave, tcs_offset, regs, function, pause_after_ns, run);
    }
    /* The key does not outlive the entry, also one that was refused. */
    *(volatile uint64_t *)&regs->r12 = 0;
    *(volatile uint64_t *)&regs->r13 = 0;
    return result;
}
