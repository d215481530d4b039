/* SPDX-License-Identifier: Apache-2.0 */
/* What concerns a database as a whole: who owns it, who may use it, its end. */
#ifndef DB_MANAGE_H
#define DB_MANAGE_H

#include "shared.h"

/*
 * Hold HOLDS_SETUP of the database of that name, or of what may become one: nobody has it open, and nobody comes in
 * before it is dropped.  SQLITE_OK, SQLITE_BUSY, SQLITE_NOMEM.
 */
int manage_claim(const char *name, struct database **database);

#endif
