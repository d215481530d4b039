/* SPDX-License-Identifier: Apache-2.0 */
#include "sim_enclu.h"

#include "enclave.h"
#include "sim_check.h"

#define FLAG_CF 0x001u
#define FLAG_PF 0x004u
#define FLAG_AF 0x010u
#define FLAG_ZF 0x040u
#define FLAG_SF 0x080u
#define FLAG_OF 0x800u

int sim_gp(struct sim_fault *fault)
{
    fault->vector = SGX_VECTOR_GP;
    fault->error = 0;
    fault->addr = 0;
    return 1;
}

int sim_result(struct sim_leaf_regs *regs, enum sgx_error code)
{
    regs->rax = (uint64_t)code;
    if (SIM_STEP("ENCLU.FLAGS"))
        regs->rflags &= ~(uint64_t)(FLAG_CF | FLAG_PF | FLAG_AF | FLAG_SF | FLAG_OF);
    if (SIM_STEP("ENCLU.ZF"))
        regs->rflags = (regs->rflags & ~(uint64_t)FLAG_ZF) | (code == SGX_SUCCESS ? 0 : FLAG_ZF);
    return 0;
}

bool sim_in_elrange(const struct teemate_enclave *enclave, uint64_t addr, uint64_t length)
{
    uint64_t offset = addr - enclave->base;

    return offset < enclave->size && length <= enclave->size - offset;
}

bool sim_all_zero(const void *data, size_t length)
{
    const uint8_t *byte = data;
    uint8_t all = 0;

    while (length--)
        all |= *byte++;
    return all == 0;
}

int sim_enclu(struct teemate_enclave *enclave, struct sim_leaf_regs *regs, struct sim_fault *fault)
{
    uint32_t leaf = (uint32_t)regs->rax;

    /* SDM volume 3D, ENCLU: EAX names no leaf of this processor.  EENTER and ERESUME are
     * for outside of an enclave; EEXIT never gets here. */
    if (SIM_CHECK("ENCLU.SGX2", leaf >= SGX_EACCEPT && !enclave->sim->header->sgx2))
        return sim_gp(fault);
    switch (leaf) {
    case SGX_EREPORT:
        return sim_ereport(enclave, regs, fault);
    case SGX_EGETKEY:
        return sim_egetkey(enclave, regs, fault);
    case SGX_EACCEPT:
        return sim_eaccept(enclave, regs, fault);
    case SGX_EMODPE:
        return sim_emodpe(enclave, regs, fault);
    case SGX_EACCEPTCOPY:
        return sim_eacceptcopy(enclave, regs, fault);
    default:
        if (SIM_STEP("ENCLU.LEAF"))
            return sim_gp(fault);
        return 0;
    }
}
