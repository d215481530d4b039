/* SPDX-License-Identifier: Apache-2.0 */
/* Pages of a database as SQLite's pager has them: what no statement returns. */
#ifndef DB_PAGES_H
#define DB_PAGES_H

#include <stdint.h>

#include "sqlite3.h"

/* How many the main database has; within a transaction, whose snapshot it is. */
uint32_t pages_count(sqlite3 *db);
/* Copy page `number`, from 1 on, of that snapshot: SQLite's code.  The one that SQLite leaves out for locks is zeros. */
int pages_read(sqlite3 *db, uint32_t number, void *page, uint32_t size);

#endif
