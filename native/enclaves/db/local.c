/* SPDX-License-Identifier: Apache-2.0 */
/* A slot's own SQLite: a copy of the global variables as they are after sqlite3_initialize(). */
#include "local.h"

#include "memory.h"
#include "sqlite3.h"

extern uint8_t __tm_local_start[], __tm_local_end[];

static struct local_place *place(void)
{
    return tm_slot_data();
}

/*
 * Here the originals themselves are written, by one thread and before any client: the table of built-in
 * functions, which is no global variable of that kind, is the same for all from then on.
 */
int local_prepare(void)
{
    static struct local trial; /* initializing looks whether there is any memory */
    int code;

    memset(&trial, 0, sizeof(trial));
    trial.memory.limit = 1u << 20;
    place()->local = &trial;
    code = sqlite3_config(SQLITE_CONFIG_MALLOC, &memory_methods);
    if (!code)
        code = sqlite3_initialize();
    memory_close(&trial.memory);
    place()->local = NULL;
    return code ? TM_E_NOMEM : 0;
}

int local_open(uint64_t limit)
{
    size_t size = (size_t)(__tm_local_end - __tm_local_start);
    struct local *local;
    int status = tm_try_alloc(sizeof(*local) + size, (void **)&local);

    if (status)
        return status;
    local->memory.limit = limit;
    memcpy(local->globals, __tm_local_start, size);
    place()->local = local;
    place()->shift = (uint64_t)local->globals - (uint64_t)__tm_local_start;
    return 0;
}

void local_close(void)
{
    struct local *local = local_self();

    memory_close(&local->memory);
    place()->shift = 0;
    place()->local = NULL;
    tm_free(local);
}
