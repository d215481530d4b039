/* SPDX-License-Identifier: Apache-2.0 */
#include <stdarg.h>
#include <stdio.h>

#include "enclave.h"

int diag_set(struct teemate_diag *diag, int error, enum teemate_step step, int code, uint64_t offset,
             const char *format, ...)
{
    if (diag) {
        va_list args;
        *diag = (struct teemate_diag){.step = (int32_t)step, .code = code, .offset = offset};
        va_start(args, format);
        vsnprintf(diag->text, sizeof(diag->text), format, args);
        va_end(args);
    }
    return error;
}
