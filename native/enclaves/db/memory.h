/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SQLite's memory in one slot.  Small blocks are cut from chunks of the enclave's heap, so that the
 * heap's lock is taken rarely; large ones are blocks of the heap.  Nothing is shared, so nothing
 * has to survive its holder.
 */
#ifndef DB_MEMORY_H
#define DB_MEMORY_H

#include "local.h"
#include "sqlite3.h"

extern const sqlite3_mem_methods memory_methods;

/* Give everything back. */
void memory_close(struct memory *memory);

#endif
