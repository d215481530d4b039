/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "floor.h"

int main(int argc, char **argv)
{
    static const struct {
        const char *word;
        int (*run)(int argc, char **argv);
    } words[] = {
        {"attach", floor_attach},
        {"call", floor_call},
        {"create", floor_create},
        {"hash", floor_hash},
    };

    for (unsigned i = 0; argc > 1 && i < sizeof(words) / sizeof(words[0]); i++)
        if (strcmp(argv[1], words[i].word) == 0)
            return words[i].run(argc - 1, argv + 1);
    fprintf(stderr, "usage: teemate-floor attach | call | create | hash ...\n");
    return 2;
}
