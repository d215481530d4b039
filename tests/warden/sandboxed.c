/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Goes into the warden's sandbox and tries something, for test_warden_sandbox.py:
 *   sandboxed warden|child NUMBER [ARGUMENT [ARGUMENT]]   a system call; exits 0 when it came back
 *   sandboxed fork                             fork and wait as the warden does
 *   sandboxed open                             open a file; exits with the errno
 *   sandboxed show                             prints what was given up (before the filter)
 *   sandboxed outside PATH                     opens PATH by the enclave's folder; exits with the errno
 * After `storage`: the same with storage, descriptor 4 being its folder.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sandbox.h"

static int show(void)
{
    struct rlimit core;
    char line[256];
    FILE *status = fopen("/proc/self/status", "r");

    while (status != NULL && fgets(line, sizeof(line), status) != NULL) {
        if (strncmp(line, "Cap", 3) == 0 || strncmp(line, "NoNewPrivs", 10) == 0 || strncmp(line, "Name", 4) == 0)
            fputs(line, stderr);
    }
    if (status != NULL) /* with storage and Landlock it cannot be opened */
        fclose(status);
    getrlimit(RLIMIT_CORE, &core);
    fprintf(stderr, "core: %lu\n", (unsigned long)core.rlim_max);
    for (int fd = 0; fd < 64; fd++) {
        if (fd != fileno(stderr) && dup2(fd, fd) == fd)
            fprintf(stderr, "open: %d\n", fd);
    }
    return 0;
}

static void *nothing(void *argument)
{
    return argument;
}

int main(int argc, char **argv)
{
    bool storage = argc > 1 && strcmp(argv[1], "storage") == 0;
    const char *step;
    int result = sandbox_enter(storage, &step);
    int status = 0;
    pthread_t thread;

    argc -= storage;
    argv += storage;
    if (result < 0 || argc < 2) {
        fprintf(stderr, "%s: %s\n", step, strerror(-result));
        return 2;
    }
    if (strcmp(argv[1], "show") == 0)
        return show();
    if (sandbox_filter(storage) < 0)
        return 2;
    if (strcmp(argv[1], "outside") == 0 && argc > 2) {
        struct open_how how = {.flags = O_RDONLY};

        return syscall(SYS_openat2, STORAGE_DIRECTORY, argv[2], &how, sizeof(how)) < 0 ? errno : 0;
    }
    if (strcmp(argv[1], "fork") == 0) {
        pid_t child = fork();

        if (child == 0)
            _exit(7);
        if (child < 0 || waitpid(child, &status, 0) != child || pthread_create(&thread, NULL, nothing, NULL) != 0)
            return 2;
        pthread_join(thread, NULL);
        return WEXITSTATUS(status);
    }
    if (strcmp(argv[1], "open") == 0)
        return open("/proc/self/maps", O_RDONLY) < 0 ? errno : 0;
    if (argc < 3 || (strcmp(argv[1], "child") == 0 && sandbox_filter_child() < 0))
        return 2;
    syscall(atol(argv[2]), argc > 3 ? strtol(argv[3], NULL, 0) : 0, argc > 4 ? strtol(argv[4], NULL, 0) : 0, 0, 0, 0, 0);
    _exit(0);
}
