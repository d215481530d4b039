/* SPDX-License-Identifier: Apache-2.0 */
#include "sgx2.h"

#include <errno.h>
#include <sys/ioctl.h>

#include "sim.h"

struct restrict_permissions {
    uint64_t offset, length, permissions, result, count;
};
struct modify_types {
    uint64_t offset, length, page_type, result, count;
};
struct remove_pages {
    uint64_t offset, length, count;
};
#define IOC_RESTRICT _IOWR(0xA4, 0x05, struct restrict_permissions)
#define IOC_TYPES _IOWR(0xA4, 0x06, struct modify_types)
#define IOC_REMOVE _IOWR(0xA4, 0x07, struct remove_pages)

int sgx2_restrict(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t permissions,
                  uint64_t *result, uint64_t *count)
{
    int fd = teemate_enclave_fd(enclave), error;
    struct restrict_permissions args = {.offset = offset, .length = length, .permissions = permissions};

    if (teemate_sim_is(fd))
        return sim_restrict_permissions(enclave, offset, length, permissions, result, count);
    error = ioctl(fd, IOC_RESTRICT, &args) ? -errno : 0;
    *result = args.result;
    *count = args.count;
    return error;
}

int sgx2_types(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t type, uint64_t *result,
               uint64_t *count)
{
    int fd = teemate_enclave_fd(enclave), error;
    struct modify_types args = {.offset = offset, .length = length, .page_type = type};

    if (teemate_sim_is(fd))
        return sim_modify_types(enclave, offset, length, type, result, count);
    error = ioctl(fd, IOC_TYPES, &args) ? -errno : 0;
    *result = args.result;
    *count = args.count;
    return error;
}

int sgx2_remove(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t *count)
{
    int fd = teemate_enclave_fd(enclave), error;
    struct remove_pages args = {.offset = offset, .length = length};

    if (teemate_sim_is(fd))
        return sim_remove_pages(enclave, offset, length, count);
    error = ioctl(fd, IOC_REMOVE, &args) ? -errno : 0;
    *count = args.count;
    return error;
}
