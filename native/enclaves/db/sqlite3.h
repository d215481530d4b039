/* SPDX-License-Identifier: Apache-2.0 */
/* SQLite's interface, as sqlite_source.py cut it out of the amalgamation. */
#ifndef DB_SQLITE3_H
#define DB_SQLITE3_H

#include "sqlite_config.h"
#include <sqlite3_interface.h>

#endif
