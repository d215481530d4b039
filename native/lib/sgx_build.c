/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Making an enclave through Linux's driver (arch/x86/kernel/cpu/sgx/ioctl.c).
 *
 * The driver says EIO for whatever ECREATE and EADD refuse and EPERM for whatever EINIT
 * does.  What only we can get wrong is checked before; why EINIT refused is found out
 * afterwards by the same checks that the sim makes (einit_refusal), so that a caller sees
 * one error for one mistake.
 */
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "secs.h"
#include "sgx.h"
#include "sgx_driver.h"
#include "sim.h" /* sim_tcs_legal */

#define LOST                                                                                                \
    "the processor's enclave memory was lost (a suspend, a migration of this virtual machine, or a memory " \
    "error): create the enclave again"
#define FULL                                                                                             \
    "enclave memory (EPC) is full and nothing of it can be swapped out, or the kernel has no memory: close " \
    "enclaves that are not needed, raise the memory limit, or give SGX more memory in the BIOS"

/* CPUID leaf 12H; all zero where there is no SGX. */
static struct secs_limits processor_limits(void)
{
    struct secs_limits limits = {0};
    uint32_t cpu[4], attributes[4];

    if (!__get_cpuid_count(0x12, 0, &cpu[0], &cpu[1], &cpu[2], &cpu[3]) ||
        !__get_cpuid_count(0x12, 1, &attributes[0], &attributes[1], &attributes[2], &attributes[3]))
        return limits;
    limits.size_max = 1ull << (cpu[3] >> 8 & 63);
    limits.miscselect = cpu[1];
    limits.attributes = ((uint64_t)attributes[1] << 32 | attributes[0]) & ~SGX_ATTR_INIT;
    limits.xfrm = (uint64_t)attributes[3] << 32 | attributes[2];
    return limits;
}

int sgx_device_open(struct teemate_diag *diag)
{
    int fd = open(SGX_DEVICE, O_RDWR | O_CLOEXEC);

    if (fd >= 0)
        return fd;
    switch (errno) {
    case ENOENT:
    case ENODEV:
    case ENXIO:
        return diag_set(diag, -ENODEV, TEEMATE_STEP_ECREATE, errno, 0,
                        "there is no " SGX_DEVICE ": it needs a processor with SGX and flexible launch control, SGX "
                        "switched on in the BIOS, and Linux 5.11 or newer with its driver (and, in a container, the "
                        "device)");
    case EACCES:
    case EPERM:
        return diag_set(diag, -EACCES, TEEMATE_STEP_ECREATE, errno, 0,
                        "this user may not open " SGX_DEVICE " (%s): add it to the group of the device (usually sgx), or "
                        "allow the device in the container's or service's device rules",
                        strerror(errno));
    default:
        return diag_set(diag, -errno, TEEMATE_STEP_ECREATE, errno, 0, "cannot open " SGX_DEVICE ": %s",
                        strerror(errno));
    }
}

int sgx_create(struct teemate_enclave *enclave, const struct create_params *params, struct teemate_diag *diag)
{
    const struct secs_limits limits = processor_limits();
    const char *fault = secs_fault(params, &limits);
    struct sgx_secs secs = {
        .size = params->size,
        .base = params->base,
        .ssa_frame_pages = params->ssa_frame_pages,
        .miscselect = params->miscselect,
        .attributes = params->attributes,
    };
    int fd, error;

    if (fault)
        return diag_set(diag, -EINVAL, TEEMATE_STEP_ECREATE, 0, 0, "ECREATE refuses the enclave: %s", fault);
    fd = sgx_device_open(diag);
    if (fd < 0)
        return fd;
    error = sgx_driver_create(fd, &secs);
    if (error) {
        close(fd);
        return diag_set(diag, error, TEEMATE_STEP_ECREATE, 0, 0, "cannot create the enclave: %s",
                        error == -ENOMEM ? FULL : error == -EIO ? LOST : strerror(-error));
    }
    enclave->fd = fd;
    enclave->process = fork_process();
    enclave->base = params->base;
    enclave->size = params->size;
    enclave->info.base = params->base;
    enclave->info.size = params->size;
    enclave->info.attributes = params->attributes.flags;
    enclave->info.xfrm = params->attributes.xfrm;
    enclave->info.miscselect = params->miscselect;
    enclave->info.ssa_frame_pages = params->ssa_frame_pages;
    enclave->info.backend = TEEMATE_SGX;
    return 0;
}

static int add_error(int error, uint64_t at, const struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    switch (error) {
    case -ENOMEM:
        return diag_set(diag, error, TEEMATE_STEP_EADD, 0, at,
                        "EADD at offset 0x%" PRIx64 ", after %" PRIu64 " pages: " FULL, at, enclave->info.pages);
    case -EIO:
        return diag_set(diag, error, TEEMATE_STEP_EADD, 0, at, "EADD at offset 0x%" PRIx64 ": " LOST, at);
    case -EBUSY:
        return diag_set(diag, error, TEEMATE_STEP_EADD, 0, at, "EADD at offset 0x%" PRIx64 ": there is a page already",
                        at);
    default:
        return diag_set(diag, error, TEEMATE_STEP_EADD, 0, at, "EADD at offset 0x%" PRIx64 ": %s", at,
                        strerror(-error));
    }
}

int sgx_add_pages(struct teemate_enclave *enclave, uint64_t offset, const void *data, uint64_t size,
                  uint64_t secinfo_flags, bool measured, bool partly, struct teemate_diag *diag)
{
    uint64_t added;
    int error;

    if (partly)
        return diag_set(diag, -EBADMSG, TEEMATE_STEP_EADD, 0, offset,
                        "the page at offset 0x%" PRIx64 " is measured in part, or not in ascending order: Linux measures "
                        "a page from its first byte to its last or not at all, so only the sim takes this image",
                        offset);
    if (secinfo_flags == SGX_SECINFO_PT(SGX_PT_TCS)) {
        static const struct sgx_tcs no_tcs;

        for (uint64_t at = 0; at < size; at += SGX_PAGE)
            if (!sim_tcs_legal(data ? (const void *)((const uint8_t *)data + at) : &no_tcs))
                return diag_set(diag, -EINVAL, TEEMATE_STEP_EADD, 0, offset + at,
                                "EADD of the TCS at offset 0x%" PRIx64 ": FLAGS and the reserved bytes must be zero",
                                offset + at);
    }
    error = sgx_driver_add_pages(enclave->fd, offset, data, size, secinfo_flags, measured, &added);
    enclave->info.pages += added / SGX_PAGE;
    return error ? add_error(error, offset + added, enclave, diag) : 0;
}

/* The permission for PROVISIONKEY, which is that to open a device. */
static int provision(struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    const uint64_t field = offsetof(struct sgx_sigstruct, attributes);
    int fd = open(SGX_PROVISION_DEVICE, O_RDONLY | O_CLOEXEC), error;

    if (fd < 0)
        return diag_set(diag, -EACCES, TEEMATE_STEP_EINIT, 0, field,
                        "EINIT refuses the enclave: its ATTRIBUTES.PROVISIONKEY needs " SGX_PROVISION_DEVICE
                        ", which this process cannot open (%s): only for attestation services; add the user to the "
                        "device's group (usually sgx_prv), or sign the image without PROVISIONKEY",
                        strerror(errno));
    error = sgx_driver_provision(enclave->fd, fd);
    close(fd);
    if (error)
        return diag_set(diag, -EACCES, TEEMATE_STEP_EINIT, 0, field,
                        "EINIT refuses the enclave: the driver does not take " SGX_PROVISION_DEVICE
                        " for a permission (%s)",
                        strerror(-error));
    return 0;
}

static int init_error(int error, const struct teemate_enclave *enclave, const struct sgx_attributes *attributes,
                      const struct sgx_sigstruct *sigstruct, const uint8_t mrenclave[32], struct teemate_diag *diag)
{
    switch (error) {
    case -EPERM:
    case -EINVAL: { /* EINVAL: VENDOR, which the driver looks at itself */
        int reason = einit_refusal(attributes, enclave->info.miscselect, sigstruct, mrenclave, diag);

        if (reason)
            return reason;
        return diag_set(diag, -EACCES, TEEMATE_STEP_EINIT, SGX_INVALID_EINITTOKEN, 0,
                        "EINIT refuses the enclave and nothing is wrong with image or SIGSTRUCT: does the BIOS let "
                        "Linux set the launch key (flexible launch control)?");
    }
    case -EACCES:
        return diag_set(diag, error, TEEMATE_STEP_EINIT, 0, offsetof(struct sgx_sigstruct, attributes),
                        "EINIT refuses the enclave: the kernel does not give ATTRIBUTES 0x%" PRIx64
                        " (nobody gets EINITTOKENKEY)",
                        attributes->flags);
    case -EIO:
        return diag_set(diag, error, TEEMATE_STEP_EINIT, 0, 0, "EINIT: " LOST);
    default:
        return diag_set(diag, error, TEEMATE_STEP_EINIT, 0, 0, "EINIT: %s",
                        error == -ENOMEM ? FULL : strerror(-error));
    }
}

int sgx_init(struct teemate_enclave *enclave, const struct sgx_sigstruct *sigstruct, const uint8_t mrenclave[32],
             struct teemate_diag *diag)
{
    struct teemate_enclave_info *info = &enclave->info;
    const struct sgx_attributes attributes = {.flags = info->attributes, .xfrm = info->xfrm};
    int error;

    if (attributes.flags & SGX_ATTR_PROVISIONKEY) {
        error = provision(enclave, diag);
        if (error)
            return error;
    }
    error = sgx_driver_init(enclave->fd, sigstruct);
    if (error)
        return init_error(error, enclave, &attributes, sigstruct, mrenclave, diag);
    info->attributes |= SGX_ATTR_INIT;
    info->isvprodid = sigstruct->isvprodid;
    info->isvsvn = sigstruct->isvsvn;
    memcpy(info->mrenclave, mrenclave, sizeof(info->mrenclave)); /* EINIT compared it with the processor's */
    teemate_sha256(sigstruct->modulus, sizeof(sigstruct->modulus), info->mrsigner);
    enclave->finished = true;
    return 0;
}
