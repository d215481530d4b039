/* SPDX-License-Identifier: Apache-2.0 */
/*
 * functions: WebAssembly modules of many owners, run in one enclave.
 *
 * What its ECALLs take and give.  All integers are little endian, structures have no padding, variable
 * parts follow directly and in the order of their lengths; a request whose length is not exactly what its
 * lengths say is refused with TM_E_ARGUMENT.  client/functions/_wire.py is the mirror of this file.
 *
 *   ECALL     request                                          reply
 *   deploy    fn_deploy, name, environment, module             fn_info, name
 *   offer     a nonce, 32 bytes, and TARGETINFO (512) or nothing (for ourselves)
 *                                                              fn_offered, REPORT (432)
 *   deploy_sealed
 *             fn_sealed, fn_deploy, name, what is sealed       fn_info, name
 *   invoke    fn_invoke, name, arguments, environment, stdin   fn_result, text, stdout
 *   list      -                                                fn_info, name for each, by name
 *   describe  fn_name, name                                    fn_info, name
 *   limits    fn_name, name, fn_limits                         fn_info, name
 *   logs      fn_logs, name                                    fn_log, text for each, the oldest first
 *   remove    fn_name, name                                    -
 *   usage     -                                                fn_usage
 *   clear_keys
 *             -                                                -
 *   empty     anything                                         -
 *
 * Statuses: 0, TM_E_*, or a positive enum fn_status.  Texts come with FN_INVALID (alone), and after fn_result.
 *
 * A function belongs to the caller's principal (struct tm_identity): under another principal there is no
 * function of that name.  Strings of arguments and environment end with a zero byte each.
 *
 * An invocation runs the module's `_start` in an instance of its own, with WASI preview 1: arguments
 * (the function's name first), environment (the deployed one, then the request's), stdin, stdout, stderr, clocks,
 * randomness, exit.  There are no files and no sockets.  Clocks are the host's: it can lie.
 *
 * With FN_GRANT_KEYS a module may import `teemate_keys` (keys.c says with which parameters): put, get, delete and
 * list in a space that all functions of its owner with that grant share, and nobody else.  What is there stays when
 * functions are replaced or removed, until it is deleted or `clear_keys` is called, and as long as the enclave.
 *
 * With FN_STREAM what the module reads beyond the request's stdin comes from the caller while it runs, by the OCALL
 * `stdin` (u32: how much at most; the answer is data, none at the end), and what it writes goes out at once, by the
 * OCALL `stdout`, FN_STREAM_PIECE bytes at most each; the reply has no stdout then.
 *
 * A sealed upload: `offer` makes a key pair (X25519) for one upload through the same slot, whatever becomes of it.
 * The REPORT's data begins with SHA-256(FN_OFFER_LABEL, the key, the nonce, the owner).  The uploader makes a pair
 * too; environment and module are encrypted with AES-128-GCM, a nonce of zeroes, and fn_deploy and name as what is
 * bound.  The key is the first half of the one-step KDF's output (NIST SP 800-56C, SHA-256): SHA-256(the number 1 as 4
 * bytes, big endian; the shared secret; FN_UPLOAD_LABEL, the offer's key, the uploader's key, the nonce, the owner).
 */
#ifndef FUNCTIONS_H
#define FUNCTIONS_H

#include <stdint.h>

#define FN_NAME_MAX 63u           /* 1 at least: A-Z a-z 0-9 . _ -, the first of them a letter or digit */
#define FN_MODULE_MAX (8u << 20)  /* bytes */
#define FN_STRINGS_MAX 65536u     /* bytes of arguments, of a deployed environment, of a request's */
#define FN_PAYLOAD_MAX (16u << 20) /* bytes of stdin */
#define FN_LOG_MAX 16384u         /* bytes that are kept of one invocation's stderr: the last */
#define FN_LOGS_BYTES 65536u      /* and of all of a function's */
#define FN_LOGS_COUNT 64u
#define FN_OWNER_FUNCTIONS 64u    /* functions of one owner, and */
#define FN_OWNER_SHARE 4u         /* what their modules and logs may fill: this part of the heap; */
#define FN_ALL_SHARE 2u           /* and those of all owners together */
#define FN_KEYS_SHARE 16u         /* keys and values of one owner: this part of the heap, and */
#define FN_KEYS_ALL_SHARE 8u      /* those of all owners; */
#define FN_KEYS_MAX 16384u        /* and as many of one owner */
#define FN_MEMORY_SHARE 4u        /* the largest limit of memory: this part of the heap */
#define FN_READY_SHARE 8u         /* what is ready in slots that have no holder yet: this part of the heap, */
#define FN_READY_FREE 4u          /* and nothing more unless this part of it is free in one piece */

enum fn_status {
    FN_NOT_FOUND = 1, /* the caller has no function of that name */
    FN_EXISTS = 2,    /* deploy without FN_REPLACE, and there is one */
    FN_INVALID = 3,   /* deploy: not a module that can run here; the reply says why */
    FN_QUOTA = 4,     /* deploy: more than FN_OWNER_FUNCTIONS, or more bytes than the caller, or all, may have */
    FN_TRAPPED = 5,   /* invoke: WebAssembly's trap; fn_result */
    FN_FAILED = 6,    /* invoke: exit code other than 0; fn_result */
    FN_LIMIT = 7,     /* invoke: met a limit; fn_result */
    FN_CRASHED = 8,   /* invoke: the engine gave up (a bug in it); fn_result */
    FN_NO_OFFER = 9,  /* deploy_sealed: none was made through this slot, or it was used */
    FN_UNSEALED = 10, /* deploy_sealed: sealed for another offer, or changed */
};

enum fn_limit {
    FN_LIMIT_NONE = 0,
    FN_LIMIT_MEMORY = 1, /* linear memory, tables, or what the engine needs for them */
    FN_LIMIT_FUEL = 2,
    FN_LIMIT_TIME = 3,
    FN_LIMIT_OUTPUT = 4,
    FN_LIMIT_STACK = 5,  /* 10,000 calls, 1 MiB */
    FN_LIMIT_HEAP = 6,   /* what the caller may have of the heap at once (half of it), or the heap, is full */
    FN_LIMIT_STREAM = 7, /* no limit of ours: the caller's end of a stream failed */
};

/* 0 in a request: the default, or in `limits`, what it was. */
struct fn_limits {
    uint64_t memory;  /* bytes of linear memory */
    uint64_t fuel;    /* about one per instruction */
    uint64_t time_ns; /* as the host tells the time, several times a second */
    uint64_t output;  /* bytes of stdout */
};
_Static_assert(sizeof(struct fn_limits) == 32, "fn_limits");

#define FN_DEFAULT_MEMORY (16u << 20)
#define FN_DEFAULT_FUEL 10000000000ull
#define FN_DEFAULT_TIME 10000000000ull
#define FN_DEFAULT_OUTPUT (1u << 20)
#define FN_OUTPUT_MAX (16u << 20)

#define FN_REPLACE 1u
#define FN_GRANT_KEYS 2u

struct fn_deploy {
    uint16_t name_length;
    uint16_t flags; /* FN_REPLACE, FN_GRANT_* */
    uint32_t env_length;
    uint64_t module_length;
    struct fn_limits limits;
};
_Static_assert(sizeof(struct fn_deploy) == 48, "fn_deploy");

/* Labels are padded with zeroes to 32 bytes. */
#define FN_OFFER_LABEL "teemate functions offer 1"
#define FN_UPLOAD_LABEL "teemate functions upload 1"

struct fn_offered {
    uint8_t key[32];   /* X25519, of this offer alone */
    uint8_t owner[32]; /* whose the function will be */
};
_Static_assert(sizeof(struct fn_offered) == 64, "fn_offered");

struct fn_sealed {
    uint8_t key[32]; /* X25519, the uploader's, of this upload alone */
    uint8_t tag[16];
};
_Static_assert(sizeof(struct fn_sealed) == 48, "fn_sealed");

struct fn_name {
    uint16_t name_length;
    uint16_t reserved; /* 0 */
    uint32_t reserved2; /* 0 */
};
_Static_assert(sizeof(struct fn_name) == 8, "fn_name");

struct fn_info {
    uint8_t digest[32]; /* SHA-256 of the module */
    uint8_t owner[32];  /* the principal */
    uint64_t version;   /* 1 at first, one more whenever it is replaced */
    uint64_t size;      /* bytes of the module */
    uint64_t deployed;  /* ns of CLOCK_REALTIME; 0: nobody had told the time */
    uint64_t invocations;
    uint64_t failures;  /* of these: not ended with 0 */
    uint64_t fuel;      /* that all of them have used */
    struct fn_limits limits;
    uint16_t name_length;
    uint16_t flags;      /* FN_GRANT_* */
    uint32_t env_length; /* bytes of the deployed environment */
};
_Static_assert(sizeof(struct fn_info) == 152, "fn_info");

#define FN_STREAM 1u
#define FN_STREAM_PIECE 65536u

struct fn_invoke {
    uint16_t name_length;
    uint16_t flags; /* FN_STREAM */
    uint32_t args_length;
    uint32_t env_length;
    uint32_t stdin_length;
    uint64_t time_ns; /* less than the function's limit, or 0 */
};
_Static_assert(sizeof(struct fn_invoke) == 24, "fn_invoke");

/*
 * The reply has to have room for the function's limit of output, unless that is streamed: else TM_E_SPACE at once, and
 * the length that would do.
 */
struct fn_result {
    uint32_t limit; /* enum fn_limit; with FN_LIMIT only */
    int32_t exit_code;
    uint64_t maximum;   /* of the limit that was met; 0 where there is no number */
    uint64_t fuel;      /* used */
    uint64_t version;   /* of the function that ran */
    uint32_t text_length; /* why, or with FN_FAILED the end of stderr */
    uint32_t stdout_length;
    uint32_t warm;      /* 1: the module was ready */
    uint32_t reserved;  /* 0 */
};
_Static_assert(sizeof(struct fn_result) == 48, "fn_result");
#define FN_RESULT_TEXT 1024u /* bytes of its text at most */

struct fn_logs {
    uint16_t name_length;
    uint16_t reserved; /* 0 */
    uint32_t reserved2; /* 0 */
    uint64_t after;    /* only invocations with a larger number */
};
_Static_assert(sizeof(struct fn_logs) == 16, "fn_logs");

/* Of each invocation that wrote to stderr, or did not end with 0. */
struct fn_log {
    uint64_t invocation; /* the first is 1 */
    uint64_t time;       /* when it ended: ns of CLOCK_REALTIME; 0: unknown */
    uint32_t status;     /* 0 or enum fn_status */
    uint32_t limit;      /* enum fn_limit */
    int32_t exit_code;
    uint32_t text_length;
    uint64_t dropped;    /* bytes before the text that were not kept */
};
_Static_assert(sizeof(struct fn_log) == 40, "fn_log");

/* Of the caller, and of the enclave. */
struct fn_usage {
    uint64_t functions;
    uint64_t bytes;      /* of their modules */
    uint64_t bytes_max;
    uint64_t heap;       /* bytes */
    uint64_t heap_used;
    uint64_t heap_owned; /* blocks that belong to slots with holders: what runs, and what is kept ready */
    uint64_t keys;       /* that the caller's functions have put */
    uint64_t keys_bytes; /* with their values, and 72 for each */
    uint64_t keys_bytes_max;
    uint64_t heap_ready; /* bytes of it that were made ready in slots that have no holder yet */
};
_Static_assert(sizeof(struct fn_usage) == 80, "fn_usage");

#endif
