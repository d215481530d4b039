/* SPDX-License-Identifier: Apache-2.0 */
#include "sim_check.h"

#ifdef SIM_MUTATIONS

#include <stdlib.h>
#include <string.h>

static char selected[96];

__attribute__((constructor)) static void sim_mutant_select(void)
{
    const char *id = getenv("TEEMATE_SIM_MUTANT");

    if (id && strlen(id) < sizeof(selected))
        strcpy(selected, id);
}

bool sim_mutated(const char *id)
{
    return selected[0] && strcmp(id, selected) == 0;
}

#else

/* ISO C wants a declaration in a translation unit. */
typedef int sim_check_nothing;

#endif
