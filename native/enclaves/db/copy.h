/* SPDX-License-Identifier: Apache-2.0 */
/* Copies of whole databases, in and out of the enclave and within it (db.h, "copies"). */
#ifndef DB_COPY_H
#define DB_COPY_H

#include "connection.h"

/* Give up the copy that is under way, if one is; what there is of a new database is deleted. */
void copy_end(struct connection *self);

#endif
