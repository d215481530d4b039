/* SPDX-License-Identifier: Apache-2.0 */
#include "sgx_driver.h"

#include <errno.h>
#include <sys/mman.h>

/* Long enough that the calls do not matter, short enough that its pages are few: what the
 * driver reads of it is touched. */
#define ZEROS_SIZE (1u << 20)

/*
 * EINTR: a signal came before anything was done, and its handler has run by now, so this is
 * no busy loop.  (The driver restarts the call itself for handlers with SA_RESTART.)
 */
static int call(int fd, unsigned long request, void *argument)
{
    int result;

    do
        result = ioctl(fd, request, argument);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : 0;
}

int sgx_driver_create(int fd, const struct sgx_secs *secs)
{
    struct sgx_ioctl_create argument = {.secs = (uintptr_t)secs};

    return call(fd, SGX_IOCTL_CREATE, &argument);
}

/* A signal ends the call between two pages with success and the count of what was added. */
static int add(int fd, struct sgx_ioctl_add_pages argument, bool zeros, uint64_t *added)
{
    uint64_t source = argument.source, offset = argument.offset, length = argument.length;

    while (*added < length) {
        uint64_t part = length - *added;
        int result;

        argument.source = zeros ? source : source + *added;
        argument.offset = offset + *added;
        argument.length = zeros && part > ZEROS_SIZE ? ZEROS_SIZE : part;
        argument.count = 0;
        result = call(fd, SGX_IOCTL_ADD_PAGES, &argument);
        *added += argument.count;
        if (result < 0)
            return result;
        if (!argument.count)
            return -EIO; /* no driver does this; it would be an endless loop */
    }
    return 0;
}

int sgx_driver_add_pages(int fd, uint64_t offset, const void *data, uint64_t length, uint64_t secinfo_flags,
                         bool measured, uint64_t *added)
{
    const struct sgx_secinfo secinfo = {.flags = secinfo_flags};
    struct sgx_ioctl_add_pages argument = {
        .source = (uintptr_t)data,
        .offset = offset,
        .length = length,
        .secinfo = (uintptr_t)&secinfo,
        .flags = measured ? SGX_PAGE_MEASURE : 0,
    };
    void *zeros;
    int result;

    *added = 0;
    if (data)
        return add(fd, argument, false, added);
    /* Not a constant of this library: the driver refuses what lies on a noexec file system. */
    zeros = mmap(NULL, ZEROS_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (zeros == MAP_FAILED)
        return -errno;
    argument.source = (uintptr_t)zeros;
    result = add(fd, argument, true, added);
    munmap(zeros, ZEROS_SIZE);
    return result;
}

int sgx_driver_init(int fd, const struct sgx_sigstruct *sigstruct)
{
    struct sgx_ioctl_init argument = {.sigstruct = (uintptr_t)sigstruct};

    return call(fd, SGX_IOCTL_INIT, &argument);
}

int sgx_driver_provision(int fd, int provision_fd)
{
    struct sgx_ioctl_provision argument = {.fd = (uint64_t)provision_fd};

    return call(fd, SGX_IOCTL_PROVISION, &argument);
}

int sgx_driver_restrict_permissions(int fd, uint64_t offset, uint64_t length, uint64_t permissions,
                                    uint64_t *result, uint64_t *count)
{
    struct sgx_ioctl_restrict_permissions argument = {
        .offset = offset, .length = length, .permissions = permissions};
    int error = call(fd, SGX_IOCTL_RESTRICT_PERMISSIONS, &argument);

    *result = argument.result;
    *count = argument.count;
    return error;
}

int sgx_driver_modify_types(int fd, uint64_t offset, uint64_t length, uint64_t type, uint64_t *result,
                            uint64_t *count)
{
    struct sgx_ioctl_modify_types argument = {.offset = offset, .length = length, .page_type = type};
    int error = call(fd, SGX_IOCTL_MODIFY_TYPES, &argument);

    *result = argument.result;
    *count = argument.count;
    return error;
}

int sgx_driver_remove_pages(int fd, uint64_t offset, uint64_t length, uint64_t *count)
{
    struct sgx_ioctl_remove_pages argument = {.offset = offset, .length = length};
    int error = call(fd, SGX_IOCTL_REMOVE_PAGES, &argument);

    *count = argument.count;
    return error;
}
