/* SPDX-License-Identifier: Apache-2.0 */
/* The simulated processor's keys.  They derive from public constants and protect nothing. */
#ifndef TEEMATE_SIM_KEYS_H
#define TEEMATE_SIM_KEYS_H

#include <stdint.h>

#include "sgx_arch.h"

/* What a key is derived from (SDM volume 3D, EGETKEY, TMP_KEYDEPENDENCIES). */
struct sim_key_dependencies {
    uint16_t keyname;
    uint16_t isvprodid;
    uint16_t isvsvn;
    uint16_t configsvn;
    uint16_t keypolicy;
    uint16_t reserved;
    uint32_t miscselect;
    uint32_t miscmask;
    uint32_t reserved2;
    uint8_t ownerepoch[16];
    uint8_t seal_fuses[16];
    uint8_t cpusvn[16];
    struct sgx_attributes attributes;
    struct sgx_attributes attributesmask;
    uint8_t mrenclave[32];
    uint8_t mrsigner[32];
    uint8_t keyid[32];
    uint8_t isvfamilyid[16];
    uint8_t isvextprodid[16];
    uint8_t configid[64];
    uint8_t padding[352];
};

/* CR_CPUSVN: says "sim" to whoever reads a report. */
extern const uint8_t sim_cpusvn[16];
/* CR_REPORT_KEYID: drawn at reset by a processor, fixed here. */
extern const uint8_t sim_report_keyid[32];

/* `name`'s dependencies on nothing but the processor. */
void sim_key_begin(struct sim_key_dependencies *key, enum sgx_key_name name);
void sim_key_derive(const struct sim_key_dependencies *key, uint8_t out[16]);

#endif
