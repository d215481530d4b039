/* SPDX-License-Identifier: Apache-2.0 */
/* Standard streams that lead to the caller while a module runs: OCALLs, in pieces.  What comes is a payload as any. */
#include "engine.h"
#include "functions.h"

int fn_stream_read(uint8_t *to, size_t room, size_t *got)
{
    uint32_t most = room < FN_STREAM_PIECE ? (uint32_t)room : FN_STREAM_PIECE;

    return tm_ocall("stdin", &most, sizeof(most), to, most, got);
}

int fn_stream_write(const uint8_t *data, size_t length)
{
    int status = 0;

    while (length && !status) {
        size_t some = length < FN_STREAM_PIECE ? length : FN_STREAM_PIECE;

        status = tm_ocall("stdout", data, some, NULL, 0, NULL);
        data += some;
        length -= some;
    }
    return status;
}
