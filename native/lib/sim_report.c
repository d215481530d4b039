/* SPDX-License-Identifier: Apache-2.0 */
/* EREPORT (SDM volume 3D, "EREPORT: Create a Cryptographic Report of the Enclave"). */
#include <string.h>

#include "crypto.h"
#include "enclave.h"
#include "sim_check.h"
#include "sim_enclu.h"
#include "sim_keys.h"

#define REPORTDATA_SIZE 64u

int sim_ereport(struct teemate_enclave *enclave, struct sim_leaf_regs *regs, struct sim_fault *fault)
{
    const struct sim_header *secs = enclave->sim->header;
    struct sim_key_dependencies key;
    struct sgx_targetinfo target;
    struct sgx_report report;
    uint8_t report_key[16];

    if (SIM_CHECK("EREPORT.TARGETINFO.ALIGN", regs->rbx & 511))
        return sim_gp(fault);
    if (SIM_CHECK("EREPORT.TARGETINFO.RANGE", !sim_in_elrange(enclave, regs->rbx, sizeof(target))))
        return sim_gp(fault);
    if (SIM_CHECK("EREPORT.TARGETINFO.ACCESS", !sim_access(enclave, regs->rbx, sizeof(target), 0, fault)))
        return 1;
    if (SIM_CHECK("EREPORT.REPORTDATA.ALIGN", regs->rcx & 127))
        return sim_gp(fault);
    if (SIM_CHECK("EREPORT.REPORTDATA.RANGE", !sim_in_elrange(enclave, regs->rcx, REPORTDATA_SIZE)))
        return sim_gp(fault);
    if (SIM_CHECK("EREPORT.REPORTDATA.ACCESS", !sim_access(enclave, regs->rcx, REPORTDATA_SIZE, 0, fault)))
        return 1;
    if (SIM_CHECK("EREPORT.OUTPUT.ALIGN", regs->rdx & 511))
        return sim_gp(fault);
    if (SIM_CHECK("EREPORT.OUTPUT.RANGE", !sim_in_elrange(enclave, regs->rdx, sizeof(report))))
        return sim_gp(fault);
    if (SIM_CHECK("EREPORT.OUTPUT.ACCESS", !sim_access(enclave, regs->rdx, sizeof(report), SGX_PF_W, fault)))
        return 1;

    /* Other threads write to the enclave's memory: use copies. */
    memcpy(&target, sim_at(enclave, regs->rbx), sizeof(target));
    memset(&report, 0, sizeof(report));
    memcpy(report.reportdata, sim_at(enclave, regs->rcx), REPORTDATA_SIZE);
    memcpy(report.cpusvn, sim_cpusvn, sizeof(report.cpusvn));
    memcpy(report.isvfamilyid, secs->isvfamilyid, sizeof(report.isvfamilyid));
    memcpy(report.isvextprodid, secs->isvextprodid, sizeof(report.isvextprodid));
    report.isvprodid = secs->isvprodid;
    report.isvsvn = secs->isvsvn;
    report.attributes = secs->attributes;
    memcpy(report.mrenclave, secs->mrenclave, sizeof(report.mrenclave));
    memcpy(report.mrsigner, secs->mrsigner, sizeof(report.mrsigner));
    memcpy(report.keyid, sim_report_keyid, sizeof(report.keyid));
    report.miscselect = secs->miscselect;
    memcpy(report.configid, secs->configid, sizeof(report.configid));
    report.configsvn = secs->configsvn;

    sim_key_begin(&key, SGX_KEY_REPORT);
    key.attributes = target.attributes;
    memcpy(key.mrenclave, target.mrenclave, sizeof(key.mrenclave));
    memcpy(key.keyid, report.keyid, sizeof(key.keyid));
    memcpy(key.cpusvn, sim_cpusvn, sizeof(key.cpusvn));
    key.miscselect = target.miscselect;
    memcpy(key.configid, target.configid, sizeof(key.configid));
    key.configsvn = target.configsvn;
    sim_key_derive(&key, report_key);
    aes128_cmac(report_key, &report, offsetof(struct sgx_report, keyid), report.mac);
    memcpy(sim_at(enclave, regs->rdx), &report, sizeof(report));
    return 0;
}
