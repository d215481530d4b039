/* SPDX-License-Identifier: Apache-2.0 */
/* sim-tests --list | NAME */
#include <sys/wait.h>
#include <unistd.h>

#include "tests.h"

static const struct test *const groups[] = {entry_tests, exception_tests, signal_tests, process_tests, thread_tests};

int start_child(void (*run)(void *), void *argument)
{
    int pid = fork();

    CHECK(pid >= 0);
    if (!pid) {
        alarm(30);
        run(argument);
        _exit(0);
    }
    return pid;
}

void child_ends(int pid)
{
    int status;

    CHECK(waitpid(pid, &status, 0) == pid);
    EQUAL(status, 0);
}

int main(int argc, char **argv)
{
    bool list = argc == 2 && strcmp(argv[1], "--list") == 0;

    for (size_t g = 0; g < sizeof(groups) / sizeof(groups[0]); g++)
        for (const struct test *test = groups[g]; test->name; test++) {
            if (list) {
                puts(test->name);
            } else if (argc == 2 && strcmp(argv[1], test->name) == 0) {
                test->run();
                return 0;
            }
        }
    if (list)
        return 0;
    fprintf(stderr, "usage: %s --list | NAME\n", argv[0]);
    return 2;
}
