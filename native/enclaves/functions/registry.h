/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The functions that are deployed: what all slots share, under one mutex that is never held while
 * anything runs.  Every change is one tm_txn, so a death at any instruction leaves it before or after.
 */
#ifndef FUNCTIONS_REGISTRY_H
#define FUNCTIONS_REGISTRY_H

#include "functions.h"
#include "tmsdk.h"

/* Of preparing a module ahead of its first invocation: about as much as for one of so many bytes. */
#define REGISTRY_EFFORT_MAX 65536u

struct registry_key {
    uint8_t owner[32];
    const uint8_t *name;
    uint32_t name_length;
};

/* What is deployed. */
struct registry_new {
    struct registry_key key;
    const uint8_t *env;
    uint32_t env_length;
    const uint8_t *module;
    uint64_t module_length;
    uint64_t effort; /* of preparing it */
    uint8_t digest[32];
    struct fn_limits limits;
    uint16_t grants; /* FN_GRANT_* */
};

/* What an invocation takes along; `copy` is the slot's own block, or NULL. */
struct registry_function {
    uint64_t number; /* of the deployment, among those of all owners: never told */
    uint64_t version;
    struct fn_limits limits;
    uint8_t *copy; /* environment, then, when asked for, module */
    uint32_t env_length;
    uint32_t grants;
    uint64_t module_length;
};

/* How an invocation ended. */
struct registry_end {
    uint64_t number;
    uint64_t fuel;
    uint32_t status; /* enum fn_status */
    uint32_t limit;
    bool starts; /* through a slot that had not run it */
    int32_t exit_code;
    const uint8_t *text; /* stderr */
    size_t text_length;
    uint64_t dropped;
};

/* What is made ready ahead (ready.c). */
struct registry_ahead {
    uint64_t number;
    uint8_t owner[32];
    uint32_t grants;
    const uint8_t *module; /* the registry's: what lies there is the module as long as the deployment is found */
    uint64_t length;
    uint64_t effort;
    bool suspect;
};

/* All return 0, TM_E_* or an enum fn_status. */
int registry_deploy(const struct registry_new *new, bool replace, struct fn_info *info);
int registry_describe(const struct registry_key *key, struct fn_info *info);
int registry_limit(const struct registry_key *key, const struct fn_limits *limits, struct fn_info *info);
int registry_remove(const struct registry_key *key);
/* Fill `function`; with its module unless that deployment is ready already. */
int registry_take(const struct registry_key *key, bool (*ready)(uint64_t number), struct registry_function *function);
/* Count it and log it, when the function is still there. */
int registry_ended(const struct registry_key *key, const struct registry_end *end);
/* Write fn_info and name of each to a block of the slot's own. */
int registry_list(const uint8_t owner[32], uint8_t **block, size_t *length);
int registry_logs(const struct registry_key *key, uint64_t after, uint8_t **block, size_t *length);
int registry_usage(const uint8_t owner[32], struct fn_usage *usage);
/* For who cannot wait: TM_E_BUSY when somebody has the lock.  `place` is what popular.c was told. */
int registry_find(uint64_t place, struct registry_ahead *ahead);
/* It cannot be made ready ahead, and is not tried again. */
void registry_spoil(uint64_t place);
/* A warden that made it ready ahead died, or did not: it is spoiled when two died with no success between. */
void registry_suspect(uint64_t place, bool died);
uint64_t registry_memory_max(void);

#endif
