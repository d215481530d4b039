/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TEEMATE_AES_H
#define TEEMATE_AES_H

#include "crypto.h"

/* ECB over whole blocks; `in` may be `out`. */
void aes128_encrypt_blocks(const struct aes128 *aes, const uint8_t *in, uint8_t *out, size_t blocks);

#endif
