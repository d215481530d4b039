/* SPDX-License-Identifier: Apache-2.0 */
/* Keys and values of functions, in the vault's table: one space for each owner. */
#ifndef FUNCTIONS_KEYS_H
#define FUNCTIONS_KEYS_H

#include "functions.h"

/* Once, from tm_on_start(). */
int keys_start(void);
/* What the caller has. */
int keys_usage(struct fn_usage *usage);
/* Delete all that the caller has. */
int keys_clear(void);

#endif
