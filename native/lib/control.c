/* SPDX-License-Identifier: Apache-2.0 */
/* Control ECALLs: keys, MACs and the entry itself. */
#include "control.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "crypto.h"

/* Pauses of an entry that has not begun, 100 ms each: the kernel has no EPC page for the TCS. */
#define WAITING_LIMIT 50u

void control_key_init(struct control_key *key, const uint8_t control_key[16])
{
    static const char label[TM_LABEL_SIZE] = TM_MACKEY_LABEL;
    struct timespec now;

    memcpy(key->key, control_key, sizeof(key->key));
    hmac_sha256(key->key, sizeof(key->key), label, sizeof(label), key->mac_key);
    clock_gettime(CLOCK_MONOTONIC, &now);
    key->sequence = (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static void control_mac(const struct control_key *key, const struct tm_control *control, uint8_t mac[32])
{
    struct {
        char label[TM_LABEL_SIZE];
        uint8_t head[offsetof(struct tm_control, result)];
    } covered = {.label = TM_CONTROL_LABEL};

    memcpy(covered.head, control, sizeof(covered.head));
    hmac_sha256_2(key->mac_key, sizeof(key->mac_key), &covered, sizeof(covered), control->data,
                  sizeof(control->data), mac);
}

void control_sign(struct control_key *key, struct tm_control *control)
{
    control->sequence = ++key->sequence;
    control_mac(key, control, control->mac);
}

void control_bind(const struct control_key *key, uint64_t slot, uint64_t generation,
                  const struct tm_identity *identity, struct tm_bind *bind)
{
    struct {
        char label[TM_LABEL_SIZE];
        uint64_t slot;
        uint64_t generation;
        struct tm_identity identity;
    } covered = {.label = TM_BIND_LABEL, .slot = slot, .generation = generation, .identity = *identity};

    bind->generation = generation;
    bind->identity = *identity;
    hmac_sha256(key->mac_key, sizeof(key->mac_key), &covered, sizeof(covered), bind->mac);
}

/* What the vDSO's contract says about an exit that is not EEXIT. */
static void control_faulted(const struct sgx_enclave_run *run, uint32_t function, struct control_exit *exit)
{
    exit->vector = run->exception_vector + 1u;
    exit->inside = run->function != SGX_EENTER;
    if (run->exception_vector == SGX_VECTOR_MC)
        exit->status = -ENODEV;
    else if (exit->inside)
        exit->status = -EFAULT;
    else if (function == SGX_EENTER && run->exception_vector == SGX_VECTOR_PF)
        exit->status = -ENODEV;
    else
        exit->status = -EBUSY;
}

/*
 * Enter with the control key until the entry has ended; it goes on when it is paused.
 * *function is the leaf that it ended with, as control_faulted() wants it.
 */
static int control_go(struct teemate_enclave *enclave, uint64_t tcs_offset, const struct control_key *key,
                      struct teemate_regs *regs, struct sgx_enclave_run *run, uint32_t *function)
{
    const struct teemate_regs wanted = *regs;
    uint32_t waited = 0;
    int outcome;

    *function = SGX_EENTER;
    for (;;) {
        *regs = wanted;
        memcpy(&regs->r12, key->key, 8);
        memcpy(&regs->r13, key->key + 8, 8);
        outcome = enclave_enter(enclave, tcs_offset, regs, *function, 0, ENTRY_STACK_CALLER, run);
        if (outcome != TEEMATE_PAUSED)
            return outcome;
        *function = run->function;
        if (*function == SGX_EENTER && ++waited == WAITING_LIMIT)
            return -EBUSY;
    }
}

int control_unwind(struct teemate_enclave *enclave, uint64_t tcs_offset, const struct control_key *key,
                   uint64_t generation, struct control_slot *slot, struct control_exit *exit)
{
    struct teemate_regs regs = {.rdi = TM_SEL_UNWIND, .rsi = generation};
    struct sgx_enclave_run run = {0};
    uint32_t function;
    int outcome = control_go(enclave, tcs_offset, key, &regs, &run, &function);

    memset(exit, 0, sizeof(*exit));
    memset(slot, 0, sizeof(*slot));
    if (outcome < 0)
        return outcome;
    if (outcome == TEEMATE_LANDED && regs.rdi == TM_EXIT_UNWOUND) {
        *slot = (struct control_slot){.cssa = regs.rsi, .word = regs.rdx, .unwound = regs.r8 == 1};
        return 0;
    }
    /* A rewritten frame lands with zeros as a refusal does; only who has the wrong key gets nothing else. */
    if (outcome == TEEMATE_LANDED)
        return -EAGAIN;
    if (run.function == SGX_EEXIT)
        return -EBADMSG;
    control_faulted(&run, function, exit);
    if (exit->status == -EFAULT && run.exception_vector == SGX_VECTOR_GP)
        return -EAGAIN; /* ERESUME found the frame gone */
    return exit->status;
}

void control_enter(struct teemate_enclave *enclave, uint64_t tcs_offset, const struct control_key *key,
                   const struct tm_control *control, struct tm_control_result *result,
                   struct control_exit *exit)
{
    struct tm_control request = *control;
    struct teemate_regs regs = {.rdi = TM_SEL_CONTROL, .rsi = (uintptr_t)&request};
    struct sgx_enclave_run run = {0};
    uint32_t function;
    int outcome;

    memset(exit, 0, sizeof(*exit));
    memset(result, 0, sizeof(*result));
    request.result = (uintptr_t)result;
    outcome = control_go(enclave, tcs_offset, key, &regs, &run, &function);
    crypto_wipe(&request, sizeof(request));
    if (outcome < 0) {
        exit->status = outcome;
    } else if (outcome == TEEMATE_LANDED) {
        exit->status = -EACCES;
    } else if (run.function != SGX_EEXIT) {
        control_faulted(&run, function, exit);
    } else if (regs.rdi != TM_EXIT_DONE || (int64_t)regs.rsi < INT32_MIN || (int64_t)regs.rsi > INT32_MAX) {
        exit->status = -EBADMSG; /* a control ECALL makes no OCALLs */
    } else {
        exit->entered = 1;
        exit->status = (int32_t)(int64_t)regs.rsi;
    }
}

int control_io(struct teemate_enclave *enclave, uint64_t tcs_offset, const struct control_key *key,
               struct tm_io_step *step, struct control_exit *exit)
{
    struct teemate_regs regs = {.rdi = TM_SEL_IO, .rsi = (uintptr_t)step};
    struct sgx_enclave_run run = {0};
    uint32_t function;
    int outcome = control_go(enclave, tcs_offset, key, &regs, &run, &function);

    memset(exit, 0, sizeof(*exit));
    if (outcome < 0)
        exit->status = outcome;
    else if (outcome == TEEMATE_LANDED)
        exit->status = -EACCES;
    else if (run.function != SGX_EEXIT)
        control_faulted(&run, function, exit);
    else if (regs.rdi != TM_EXIT_DONE || (int64_t)regs.rsi > 0 || (int64_t)regs.rsi < INT32_MIN)
        exit->status = -EBADMSG;
    else {
        exit->entered = 1;
        exit->status = (int32_t)(int64_t)regs.rsi;
    }
    return exit->status;
}

/* count runs of `length` bytes, `stride` apart, from `offset`: all inside of `size`? */
static bool runs_fit(uint64_t size, uint64_t offset, uint64_t stride, uint64_t length, uint64_t count)
{
    uint64_t end;

    if (stride < length || offset % SGX_PAGE != 0 || stride % SGX_PAGE != 0)
        return false;
    return !__builtin_mul_overflow(stride, count - 1, &end) && !__builtin_add_overflow(end, offset, &end) &&
           !__builtin_add_overflow(end, length, &end) && end <= size;
}

int control_header(const struct teemate_enclave_info *info, struct tm_image_header *header,
                   struct teemate_diag *diag)
{
    uint64_t slots;
    uint64_t frames;

    memcpy(header, info->header, sizeof(*header));
    if (!info->sdk || header->magic != TM_IMAGE_MAGIC)
        return diag_set(diag, -ENOTSUP, TEEMATE_STEP_CONTROL, 0, 0,
                        "the image was not built with the SDK: it has no image header, no slots, no gate");
    if (header->abi_version != TM_ABI_VERSION)
        return diag_set(diag, -ENOTSUP, TEEMATE_STEP_CONTROL, (int)header->abi_version, 0,
                        "the image speaks version %u of the enclave interface, this library version %u",
                        header->abi_version, TM_ABI_VERSION);
    slots = (uint64_t)TM_WARDEN_SLOTS + header->io_slots + header->client_slots;
    frames = (uint64_t)header->nssa * header->ssa_frame_size;
    if (slots > TM_MAX_SLOTS || header->nssa < 1 || header->nssa > 0xffff || frames == 0 ||
        header->size != info->size || !runs_fit(info->size, header->tcs_offset, SGX_PAGE, SGX_PAGE, slots))
        return diag_set(diag, -ENOTSUP, TEEMATE_STEP_CONTROL, 0, 0,
                        "the image header names slots that do not lie in the enclave");
    return 0;
}
