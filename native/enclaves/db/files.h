/* SPDX-License-Identifier: Apache-2.0 */
/* SQLite's operating system: files as authenticated ciphertext, locks and the wal-index in EPC. */
#ifndef DB_FILES_H
#define DB_FILES_H

#include "sqlite3.h"

/* The connection's database is open and empty or a database: bring it to the mode that all of ours have. */
int files_begin(sqlite3 *db);

#endif
