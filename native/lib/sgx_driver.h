/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ioctls of Linux's SGX driver (uapi asm/sgx.h, Linux 5.11; SGX2: 6.0), defined
 * here so that no kernel header is needed, and SECS as ECREATE reads it.
 *
 * The functions make the call and go on where the driver wants to be called again;
 * what an errno means for the caller is the caller's to say (sgx_build.c, sgx2.c).
 * The driver answers EBUSY while another ioctl works on the same enclave, in
 * whatever process.
 */
#ifndef TEEMATE_SGX_DRIVER_H
#define TEEMATE_SGX_DRIVER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/ioctl.h>

#include "sgx_arch.h"

#define SGX_DEVICE "/dev/sgx_enclave"
#define SGX_PROVISION_DEVICE "/dev/sgx_provision"

/* SDM volume 3D, "SGX Enclave Control Structure". */
struct sgx_secs {
    uint64_t size;
    uint64_t base;
    uint32_t ssa_frame_pages;
    uint32_t miscselect;
    uint8_t reserved1[24]; /* CET among them: none */
    struct sgx_attributes attributes;
    uint8_t reserved2[4032]; /* what EINIT fills in, and CONFIGID of KSS: zero */
} __attribute__((aligned(4096)));
_Static_assert(sizeof(struct sgx_secs) == 4096, "SECS");
_Static_assert(offsetof(struct sgx_secs, attributes) == 48, "SECS.ATTRIBUTES");

struct sgx_ioctl_create {
    uint64_t secs;
};

#define SGX_PAGE_MEASURE 1ull /* EEXTEND the whole page, in ascending order */

struct sgx_ioctl_add_pages {
    uint64_t source; /* page aligned, in memory that may be executable */
    uint64_t offset;
    uint64_t length;
    uint64_t secinfo;
    uint64_t flags;
    uint64_t count; /* out: bytes added */
};

struct sgx_ioctl_init {
    uint64_t sigstruct;
};

struct sgx_ioctl_provision {
    uint64_t fd;
};

struct sgx_ioctl_restrict_permissions {
    uint64_t offset;
    uint64_t length;
    uint64_t permissions;
    uint64_t result; /* out: what EMODPR returned; 0 at the call */
    uint64_t count;  /* out: bytes done; 0 at the call */
};

struct sgx_ioctl_modify_types {
    uint64_t offset;
    uint64_t length;
    uint64_t page_type;
    uint64_t result; /* out: what EMODT returned; 0 at the call */
    uint64_t count;  /* out: bytes done; 0 at the call */
};

struct sgx_ioctl_remove_pages {
    uint64_t offset;
    uint64_t length;
    uint64_t count; /* out: bytes done; 0 at the call */
};

#define SGX_IOCTL_CREATE _IOW(0xa4, 0, struct sgx_ioctl_create)
#define SGX_IOCTL_ADD_PAGES _IOWR(0xa4, 1, struct sgx_ioctl_add_pages)
#define SGX_IOCTL_INIT _IOW(0xa4, 2, struct sgx_ioctl_init)
#define SGX_IOCTL_PROVISION _IOW(0xa4, 3, struct sgx_ioctl_provision)
#define SGX_IOCTL_RESTRICT_PERMISSIONS _IOWR(0xa4, 5, struct sgx_ioctl_restrict_permissions)
#define SGX_IOCTL_MODIFY_TYPES _IOWR(0xa4, 6, struct sgx_ioctl_modify_types)
#define SGX_IOCTL_REMOVE_PAGES _IOWR(0xa4, 7, struct sgx_ioctl_remove_pages)

/* All return 0 or the negative errno of the driver; a signal's handler runs meanwhile, and
 * the call goes on after it. */
int sgx_driver_create(int fd, const struct sgx_secs *secs);
/* `data` is page aligned; NULL adds zeros.  *added: bytes, also when it fails. */
int sgx_driver_add_pages(int fd, uint64_t offset, const void *data, uint64_t length, uint64_t secinfo_flags,
                         bool measured, uint64_t *added);
int sgx_driver_init(int fd, const struct sgx_sigstruct *sigstruct);
int sgx_driver_provision(int fd, int provision_fd);

/* One call each, as the driver answers it: EBUSY and EAGAIN are sgx2.c's to deal with. */
int sgx_driver_restrict_permissions(int fd, uint64_t offset, uint64_t length, uint64_t permissions,
                                    uint64_t *result, uint64_t *count);
int sgx_driver_modify_types(int fd, uint64_t offset, uint64_t length, uint64_t type, uint64_t *result,
                            uint64_t *count);
int sgx_driver_remove_pages(int fd, uint64_t offset, uint64_t length, uint64_t *count);

#endif
