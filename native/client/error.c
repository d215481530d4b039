/* SPDX-License-Identifier: Apache-2.0 */
/* Codes and sentences: what the broker answered, what the library's lower half met, what the enclave said. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "client.h"

static const char *const names[] = {
    [TEEMATE_OK] = "ok",
    [TEEMATE_NOT_FOUND] = "not-found",
    [TEEMATE_DENIED] = "denied",
    [TEEMATE_BUSY] = "busy",
    [TEEMATE_LIMIT_REACHED] = "limit-reached",
    [TEEMATE_REVOKED] = "revoked",
    [TEEMATE_DRAINING] = "draining",
    [TEEMATE_ADDRESS_IN_USE] = "address-in-use",
    [TEEMATE_NOT_ATTACHED] = "not-attached",
    [TEEMATE_IMAGE_ERROR] = "image-error",
    [TEEMATE_ENCLAVE_FAULT] = "enclave-fault",
    [TEEMATE_ENCLAVE_LOST] = "enclave-lost",
    [TEEMATE_CALL_TIMEOUT] = "call-timeout",
    [TEEMATE_CALL_FAILED] = "call-failed",
    [TEEMATE_PROTOCOL_ERROR] = "protocol-error",
    [TEEMATE_UNSUPPORTED] = "unsupported",
    [TEEMATE_CONNECTION_LOST] = "connection-lost",
    [TEEMATE_INTERNAL_ERROR] = "internal-error",
    [TEEMATE_CALL_ABANDONED] = "call-abandoned",
    [TEEMATE_BAD_ARGUMENT] = "bad-argument",
};
#define CODES (sizeof(names) / sizeof(names[0]))

const char *teemate_code_name(int code)
{
    return code >= 0 && (size_t)code < CODES ? names[code] : "unknown";
}

int error_set(struct teemate_error *error, int code, const char *format, ...)
{
    if (error != NULL) {
        va_list args;

        *error = (struct teemate_error){.code = code};
        va_start(args, format);
        vsnprintf(error->text, sizeof(error->text), format, args);
        va_end(args);
    }
    return code;
}

int error_copy(struct teemate_error *error, const struct teemate_error *from)
{
    if (error != NULL && error != from)
        *error = *from;
    return from->code;
}

int error_read(struct teemate_error *error, const struct value *untrusted)
{
    struct value code = map_value(untrusted, "code"), message = map_value(untrusted, "message");
    struct value detail = map_value(untrusted, "detail"), limit, setting;
    int known = TEEMATE_INTERNAL_ERROR; /* a code of a later broker's */

    for (size_t i = 1; i < CODES; i++)
        if (i != TEEMATE_CALL_FAILED && value_is_text(&code, names[i]))
            known = (int)i;
    if (error == NULL)
        return known;
    *error = (struct teemate_error){.code = known};
    if (message.kind == VALUE_TEXT)
        text_copy(error->text, sizeof(error->text), message.data, message.size);
    else
        snprintf(error->text, sizeof(error->text), "the broker gave no reason");
    limit = map_value(&detail, "limit");
    setting = map_value(&detail, "setting");
    if (limit.kind == VALUE_TEXT)
        text_copy(error->limit, sizeof(error->limit), limit.data, limit.size);
    if (setting.kind == VALUE_TEXT)
        text_copy(error->setting, sizeof(error->setting), setting.data, setting.size);
    return known;
}

int error_native(struct teemate_error *error, int number, const struct teemate_diag *diag, const char *doing)
{
    bool map = diag != NULL && diag->step == TEEMATE_STEP_MAP;
    int code = TEEMATE_INTERNAL_ERROR;

    switch (-number) {
    case EEXIST:
        code = TEEMATE_ADDRESS_IN_USE;
        break;
    case ENOTCONN:
        code = TEEMATE_NOT_ATTACHED;
        break;
    case ESTALE:
        code = diag == NULL || diag->step == TEEMATE_STEP_NONE ? TEEMATE_ENCLAVE_LOST : TEEMATE_INTERNAL_ERROR;
        break;
    case EBUSY:
    case EDEADLK:
        code = TEEMATE_BUSY;
        break;
    case EACCES:
    case EPERM:
        code = map ? TEEMATE_DENIED : TEEMATE_INTERNAL_ERROR;
        break;
    case ENODEV:
    case ENOTSUP:
        code = TEEMATE_UNSUPPORTED;
        break;
    case ENOMEM:
    case ENOSPC:
    case EMFILE:
    case ENFILE:
    case EAGAIN:
        code = TEEMATE_LIMIT_REACHED;
        break;
    default:
        break;
    }
    error_set(error, code, "%s: %s", doing,
              diag != NULL && diag->text[0] != 0 ? diag->text : strerror(-number));
    if (error != NULL)
        error->system_errno = -number;
    return code;
}

int error_status(struct teemate_error *error, int status, const char *enclave, const char *name, uint64_t length,
                 const uint8_t *reply, size_t reply_size)
{
    static const char *const reasons[] = {
        [-TM_E_ARGUMENT] = "the enclave refuses an argument: a range is in the enclave, too long, or a field is wrong",
        [-TM_E_STATE] = "the slot is of another generation: release it and acquire another",
        [-TM_E_OWNERDEAD] = "the holder of a lock died; its data may need repair",
        [-TM_E_OCALL] = "an OCALL of it was refused or failed",
        [-TM_E_NOTREADY] = "the enclave has not been started yet",
        [-TM_E_PLATFORM] = "a report is of another platform: the sim, another computer, or other microcode",
    };
    struct tm_holder holder;
    char who[40] = "";
    int code = TEEMATE_CALL_FAILED;

    switch (status) {
    case TM_E_UNKNOWN:
        code = error_set(error, TEEMATE_NOT_FOUND, "%s: call '%s': the image has no ECALL of that name", enclave, name);
        break;
    case TM_E_NOMEM:
        code = error_set(error, TEEMATE_LIMIT_REACHED,
                         "%s: call '%s': the enclave's heap is full: build the image with more --heap", enclave, name);
        break;
    case TM_E_SPACE:
        code = error_set(error, TEEMATE_LIMIT_REACHED,
                         "%s: call '%s': the answer has %llu bytes: give the call room for as many", enclave, name,
                         (unsigned long long)length);
        if (error != NULL)
            error->needed = length;
        break;
    case TM_E_BUSY:
        if (reply_size == sizeof(holder)) {
            memcpy(&holder, reply, sizeof(holder));
            snprintf(who, sizeof(who), " (slot %u has it)", holder.slot);
        }
        code = error_set(error, TEEMATE_BUSY,
                         "%s: call '%s': a lock inside the enclave was not free within its patience%s: try again", enclave,
                         name, who);
        break;
    case TM_E_UNBOUND:
    case TM_E_MAC:
        code = error_set(error, TEEMATE_DENIED,
                         "%s: call '%s': the enclave does not accept this slot's identity (status %d): release the slot and"
                         " acquire another", enclave, name, status);
        break;
    default:
        if (status > 0)
            code = error_set(error, TEEMATE_CALL_FAILED,
                             "%s: call '%s' answered status %d: see the image's documentation", enclave, name, status);
        else if (-status < (int)(sizeof(reasons) / sizeof(reasons[0])) && reasons[-status] != NULL)
            code = error_set(error, TEEMATE_CALL_FAILED, "%s: call '%s': %s", enclave, name, reasons[-status]);
        else
            code = error_set(error, TEEMATE_CALL_FAILED, "%s: call '%s': status %d", enclave, name, status);
    }
    if (error != NULL)
        error->status = status;
    return code;
}

/* SDM volume 3A, table 6-1; those that an enclave's code can raise. */
static const char *vector_name(unsigned vector)
{
    switch (vector) {
    case SGX_VECTOR_DE:
        return "#DE (divide error)";
    case SGX_VECTOR_DB:
        return "#DB (debug exception)";
    case SGX_VECTOR_BP:
        return "#BP (breakpoint)";
    case SGX_VECTOR_BR:
        return "#BR (bound range exceeded)";
    case SGX_VECTOR_UD:
        return "#UD (illegal instruction)";
    case SGX_VECTOR_GP:
        return "#GP (general protection)";
    case SGX_VECTOR_PF:
        return "#PF (page fault)";
    case SGX_VECTOR_MF:
        return "#MF (x87 floating-point error)";
    case SGX_VECTOR_AC:
        return "#AC (alignment check)";
    case SGX_VECTOR_XM:
        return "#XM (SIMD floating-point exception)";
    default:
        return "an exception";
    }
}

int error_fault(struct teemate_error *error, const struct sgx_enclave_run *run, const struct teemate_enclave_entry *enclave,
                const char *name)
{
    uint64_t address = run->exception_addr;
    char where[64] = "";

    if (run->exception_vector == SGX_VECTOR_PF && address - enclave->base < enclave->size)
        snprintf(where, sizeof(where), " in the page at base + %#llx", (unsigned long long)(address - enclave->base));
    else if (run->exception_vector == SGX_VECTOR_PF)
        snprintf(where, sizeof(where), " in the page at %#llx", (unsigned long long)address);
    error_set(error, TEEMATE_ENCLAVE_FAULT, "%s: call '%s': %s%s%s", enclave->name, name, vector_name(run->exception_vector),
              where,
              run->function == SGX_EENTER
                  ? " while entering: the TCS is busy or has no SSA frame left, or the enclave's memory is gone: give the"
                    " lease back and acquire another slot"
                  : "; the slot is out of use");
    if (error != NULL) {
        error->vector = run->exception_vector;
        error->address = run->exception_vector == SGX_VECTOR_PF ? address : 0;
    }
    return TEEMATE_ENCLAVE_FAULT;
}
