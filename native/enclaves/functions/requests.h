/* SPDX-License-Identifier: Apache-2.0 */
/* What the ECALLs of functions.c and upload.c share: reading requests, telling of functions, budgets. */
#ifndef FUNCTIONS_REQUESTS_H
#define FUNCTIONS_REQUESTS_H

#include "registry.h"

/* What the engine may take beside a function's memory: stacks, compiled code, an instance's tables. */
#define ENGINE_BUDGET (6u << 20)
/* A module's code becomes larger as it is translated; all of it at once when it is checked. */
#define CHECK_FACTOR 16u

/* The caller's function whose name of `length` lies at `at` of the request. */
bool read_key(const struct tm_request *rq, size_t at, uint32_t length, struct registry_key *key);
/* Strings that end with a zero byte each; those of an environment (`named`) have a '='. */
bool are_strings(const uint8_t *text, uint32_t length, bool named);
bool are_limits(const struct fn_limits *limits);
int reply_info(struct tm_request *rq, const struct fn_info *info, const struct registry_key *key);

#endif
