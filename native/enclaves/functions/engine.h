/* SPDX-License-Identifier: Apache-2.0 */
/* The engine's side of the line between C and Rust: engine/src is its mirror. */
#ifndef FUNCTIONS_ENGINE_H
#define FUNCTIONS_ENGINE_H

#include "tmsdk.h"

enum fn_outcome {
    FN_OUTCOME_DONE = 0,
    FN_OUTCOME_EXITED = 1,
    FN_OUTCOME_TRAPPED = 2,
    FN_OUTCOME_LIMIT = 3,
    FN_OUTCOME_UNSTARTABLE = 4,
};

struct engine_text {
    uint8_t bytes[240];
    uint32_t length;
};

struct engine_run {
    /* in */
    const uint8_t *args;
    size_t args_length;
    const uint8_t *env;
    size_t env_length;
    const uint8_t *in;
    size_t in_length;
    uint64_t memory;
    uint64_t fuel;
    uint64_t time_ns;
    uint64_t output;
    uint64_t stream; /* 1: standard streams lead to the caller while it runs */
    /* out */
    uint32_t outcome; /* enum fn_outcome */
    uint32_t limit;   /* enum fn_limit */
    int32_t exit_code;
    struct engine_text text;
    uint64_t fuel_used;
    const uint8_t *out;
    size_t out_length;
    const uint8_t *err;
    size_t err_length;
    uint64_t err_dropped;
    void *state;
};

/* All of these inside escape_run() only. */
/* `effort`: what engine_prepare() will take, in bytes of a usual module; UINT64_MAX when nobody can say. */
int engine_validate(const uint8_t *module, size_t length, uint32_t grants, struct engine_text *text,
                    uint64_t *effort);
void *engine_prepare(const uint8_t *module, size_t length, uint32_t grants, struct engine_text *text);
void engine_run(void *prepared, struct engine_run *run);
void engine_finish(void *state);
void engine_forget(void *prepared);
/* The public key of a private one, and what two agree on (RFC 7748); false: the other chose a point of low order. */
void engine_public_key(const uint8_t private_key[32], uint8_t public_key[32]);
bool engine_agree(const uint8_t private_key[32], const uint8_t other[32], uint8_t secret[32]);

/* What the engine calls (arena.c, slot.c). */
void *fn_alloc(size_t size, bool zeroed);
void *fn_realloc(void *old, size_t old_size, size_t size);
void fn_free(void *memory, size_t size);
/* stream.c: 0, or the caller's end failed.  *got is 0 at the end. */
int fn_stream_read(uint8_t *to, size_t room, size_t *got);
int fn_stream_write(const uint8_t *data, size_t length);
/* keys.c: what `teemate_keys` gives a module; 0, or an errno of WASI. */
int fn_keys_put(const uint8_t *key, size_t key_length, const uint8_t *value, size_t length);
int fn_keys_get(const uint8_t *key, size_t key_length, uint8_t *value, size_t room, uint32_t *length);
int fn_keys_delete(const uint8_t *key, size_t key_length);
int fn_keys_list(const uint8_t *prefix, size_t prefix_length, uint8_t *records, size_t room, uint64_t *cursor,
                 uint32_t *length);
__attribute__((noreturn)) void fn_escape(const uint8_t *text, size_t length);

#endif
