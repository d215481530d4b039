/* SPDX-License-Identifier: Apache-2.0 */
/* OCALLs: out with a request in the caller's buffer, back with its answer in the same place. */
#include <stdarg.h>

#include "files.h"
#include "lock.h"

/*
 * The buffer was checked when the ECALL came in.  The slot is PARKED while the
 * caller works; the nonce lets in the answer to this OCALL only.
 */
static struct ocall_answer leave(uint64_t kind, uint64_t length)
{
    struct ocall_answer answer = tm_gate_ocall(kind, length, random_word() | 1);

    /* Whatever the host calls its failure: an author sees one status. */
    if (answer.status) {
        answer.status = TM_E_OCALL;
        answer.length = 0;
    }
    return answer;
}

int tm_ocall(const char *name, const void *in, size_t in_len, void *out, size_t out_cap, size_t *out_len)
{
    struct thread *self = thread_self();
    uint8_t *buffer = (uint8_t *)self->call.ocall_buf;
    size_t name_len = strlen(name);
    uint32_t length = (uint32_t)name_len;
    struct ocall_answer answer;
    uint64_t total;

    if (out_len)
        *out_len = 0;
    if (!self->in_call || self->lock_count)
        return TM_E_STATE;
    if (!name_len || name_len > TM_NAME_MAX)
        return TM_E_ARGUMENT;
    if (__builtin_add_overflow(sizeof(length) + name_len, (uint64_t)in_len, &total) ||
        total > self->call.ocall_cap)
        return TM_E_SPACE;
    memcpy(buffer, &length, sizeof(length));
    memcpy(buffer + sizeof(length), name, name_len);
    memcpy(buffer + sizeof(length) + name_len, in, in_len);
    answer = leave(TM_OCALL_NAMED, total);
    if (answer.status)
        return TM_E_OCALL;
    if (answer.length > self->call.ocall_cap)
        return TM_E_OCALL;
    if (answer.length > out_cap)
        return TM_E_SPACE;
    memcpy(out, buffer, answer.length);
    if (out_len)
        *out_len = answer.length;
    return 0;
}

bool ocall_possible(void)
{
    struct thread *self = thread_self();

    return self->in_call && !self->lock_count;
}

/* WAIT and WAKE; what comes back is a hint, so its status is not looked at. */
void ocall_wait(enum tm_ocall kind, uint32_t index, uint32_t expected, uint64_t timeout_ns)
{
    struct tm_ocall_wait request = {.index = index, .expected = expected, .timeout_ns = timeout_ns};

    memcpy((void *)thread_self()->call.ocall_buf, &request, sizeof(request));
    leave(kind, sizeof(request));
}

int64_t ocall_file(const struct tm_file_request *request, void *data)
{
    struct thread *self = thread_self();
    uint8_t *buffer = (uint8_t *)self->call.ocall_buf;
    bool writes = request->op == TM_FILE_OP_WRITE;
    uint64_t room = request->op == TM_FILE_OP_READ ? request->length : 0;
    uint64_t total = sizeof(*request) + (writes ? request->length : 0);
    struct ocall_answer answer;
    int64_t result;

    if (total > self->call.ocall_cap || sizeof(result) + room > self->call.ocall_cap)
        return -TM_EINVAL;
    memcpy(buffer, request, sizeof(*request));
    if (writes)
        memcpy(buffer + sizeof(*request), data, request->length);
    answer = leave(TM_OCALL_FILE, total);
    if (answer.status || answer.length < sizeof(result) || answer.length > sizeof(result) + room)
        return -TM_EIO;
    memcpy(&result, buffer, sizeof(result));
    if (room && result > 0) {
        if ((uint64_t)result != answer.length - sizeof(result))
            return -TM_EIO;
        memcpy(data, buffer + sizeof(result), (size_t)result);
    }
    return result;
}

struct text {
    char bytes[512];
    size_t length;
};

static void put(struct text *text, char c)
{
    if (text->length < sizeof(text->bytes))
        text->bytes[text->length++] = c;
}

static void put_number(struct text *text, uint64_t value, unsigned base, bool negative)
{
    char digits[24];
    int n = 0;

    do
        digits[n++] = "0123456789abcdef"[value % base];
    while (value /= base);
    if (negative)
        put(text, '-');
    while (n)
        put(text, digits[--n]);
}

void tm_print(const char *format, ...)
{
    struct text text = {.length = 0};
    va_list args;

    if (!(header()->flags & TM_IMAGE_DEBUG) || !ocall_possible())
        return;
    va_start(args, format);
    for (; *format; format++) {
        bool wide = false;

        if (*format != '%') {
            put(&text, *format);
            continue;
        }
        for (format++; *format == 'l' || *format == 'z'; format++)
            wide = true;
        switch (*format) {
        case 's':
            for (const char *s = va_arg(args, const char *); *s; s++)
                put(&text, *s);
            break;
        case 'c':
            put(&text, (char)va_arg(args, int));
            break;
        case 'd': {
            int64_t value = wide ? va_arg(args, int64_t) : va_arg(args, int);
            put_number(&text, value < 0 ? -(uint64_t)value : (uint64_t)value, 10, value < 0);
            break;
        }
        case 'u':
        case 'x':
            put_number(&text, wide ? va_arg(args, uint64_t) : va_arg(args, unsigned),
                       *format == 'u' ? 10 : 16, false);
            break;
        case 'p':
            put_number(&text, (uint64_t)va_arg(args, void *), 16, false);
            break;
        case '%':
            put(&text, '%');
            break;
        default: /* as the compiler's check of formats let it through: show it as it stands */
            put(&text, '%');
            if (!*format)
                format--;
            else
                put(&text, *format);
        }
    }
    va_end(args);
    memcpy((void *)thread_self()->call.ocall_buf, text.bytes, text.length);
    leave(TM_OCALL_PRINT, text.length);
}
