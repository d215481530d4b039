/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the kernel's selftests themselves would load and sign: measure ELF HEAP >SIGSTRUCT
 *
 * Linked with their load.c and sigstruct.c, where there is no /dev/sgx_enclave: opening
 * it (--wrap=open, --wrap=stat) gives an empty memfd, since nothing is built here.
 * The segments go to standard error: offset size flags measured.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "defines.h"
#include "main.h"

#define DEVICE "/dev/sgx_enclave"

int __real_open(const char *path, int flags, ...);
int __real_stat(const char *path, struct stat *st);

int __wrap_open(const char *path, int flags, ...)
{
    return strcmp(path, DEVICE) ? __real_open(path, flags) : memfd_create(path, MFD_CLOEXEC);
}

int __wrap_stat(const char *path, struct stat *st)
{
    return __real_stat(strcmp(path, DEVICE) ? path : "/dev/null", st);
}

int main(int argc, char **argv)
{
    struct encl encl;

    if (argc != 3 || !encl_load(argv[1], &encl, strtoul(argv[2], NULL, 0)) || !encl_measure(&encl))
        return 1;
    for (unsigned i = 0; i < encl.nr_segments; i++) {
        struct encl_segment *seg = &encl.segment_tbl[i];

        fprintf(stderr, "%#llx %#llx %#x %d\n", (unsigned long long)seg->offset, (unsigned long long)seg->size,
                seg->flags, seg->measure);
    }
    return fwrite(&encl.sigstruct, sizeof(encl.sigstruct), 1, stdout) != 1;
}
