/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdatomic.h>
#include <sys/auxv.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "sgx.h"
#include "sgx_driver.h"

#ifndef HWCAP2_FSGSBASE
#define HWCAP2_FSGSBASE 2u /* uapi asm/hwcap2.h */
#endif

/* What entering takes; an enclave that came as a descriptor needs no more. */
static int enterable(struct teemate_diag *diag)
{
    if (!(getauxval(AT_HWCAP2) & HWCAP2_FSGSBASE))
        return diag_set(diag, -ENODEV, TEEMATE_STEP_ENTER, ENODEV, 0,
                        "the kernel has not switched FSGSBASE on, which entering an SGX enclave needs: Linux 5.9 or newer, "
                        "without nofsgsbase on its command line");
    if (!sgx_vdso_function())
        return diag_set(diag, -ENODEV, TEEMATE_STEP_ENTER, ENODEV, 0,
                        "the kernel's vDSO has no __vdso_sgx_enter_enclave: it needs Linux 5.11 or newer with "
                        "CONFIG_X86_SGX, and no vdso=0 on its command line");
    return 0;
}

/* Can enclaves be made, mapped and entered by this process? */
static int available(struct teemate_diag *diag)
{
    static _Atomic bool found; /* asked by every create with backend auto */
    struct statvfs device;
    int fd, result;

    if (atomic_load_explicit(&found, memory_order_relaxed))
        return 0;
    fd = sgx_device_open(diag);
    if (fd < 0)
        return fd;
    result = enterable(diag);
    if (!result && fstatvfs(fd, &device) == 0 && device.f_flag & ST_NOEXEC)
        result = diag_set(diag, -EACCES, TEEMATE_STEP_ECREATE, EPERM, 0,
                          "/dev is mounted noexec, so the code of enclaves that are created here cannot be mapped by "
                          "anyone: mount -o remount,exec /dev (what only attaches needs neither)");
    if (!result)
        result = sgx_may_map(diag);
    close(fd);
    if (!result)
        atomic_store_explicit(&found, true, memory_order_relaxed);
    return result;
}

static int restrict_permissions(struct teemate_enclave *enclave, uint64_t offset, uint64_t length,
                                uint64_t permissions, uint64_t *result, uint64_t *count)
{
    return sgx_driver_restrict_permissions(enclave->fd, offset, length, permissions, result, count);
}

static int modify_types(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t type,
                        uint64_t *result, uint64_t *count)
{
    int error = sgx_driver_modify_types(enclave->fd, offset, length, type, result, count);

    if (type == SGX_PT_TCS && *count && sgx_made_tcs(enclave, offset, *count) < 0)
        return -ENOMEM;
    return error;
}

static int remove_pages(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t *count)
{
    return sgx_driver_remove_pages(enclave->fd, offset, length, count);
}

static void close_enclave(struct teemate_enclave *enclave)
{
    sgx_stacks_free(enclave); /* mappings and descriptor are teemate_close's */
    sgx_forget_tcs(enclave);
}

const struct backend backend_sgx = {
    .name = "sgx",
    .id = TEEMATE_SGX,
    .available = available,
    .enterable = enterable,
    .create = sgx_create,
    .add_pages = sgx_add_pages,
    .init = sgx_init,
    .open = sgx_open,
    .map = sgx_map,
    .map_tcs = sgx_map_tcs,
    .unmap_tcs = sgx_unmap_tcs,
    .enter = sgx_enter,
    .restrict_permissions = restrict_permissions,
    .modify_types = modify_types,
    .remove_pages = remove_pages,
    .close = close_enclave,
};
