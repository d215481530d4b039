/* SPDX-License-Identifier: Apache-2.0 */
/*
 * EACCEPT, EMODPE and EACCEPTCOPY (SDM volume 3D, the instructions' pseudo-code).
 *
 * Branches without an id cannot be reached from user mode (tests/conformance tells why).
 *
 * "EPC page in use by another instruction" needs no check: each leaf commits by one
 * compare-and-swap on the page's EPCM word and looks again when it fails.
 */
#include <string.h>

#include "enclave.h"
#include "sim_check.h"
#include "sim_enclu.h"

#define STATE (SGX_SECINFO_PENDING | SGX_SECINFO_MODIFIED | SGX_SECINFO_PR)
#define RWX (SGX_SECINFO_R | SGX_SECINFO_W | SGX_SECINFO_X)
#define SECINFO_TYPE(flags) ((uint32_t)((flags) >> 8) & 0xffu)
#define SECINFO_RESERVED (~(uint64_t)0xff3f)

/* An EPCM word in SECINFO's terms: permissions, PENDING, MODIFIED, PR and type. */
static uint64_t flags_of(uint64_t word)
{
    return (word >> 1 & (RWX | STATE)) | SGX_SECINFO_PT(SIM_EPCM_TYPE(word));
}

static _Atomic uint64_t *entry_of(const struct teemate_enclave *enclave, uint64_t addr)
{
    return &enclave->sim->epcm[(addr - enclave->base) / SGX_PAGE];
}

/* #PF(addr) because of the EPCM. */
static int pf(struct sim_fault *fault, uint64_t addr)
{
    fault->vector = SGX_VECTOR_PF;
    fault->error = SGX_PF_P | SGX_PF_U | SGX_PF_SGX;
    fault->addr = addr;
    return 1;
}

static bool secinfo_reserved(const struct sgx_secinfo *secinfo)
{
    return secinfo->flags & SECINFO_RESERVED || !sim_all_zero(secinfo->reserved, sizeof(secinfo->reserved));
}

/*
 * "DS:RCX does not resolve within an EPC": is there a page of the enclave in this process's
 * address space, whatever its EPCM entry says?  The walk of the page table adds it on demand.
 * `access` is what the leaf's table of memory parameters permits: SGX_PF_W or 0.
 */
static bool resolves(struct teemate_enclave *enclave, uint64_t addr, uint32_t access, struct sim_fault *fault)
{
    return sim_access(enclave, addr, SGX_PAGE, access, fault) || fault->error & SGX_PF_SGX;
}

/* For a TCS: EACCEPT's last checks, and its place in the table.  1 when *fault is to be raised. */
static int accept_tcs(struct teemate_enclave *enclave, uint64_t addr, uint64_t *word, struct sim_fault *fault)
{
    struct sgx_tcs tcs;
    int index;

    memcpy(&tcs, sim_at(enclave, addr), sizeof(tcs));
    if (SIM_CHECK("EACCEPT.TCS.RESERVED", !sim_tcs_legal(&tcs)))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPT.TCS.STATE", tcs.flags || tcs.cssa >= tcs.nssa || tcs.aep || tcs.stage))
        return sim_gp(fault);
    index = sim_tcs_enlist(enclave->sim, addr - enclave->base, &tcs);
    if (index < 0)
        return sim_gp(fault); /* more TCSs than a simulated enclave can have */
    *word = (*word & ~(0xffffull << SIM_EPCM_TCS_SHIFT)) | (uint64_t)index << SIM_EPCM_TCS_SHIFT;
    return 0;
}

int sim_eaccept(struct teemate_enclave *enclave, struct sim_leaf_regs *regs, struct sim_fault *fault)
{
    struct sgx_secinfo secinfo;
    uint64_t word, accepted;
    uint32_t type;

    if (SIM_CHECK("EACCEPT.SECINFO.ALIGN", regs->rbx & 63))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPT.SECINFO.RANGE", !sim_in_elrange(enclave, regs->rbx, sizeof(secinfo))))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPT.SECINFO.ACCESS", !sim_access(enclave, regs->rbx, sizeof(secinfo), 0, fault)))
        return 1;
    memcpy(&secinfo, sim_at(enclave, regs->rbx), sizeof(secinfo));
    if (SIM_CHECK("EACCEPT.SECINFO.RESERVED", secinfo_reserved(&secinfo)))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPT.TARGET.ALIGN", regs->rcx & 0xfff))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPT.TARGET.RANGE", !sim_in_elrange(enclave, regs->rcx, SGX_PAGE)))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPT.TARGET.RESOLVE", !resolves(enclave, regs->rcx, 0, fault)))
        return 1;
    type = SECINFO_TYPE(secinfo.flags);
    if (SIM_CHECK("EACCEPT.SECINFO.TYPE", type != SGX_PT_REG && type != SGX_PT_TCS && type != SGX_PT_TRIM))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPT.SECINFO.REG", type == SGX_PT_REG && (!(secinfo.flags & (SGX_SECINFO_PR | SGX_SECINFO_PENDING)) ||
                                                              secinfo.flags & SGX_SECINFO_MODIFIED)))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPT.SECINFO.MODIFIED", (type == SGX_PT_TCS || type == SGX_PT_TRIM) &&
                                                  (secinfo.flags & STATE) != SGX_SECINFO_MODIFIED))
        return sim_gp(fault);

    word = atomic_load(entry_of(enclave, regs->rcx));
    do {
        if (!(word & SIM_EPCM_VALID))
            return pf(fault, regs->rcx);
        /* PR does not have to match. */
        if (SIM_CHECK("EACCEPT.MISMATCH.STATE", (flags_of(word) ^ secinfo.flags) &
                                                    (SGX_SECINFO_PENDING | SGX_SECINFO_MODIFIED)))
            return sim_result(regs, SGX_PAGE_ATTRIBUTES_MISMATCH);
        if (SIM_CHECK("EACCEPT.MISMATCH.RWX", (flags_of(word) ^ secinfo.flags) & RWX))
            return sim_result(regs, SGX_PAGE_ATTRIBUTES_MISMATCH);
        if (SIM_CHECK("EACCEPT.MISMATCH.TYPE", SIM_EPCM_TYPE(word) != type))
            return sim_result(regs, SGX_PAGE_ATTRIBUTES_MISMATCH);
        accepted = word & ~(SIM_EPCM_PENDING | SIM_EPCM_MODIFIED | SIM_EPCM_PR);
        if (type == SGX_PT_TCS && accept_tcs(enclave, regs->rcx, &accepted, fault))
            return 1;
    } while (!atomic_compare_exchange_weak(entry_of(enclave, regs->rcx), &word, accepted));
    return sim_result(regs, SGX_SUCCESS);
}

int sim_emodpe(struct teemate_enclave *enclave, struct sim_leaf_regs *regs, struct sim_fault *fault)
{
    struct sgx_secinfo secinfo;
    uint64_t word, extended;

    if (SIM_CHECK("EMODPE.SECINFO.ALIGN", regs->rbx & 63))
        return sim_gp(fault);
    if (SIM_CHECK("EMODPE.TARGET.ALIGN", regs->rcx & 0xfff))
        return sim_gp(fault);
    if (SIM_CHECK("EMODPE.SECINFO.RANGE", !sim_in_elrange(enclave, regs->rbx, sizeof(secinfo))))
        return sim_gp(fault);
    if (SIM_CHECK("EMODPE.TARGET.RANGE", !sim_in_elrange(enclave, regs->rcx, SGX_PAGE)))
        return sim_gp(fault);
    if (SIM_CHECK("EMODPE.SECINFO.ACCESS", !sim_access(enclave, regs->rbx, sizeof(secinfo), 0, fault)))
        return 1;
    if (SIM_CHECK("EMODPE.TARGET.RESOLVE", !resolves(enclave, regs->rcx, 0, fault)))
        return 1;
    memcpy(&secinfo, sim_at(enclave, regs->rbx), sizeof(secinfo));
    if (SIM_CHECK("EMODPE.SECINFO.RESERVED", secinfo_reserved(&secinfo)))
        return sim_gp(fault);

    word = atomic_load(entry_of(enclave, regs->rcx));
    do {
        if (!(word & SIM_EPCM_VALID))
            return pf(fault, regs->rcx);
        if (SIM_CHECK("EMODPE.TARGET.PENDING", word & SIM_EPCM_PENDING))
            return pf(fault, regs->rcx);
        if (word & SIM_EPCM_MODIFIED)
            return pf(fault, regs->rcx);
        if (SIM_CHECK("EMODPE.TARGET.TYPE", SIM_EPCM_TYPE(word) != SGX_PT_REG))
            return pf(fault, regs->rcx);
        if (SIM_CHECK("EMODPE.WRITE_ONLY",
                      !(word & SIM_EPCM_R) && (secinfo.flags & (SGX_SECINFO_R | SGX_SECINFO_W)) == SGX_SECINFO_W))
            return sim_gp(fault);
        extended = word | (secinfo.flags & RWX) << 1;
    } while (!atomic_compare_exchange_weak(entry_of(enclave, regs->rcx), &word, extended));
    return 0;
}

int sim_eacceptcopy(struct teemate_enclave *enclave, struct sim_leaf_regs *regs, struct sim_fault *fault)
{
    struct sgx_secinfo secinfo;
    uint64_t word, accepted;

    if (SIM_CHECK("EACCEPTCOPY.SECINFO.ALIGN", regs->rbx & 63))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPTCOPY.TARGET.ALIGN", regs->rcx & 0xfff))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPTCOPY.SOURCE.ALIGN", regs->rdx & 0xfff))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPTCOPY.SECINFO.RANGE", !sim_in_elrange(enclave, regs->rbx, sizeof(secinfo))))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPTCOPY.TARGET.RANGE", !sim_in_elrange(enclave, regs->rcx, SGX_PAGE)))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPTCOPY.SOURCE.RANGE", !sim_in_elrange(enclave, regs->rdx, SGX_PAGE)))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPTCOPY.SECINFO.ACCESS", !sim_access(enclave, regs->rbx, sizeof(secinfo), 0, fault)))
        return 1;
    if (SIM_CHECK("EACCEPTCOPY.TARGET.RESOLVE", !resolves(enclave, regs->rcx, SGX_PF_W, fault)))
        return 1;
    if (SIM_CHECK("EACCEPTCOPY.SOURCE.RESOLVE", !resolves(enclave, regs->rdx, 0, fault)))
        return 1;
    memcpy(&secinfo, sim_at(enclave, regs->rbx), sizeof(secinfo));
    if (SIM_CHECK("EACCEPTCOPY.SECINFO.RESERVED", secinfo_reserved(&secinfo)))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPTCOPY.WRITE_ONLY",
                  (secinfo.flags & (SGX_SECINFO_R | SGX_SECINFO_W)) == SGX_SECINFO_W))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPTCOPY.SECINFO.TYPE", SECINFO_TYPE(secinfo.flags) != SGX_PT_REG))
        return sim_gp(fault);
    if (SIM_CHECK("EACCEPTCOPY.SOURCE.ACCESS", !sim_access(enclave, regs->rdx, SGX_PAGE, 0, fault)))
        return 1;

    word = atomic_load(entry_of(enclave, regs->rcx));
    do {
        if (!(word & SIM_EPCM_VALID))
            return sim_result(regs, SGX_PAGE_ATTRIBUTES_MISMATCH);
        if (SIM_CHECK("EACCEPTCOPY.TARGET.PENDING", !(word & SIM_EPCM_PENDING)))
            return sim_result(regs, SGX_PAGE_ATTRIBUTES_MISMATCH);
        if (word & SIM_EPCM_MODIFIED)
            return sim_result(regs, SGX_PAGE_ATTRIBUTES_MISMATCH);
        if (SIM_EPCM_TYPE(word) != SGX_PT_REG)
            return sim_result(regs, SGX_PAGE_ATTRIBUTES_MISMATCH);
        if ((word & (SIM_EPCM_R | SIM_EPCM_W | SIM_EPCM_X)) != (SIM_EPCM_R | SIM_EPCM_W))
            return sim_result(regs, SGX_PAGE_ATTRIBUTES_MISMATCH);
        /* Nobody can touch a pending page: killed in between, it is pending still. */
        memmove(sim_at(enclave, regs->rcx), sim_at(enclave, regs->rdx), SGX_PAGE);
        accepted = (word & ~(SIM_EPCM_PENDING | SIM_EPCM_R | SIM_EPCM_W | SIM_EPCM_X)) | (secinfo.flags & RWX) << 1;
    } while (!atomic_compare_exchange_weak(entry_of(enclave, regs->rcx), &word, accepted));
    return sim_result(regs, SGX_SUCCESS);
}
