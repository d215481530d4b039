/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SGX2's calls on an enclave of its own: sgx2_calls once|together IMAGE.
 * IMAGE.sgxs has 100 pages of RW data from the second page on.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sgx2.h"
#include "teemate.h"

#define THREADS 2
#define CALLS 100
#define PAGES 50

static struct teemate_enclave *enclave;

static void make(const char *image)
{
    struct teemate_diag diag = {0};
    uint8_t sigstruct[1808];
    char path[256];
    int fd, sig;

    snprintf(path, sizeof(path), "%s.sgxs", image);
    fd = open(path, O_RDONLY);
    snprintf(path, sizeof(path), "%s.sig", image);
    sig = open(path, O_RDONLY);
    if (fd < 0 || sig < 0 || read(sig, sigstruct, sizeof(sigstruct)) != sizeof(sigstruct) ||
        teemate_create(TEEMATE_SGX, 0, 0, fd, sigstruct, &enclave, &diag)) {
        fprintf(stderr, "%s: %s\n", image, diag.text);
        exit(1);
    }
    close(fd);
    close(sig);
}

static void say(const char *call, int error, uint64_t count)
{
    printf("%s: %s %llu\n", call, error ? strerrorname_np(-error) : "0", (unsigned long long)count / SGX_PAGE);
}

struct caller {
    pthread_t thread;
    uint64_t offset, pages;
    unsigned failures;
};

static void *change(void *context)
{
    struct caller *caller = context;

    for (int i = 0; i < CALLS; i++) {
        uint64_t result, count;

        if (enclave_restrict_permissions(enclave, caller->offset, PAGES * SGX_PAGE, SGX_SECINFO_R, &result, &count))
            caller->failures++;
        caller->pages += count / SGX_PAGE;
    }
    return NULL;
}

int main(int argc, char **argv)
{
    uint64_t result, count;
    int error;

    if (argc != 3)
        return 2;
    make(argv[2]);
    if (strcmp(argv[1], "once") == 0) {
        error = enclave_restrict_permissions(enclave, SGX_PAGE, 2 * SGX_PAGE, SGX_SECINFO_R, &result, &count);
        say("restrict", error, count);
        error = enclave_modify_types(enclave, 10 * SGX_PAGE, 2 * SGX_PAGE, SGX_PT_TRIM, &result, &count);
        say("modify", error, count);
        error = enclave_remove_pages(enclave, 10 * SGX_PAGE, 2 * SGX_PAGE, &count);
        say("remove", error, count);
    } else {
        struct caller callers[THREADS] = {{.offset = SGX_PAGE}, {.offset = (1 + PAGES) * SGX_PAGE}};

        for (int i = 0; i < THREADS; i++)
            if (pthread_create(&callers[i].thread, NULL, change, &callers[i]))
                return 1;
        for (int i = 0; i < THREADS; i++)
            pthread_join(callers[i].thread, NULL);
        printf("%d calls, %u failures, %llu pages\n", THREADS * CALLS, callers[0].failures + callers[1].failures,
               (unsigned long long)(callers[0].pages + callers[1].pages));
    }
    teemate_close(enclave);
    return 0;
}
