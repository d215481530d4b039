/* SPDX-License-Identifier: Apache-2.0 */
/* SQLite's operating system: files are records.h's, locks and the wal-index shared.h's. */
#ifndef DB_VFS_H
#define DB_VFS_H

#include "sqlite3.h"

/* Delete a database that nobody has open: 0, SQLITE_BUSY, SQLITE_CANTOPEN (there is none), SQLITE_IOERR_DELETE. */
int vfs_delete_database(const char *name);

#endif
