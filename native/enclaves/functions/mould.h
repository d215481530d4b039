/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Moulds: what a module is when it has been made ready, kept so that slots need not do it again.
 *
 * A mould is a copy of everything that the engine has allocated for one ready module, with each pointer in it turned
 * into an offset.  A slot that needs the module copies the mould and turns them back, so what it has is its own, as if
 * it had made it: nothing of the engine's is ever shared, and no lock of the engine's either.
 *
 * Which words are pointers is not guessed: the module is made ready twice, at two places, and a pointer is what
 * differs by the distance between the two.  What differs in any other way is not understood, and then there is no
 * mould.
 */
#ifndef FUNCTIONS_MOULD_H
#define FUNCTIONS_MOULD_H

#include <stddef.h>
#include <stdint.h>

struct mould {
    uint64_t length; /* of what is copied: it follows, then a bit for each of its words, 1: a pointer */
    uint64_t root;   /* the offset of what engine_prepare() returned */
};
_Static_assert(sizeof(struct mould) == 16, "mould");

/* Bytes of a mould, with its head. */
size_t mould_size(const struct mould *mould);
/*
 * A mould of that module, in a block of the slot's own, or NULL: it became too large, memory is short, or it
 * was not understood.  The module has been found valid with these grants.
 */
struct mould *mould_make(const uint8_t *module, size_t length, uint32_t grants);
/* Make a copy of a mould into what it is a copy of, where it lies; returns what engine_prepare() would. */
void *mould_cast(struct mould *copy);

#endif
