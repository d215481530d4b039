/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The driver's SGX2 calls on the sim, with its order of checks, errno, result and count
 * (arch/x86/kernel/cpu/sgx/ioctl.c, Linux 6.1).
 *
 * ETRACK and the IPIs that go with it are the epoch: this process's page table is brought
 * up to date at once, every other one before its next entry or resumption (a thread inside
 * is interrupted by the tick, so that is a matter of milliseconds).
 */
#include "sim.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>

#include "enclave.h"
#include "sim_check.h"

/* sgx_ioc_sgx2_ready and sgx_validate_offset_length. */
static int check_range(const struct teemate_enclave *enclave, uint64_t offset, uint64_t length)
{
    if (SIM_CHECK("SGX2.READY", !enclave->sim->header->sgx2))
        return -ENODEV;
    if (!enclave->finished)
        return -EINVAL; /* teemate.h has no such enclave */
    if (SIM_CHECK("SGX2.OFFSET", offset % SGX_PAGE))
        return -EINVAL;
    if (SIM_CHECK("SGX2.LENGTH", !length || length % SGX_PAGE))
        return -EINVAL;
    if (SIM_CHECK("SGX2.OVERFLOW", offset + length < offset))
        return -EINVAL;
    if (SIM_CHECK("SGX2.RANGE", offset + length - SGX_PAGE >= enclave->size))
        return -EINVAL;
    return 0;
}

static void track(struct teemate_enclave *enclave)
{
    atomic_fetch_add(&enclave->sim->header->epoch, 1);
    sim_flush(enclave);
}

/* Why EMODPR cannot be done on this page; 0 when it can. */
static int restrict_fault(uint64_t word, uint64_t *result)
{
    if (SIM_CHECK("SGX2.RESTRICT.ABSENT", !(word & SIM_EPCM_VALID)))
        return -EFAULT;
    if (SIM_CHECK("SGX2.RESTRICT.TYPE", SIM_EPCM_TYPE(word) != SGX_PT_REG))
        return -EINVAL;
    if (SIM_CHECK("SGX2.RESTRICT.PENDING", word & SIM_EPCM_PENDING)) {
        *result = SGX_PAGE_NOT_MODIFIABLE;
        return -EFAULT;
    }
    return 0;
}

int sim_restrict_permissions(struct teemate_enclave *enclave, uint64_t offset, uint64_t length,
                             uint64_t permissions, uint64_t *result, uint64_t *count)
{
    int error = check_range(enclave, offset, length);

    *result = *count = 0;
    if (error)
        return error;
    if (SIM_CHECK("SGX2.RESTRICT.BITS", permissions & ~7ull))
        return -EINVAL;
    if (SIM_CHECK("SGX2.RESTRICT.WRITE_ONLY", permissions & SGX_SECINFO_W && !(permissions & SGX_SECINFO_R)))
        return -EINVAL;
    for (; *count < length; *count += SGX_PAGE) {
        _Atomic uint64_t *entry = &enclave->sim->epcm[(offset + *count) / SGX_PAGE];
        uint64_t word = atomic_load(entry), next;

        do {
            error = restrict_fault(word, result);
            /* What the page lacks already, it does not get. */
            next = (word & (~(SIM_EPCM_R | SIM_EPCM_W | SIM_EPCM_X) | permissions << 1)) | SIM_EPCM_PR;
        } while (!error && !atomic_compare_exchange_weak(entry, &word, next));
        if (error)
            break;
    }
    track(enclave);
    return error;
}

/* Why EMODT cannot be done on this page; 0 when it can. */
static int modify_fault(uint64_t word, uint64_t type, uint64_t *result)
{
    if (SIM_CHECK("SGX2.TYPES.ABSENT", !(word & SIM_EPCM_VALID)))
        return -EFAULT;
    if (SIM_CHECK("SGX2.TYPES.FROM", SIM_EPCM_TYPE(word) != SGX_PT_REG &&
                                         !(SIM_EPCM_TYPE(word) == SGX_PT_TCS && type == SGX_PT_TRIM)))
        return -EINVAL;
    if (SIM_CHECK("SGX2.TYPES.PROT", type == SGX_PT_TCS && (SIM_EPCM_MAX(word) & 3) != 3))
        return -EPERM;
    if (SIM_CHECK("SGX2.TYPES.PENDING", word & (SIM_EPCM_PENDING | SIM_EPCM_MODIFIED))) {
        *result = SGX_PAGE_NOT_MODIFIABLE;
        return -EFAULT;
    }
    return 0;
}

int sim_modify_types(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t type,
                     uint64_t *result, uint64_t *count)
{
    static const struct sgx_tcs empty;
    int error = check_range(enclave, offset, length);

    *result = *count = 0;
    if (error)
        return error;
    if (SIM_CHECK("SGX2.TYPES.TO", type != SGX_PT_TCS && type != SGX_PT_TRIM))
        return -EINVAL;
    for (; *count < length; *count += SGX_PAGE) {
        _Atomic uint64_t *entry = &enclave->sim->epcm[(offset + *count) / SGX_PAGE];
        uint64_t word = atomic_load(entry), next, index = SIM_EPCM_TCS(word); /* of a TCS that is trimmed */

        error = modify_fault(word, type, result);
        /* A place in the table now, so that the page can be mapped as a TCS; EACCEPT fills it. */
        if (!error && type == SGX_PT_TCS) {
            int place = sim_tcs_enlist(enclave->sim, offset + *count, &empty);

            error = place < 0 ? place : 0;
            index = (uint64_t)place & 0xffff;
        }
        while (!error) {
            next = SIM_EPCM_VALID | SIM_EPCM_MODIFIED | type << SIM_EPCM_TYPE_SHIFT |
                   index << SIM_EPCM_TCS_SHIFT |
                   (type == SGX_PT_TCS ? 3ull : SIM_EPCM_MAX(word)) << SIM_EPCM_MAX_SHIFT;
            if (atomic_compare_exchange_weak(entry, &word, next))
                break;
            error = modify_fault(word, type, result);
        }
        if (error)
            break;
    }
    track(enclave);
    return error;
}

int sim_remove_pages(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t *count)
{
    int error = check_range(enclave, offset, length);

    *count = 0;
    if (error)
        return error;
    for (; *count < length; *count += SGX_PAGE) {
        _Atomic uint64_t *entry = &enclave->sim->epcm[(offset + *count) / SGX_PAGE];
        uint64_t word = atomic_load(entry);

        if (SIM_CHECK("SGX2.REMOVE.ABSENT", !(word & SIM_EPCM_VALID))) {
            error = -EFAULT;
            break;
        }
        if (SIM_CHECK("SGX2.REMOVE.TYPE", SIM_EPCM_TYPE(word) != SGX_PT_TRIM)) {
            error = -EPERM;
            break;
        }
        if (SIM_CHECK("SGX2.REMOVE.ACCEPTED", word & SIM_EPCM_MODIFIED)) {
            error = -EPERM;
            break;
        }
        /* Its memory first: once the entry is free, a new page may be there. */
        if (fallocate(enclave->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(offset + *count), SGX_PAGE)) {
            error = -errno;
            break;
        }
        atomic_compare_exchange_strong(entry, &word, 0);
    }
    track(enclave);
    return error;
}
