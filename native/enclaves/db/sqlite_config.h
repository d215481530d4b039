/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How SQLite is compiled for the enclave.  Each slot has its own copy of SQLite's global
 * variables (SQLITE_OMIT_WSD, local.h) as if it were a process, so there are no threads
 * (SQLITE_THREADSAFE=0) and no mutexes; what is shared, shared.c and cache.c share.
 */
#ifndef DB_SQLITE_CONFIG_H
#define DB_SQLITE_CONFIG_H

#define NDEBUG 1
#define SQLITE_OS_OTHER 1
#define SQLITE_THREADSAFE 0
#define SQLITE_OMIT_WSD 1
#define SQLITE_TEMP_STORE 3 /* temporary tables and sorting: in EPC, never in files */
#define SQLITE_DEFAULT_MEMSTATUS 1
#define SQLITE_DEFAULT_PAGE_SIZE 4096
#define SQLITE_DEFAULT_CACHE_SIZE (-2048)
#define SQLITE_DEFAULT_PCACHE_INITSZ 0 /* pages of a connection: as they are needed */
#define SQLITE_DEFAULT_FOREIGN_KEYS 0
#define SQLITE_DEFAULT_WAL_SYNCHRONOUS 2
#define SQLITE_DEFAULT_LOOKASIDE 1200, 40
#define SQLITE_DQS 3
#define SQLITE_ENABLE_COLUMN_METADATA 1
#define SQLITE_MAX_MMAP_SIZE 0
#define HAVE_STDINT_H 1
#define SQLITE_ZERO_MALLOC 1 /* no other allocator than the one that local.c names */

/* What recurses goes no deeper than a slot's stack allows (images.toml). */
#define SQLITE_MAX_EXPR_DEPTH 200
#define SQLITE_MAX_COMPOUND_SELECT 100
#define SQLITE_MAX_FUNCTION_ARG 100
#define JSON_MAX_DEPTH 200
#define SQLITE_MAX_ATTACHED 3

#define SQLITE_OMIT_LOAD_EXTENSION 1
#define SQLITE_OMIT_DESERIALIZE 1 /* its table of shared memory databases is one for all */
#define SQLITE_OMIT_SHARED_CACHE 1
#define SQLITE_OMIT_LOCALTIME 1
#define SQLITE_OMIT_UTF16 1
#define SQLITE_OMIT_TRACE 1
#define SQLITE_OMIT_COMPILEOPTION_DIAGS 1
#define SQLITE_OMIT_GET_TABLE 1
#define SQLITE_OMIT_AUTOINIT 1

#endif
