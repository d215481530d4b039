/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vault: a confidential key-value store for many processes.
 *
 * What its ECALLs take and give.  All integers are little endian, structures
 * have no padding, variable parts follow directly and in the order of their
 * lengths; a request whose length is not exactly what its lengths say is refused with
 * TM_E_ARGUMENT.  client/vault.py is the mirror of this file.
 *
 *   ECALL             request                               reply
 *   put               vault_put, key, value                 vault_version
 *   get               vault_name, key                       vault_value, value
 *   delete            vault_name, key                       -
 *   compare_and_swap  vault_put (with `expected`), key, value
 *                                                           vault_version, or VAULT_CHANGED with
 *                                                           vault_value, value as they are now
 *   list              vault_scan, prefix                    vault_page, then vault_record, key for each
 *   export            vault_scan, prefix                    vault_page, then a sealed blob
 *   import            vault_import, sealed blob             vault_page (`count` entries were written)
 *
 * and for measuring:
 *   empty             anything                              -
 *   echo              anything                              the same
 *   add               two u64                               their sum, u64
 *   report            64 bytes of REPORTDATA, then 512 of TARGETINFO or nothing (for ourselves)
 *                                                           REPORT, 432 bytes
 *   verify            REPORT, 432 bytes                     -, or VAULT_FORGED, VAULT_FOREIGN
 *
 * Statuses: 0, TM_E_*, or a positive enum vault_status.
 *
 * A value belongs to a space: VAULT_PRIVATE is seen by callers with the same
 * principal only (struct tm_identity), VAULT_SHARED by every caller.  Versions
 * grow with every change of a key, and start anew above all that its shard had, so a
 * version names one value for ever.  An entry whose time is over is as if deleted.
 */
#ifndef VAULT_H
#define VAULT_H

#include <stdint.h>

#define VAULT_KEY_MAX 256u      /* bytes; 1 at least */
#define VAULT_VALUE_MAX 65536u  /* bytes; may be 0 */
#define VAULT_PAGE_BYTES 262144u /* list and export stop at about that many */

enum vault_space {
    VAULT_PRIVATE = 0,
    VAULT_SHARED = 1,
};

enum vault_status {
    VAULT_NOT_FOUND = 1, /* no such key (any more) */
    VAULT_CHANGED = 2,   /* compare_and_swap: the version is not the expected one */
    VAULT_FORGED = 3,    /* verify: made for another enclave, on another computer, or changed */
    VAULT_FOREIGN = 4,   /* verify: the same, and it does not even claim this platform's CPUSVN */
    VAULT_FULL = 5,      /* put: more than the principal, or all, may have; where there are such limits (table.h) */
};

/* Followed by the key. */
struct vault_name {
    uint8_t space; /* enum vault_space */
    uint8_t reserved; /* 0 */
    uint16_t key_length;
    uint32_t reserved2; /* 0 */
};
_Static_assert(sizeof(struct vault_name) == 8, "vault_name");

/* Followed by key and value. */
struct vault_put {
    uint8_t space;
    uint8_t reserved; /* 0 */
    uint16_t key_length;
    uint32_t value_length;
    uint64_t ttl_ms;   /* time to live; 0: for ever.  TM_E_NOTREADY when the enclave has not been told the time */
    uint64_t expected; /* compare_and_swap: the version that must be there, 0: none may be.  put: 0 */
};
_Static_assert(sizeof(struct vault_put) == 24, "vault_put");

struct vault_version {
    uint64_t version;
};

/* Followed by the value. */
struct vault_value {
    uint64_t version; /* VAULT_CHANGED: 0 when there is none */
    uint64_t expires; /* ns of CLOCK_REALTIME; 0: never */
};
_Static_assert(sizeof(struct vault_value) == 16, "vault_value");

/*
 * Followed by a prefix; keys that begin with it are told.  `cursor` is 0 at first,
 * then the `next` of the page before, until that is 0.  Keys that are there all the
 * time are told exactly once, those that come or go meanwhile once or not at all.
 */
struct vault_scan {
    uint8_t space;
    uint8_t reserved; /* 0 */
    uint16_t prefix_length; /* 0 to VAULT_KEY_MAX */
    uint32_t reserved2; /* 0 */
    uint64_t cursor;
};
_Static_assert(sizeof(struct vault_scan) == 16, "vault_scan");

struct vault_page {
    uint64_t next;  /* 0: that was all */
    uint32_t count; /* records */
    uint32_t reserved; /* 0 */
};
_Static_assert(sizeof(struct vault_page) == 16, "vault_page");

/* Followed by the key; in an export by the value as well. */
struct vault_record {
    uint16_t key_length;
    uint16_t reserved; /* 0 */
    uint32_t value_length;
    uint64_t version;
    uint64_t expires;
};
_Static_assert(sizeof(struct vault_record) == 24, "vault_record");

/*
 * Followed by a blob of export: records sealed for enclaves of the same signer and
 * product (so a new release can import), bound to the space and, when that is
 * private, to the principal: TM_E_MAC for everybody else.  Imported entries get new
 * versions and replace what is there; those whose time is over are left out.
 * An export does not grow old: importing one again brings its values back, also
 * those that were deleted or changed since.
 */
struct vault_import {
    uint8_t space;
    uint8_t reserved[7]; /* 0 */
};
_Static_assert(sizeof(struct vault_import) == 8, "vault_import");

#endif
