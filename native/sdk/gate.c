/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Behind the gate on a client's slot: whose slot is it now, and what is asked.
 * The slot word is INSIDE all the time; entry.S makes it ARMED at the way out.
 */
#include "crypto.h"
#include "thread.h"

/* One page, measured, filled by `teemate image build`. */
__attribute__((section(".tm_header"), used, aligned(4096))) const struct tm_image_header tm_image_header;

/*
 * Bind the slot's generation to the identity at `address`, once.  The same
 * identity again is fine (the caller may not have heard of its first success).
 */
int bind_identity(struct thread *self, uint64_t address)
{
    uint64_t generation = TM_WORD_GENERATION(self->word);
    struct {
        uint8_t label[TM_LABEL_SIZE];
        uint64_t slot;
        uint64_t generation;
        struct tm_identity identity;
    } text = {.label = TM_BIND_LABEL, .slot = self->fixed.index};
    struct tm_bind bind;
    uint8_t mac[32];

    if (!range_outside(address, sizeof(bind)))
        return TM_E_ARGUMENT;
    memcpy(&bind, (const void *)address, sizeof(bind));
    if (bind.generation != generation)
        return TM_E_STATE;
    text.generation = generation;
    text.identity = bind.identity;
    hmac_sha256(tm_mac_key, sizeof(tm_mac_key), &text, sizeof(text), mac);
    if (tm_compare(mac, bind.mac, sizeof(mac)))
        return TM_E_MAC;
    if (self->bound == generation)
        return tm_compare(&self->identity, &bind.identity, sizeof(bind.identity)) ? TM_E_STATE : 0;
    self->identity = bind.identity;
    __atomic_store_n(&self->bound, generation, __ATOMIC_RELEASE);
    return 0;
}

struct gate_result tm_gate_client(uint64_t selector, uint64_t argument)
{
    struct thread *self = thread_self();
    struct gate_result result = {TM_E_ARGUMENT, 0};

    /* From now on this slot has to be scrubbed before it is armed again. */
    if (!self->used)
        self->used = TM_WORD_GENERATION(self->word);
    if (tm_control_state != CONTROL_READY)
        result.status = TM_E_NOTREADY;
    else if (selector == TM_SEL_ECALL)
        result.status = ecall(self, argument, &result.length);
    else if (selector == TM_SEL_BIND)
        result.status = bind_identity(self, argument);
    self->calls++;
    return result;
}
