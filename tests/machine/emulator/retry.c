/*
 * ioctl() for the kernel's selftests, which goes on after EAGAIN and EBUSY
 *
 * The ioctls that work on a range of pages return EAGAIN, and how far they
 * came, when they meet a page that is just being reclaimed; and the one that
 * removes pages EBUSY, when the reclaimer has taken the page from its list and
 * not begun yet.  The selftests of Linux 6.1 know of neither, those of later
 * versions of EAGAIN.
 */

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <asm/sgx.h>

#undef ioctl
int ioctl(int fd, unsigned long cmd, ...);

int ioctl_retry(int fd, unsigned long cmd, ...)
{
    unsigned long long *range, *count, done = 0, offset, length;
    va_list ap;
    int r;

    va_start(ap, cmd);
    range = va_arg(ap, void *);
    va_end(ap);

    switch (cmd) {
    case SGX_IOC_ENCLAVE_RESTRICT_PERMISSIONS:
    case SGX_IOC_ENCLAVE_MODIFY_TYPES:
        count = &range[4];
        break;
    case SGX_IOC_ENCLAVE_REMOVE_PAGES:
        count = &range[2];
        break;
    default:
        return ioctl(fd, cmd, range);
    }

    offset = range[0];
    length = range[1];
    while ((r = ioctl(fd, cmd, range)) == -1 && (errno == EAGAIN || errno == EBUSY)) {
        done += *count;
        range[0] += *count;
        range[1] -= *count;
        *count = 0;
    }
    *count += done;
    range[0] = offset;
    range[1] = length;
    return r;
}
