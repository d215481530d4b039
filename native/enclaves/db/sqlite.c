/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SQLite itself: the amalgamation that sqlite_source.py gets, in this one object.  Its global variables
 * go into the section that each slot has a copy of (local.h); where it would call the cipher
 * extension that the amalgamation comes with, there is nothing: records.c encrypts.
 */
#include "local.h"
#include "sqlite_config.h"

#define SQLITE_WSD __attribute__((section("tm_local")))
#define sqlite3_wsd_find(variable, size) local_find(variable)

#include <sqlite3_amalgamation.c>

int sqlite3_wsd_init(int size, int count)
{
    (void)size;
    (void)count;
    return SQLITE_OK;
}

/* ---- the cipher extension's places ------------------------------------------ */

static int sqlite3mcCheckVfs(const char *name)
{
    (void)name;
    return SQLITE_OK;
}

static int sqlite3mcFileControlPragma(sqlite3 *db, const char *name, int op, void *arg)
{
    return sqlite3_file_control(db, name, op, arg);
}

static int sqlite3mcHandleAttachKey(sqlite3 *db, const char *name, const char *path, sqlite3_value *key, char **error)
{
    (void)db;
    (void)name;
    (void)path;
    (void)key;
    (void)error;
    return SQLITE_OK;
}

static int sqlite3mcHandleMainKey(sqlite3 *db, const char *path)
{
    (void)db;
    (void)path;
    return SQLITE_OK;
}

static void *sqlite3mcPagerCodec(PgHdr *page)
{
    return page->pData;
}

static int sqlite3mcPagerHasCodec(Pager *pager)
{
    (void)pager;
    return 0;
}

static int sqlite3mcIsBackupSupported(sqlite3 *from, const char *from_name, sqlite3 *to, const char *to_name)
{
    (void)from;
    (void)from_name;
    (void)to;
    (void)to_name;
    return 1;
}

static int sqlite3mcOpenTempFile(Pager *pager, sqlite3_file *file)
{
    (void)pager;
    (void)file;
    return SQLITE_OK;
}

static int sqlite3mcOpenTempJournal(sqlite3 *db, sqlite3_file *file)
{
    (void)db;
    (void)file;
    return SQLITE_OK;
}

static void sqlite3mcInitMemoryMethods(void)
{
}

/* A key of one byte: then VACUUM keeps the size of pages, which is that of our records. */
static void sqlite3mcCodecGetKey(sqlite3 *db, int index, void **key, int *length)
{
    (void)db;
    (void)index;
    *key = NULL;
    *length = 1;
}

static int sqlite3mc_builtin_extensions(sqlite3 *db)
{
    (void)db;
    return SQLITE_OK;
}

int sqlite3mc_initialize(const char *unused)
{
    (void)unused;
    return SQLITE_OK;
}

void sqlite3mc_shutdown(void)
{
}

/* ---- what needs the pager ------------------------------------------------------ */

uint32_t pages_count(sqlite3 *db)
{
    return sqlite3BtreeLastPage(db->aDb[0].pBt);
}

int pages_read(sqlite3 *db, uint32_t number, void *page, uint32_t size)
{
    Pager *pager = sqlite3BtreePager(db->aDb[0].pBt);
    DbPage *held;
    int code;

    if (number == PENDING_BYTE / size + 1) {
        memset(page, 0, size);
        return SQLITE_OK;
    }
    code = sqlite3PagerGet(pager, number, &held, 0);
    if (code)
        return code;
    memcpy(page, sqlite3PagerGetData(held), size);
    sqlite3PagerUnref(held);
    return SQLITE_OK;
}
