/* SPDX-License-Identifier: Apache-2.0 */
/* SQLite's operating system: files are records.h's, locks and the wal-index shared.h's. */
#ifndef DB_VFS_H
#define DB_VFS_H

#include "sqlite3.h"

#include "shared.h"

/* The file of its log. */
void vfs_log_name(const char *name, char log[DB_NAME_MAX + 8]);

#endif
