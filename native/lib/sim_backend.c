/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "enclave.h"
#include "sim.h"
#include "sim_enclu.h"
#include "sim_thread.h"

static int available(struct teemate_diag *diag)
{
    if (!sim_xcr0()) /* SSA frames hold XSAVE areas */
        return diag_set(diag, -ENODEV, TEEMATE_STEP_ECREATE, 0, 0, "the sim needs a processor and kernel with XSAVE");
    return 0;
}

static int create(struct teemate_enclave *enclave, const struct create_params *params, struct teemate_diag *diag)
{
    enclave->process = fork_process();
    return sim_create(enclave, params, diag);
}

static int open_enclave(struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    enclave->process = fork_process();
    return sim_open(enclave, diag);
}

/*
 * The reservation is the one mapping, without any permission: sim_page_fault brings each segment's pages in,
 * with what the segment and the EPCM allow, and what lies between segments stays out.  So it
 * costs the same whatever the image is made of.
 */
static int map(struct teemate_enclave *enclave, struct teemate_diag *diag)
{
    struct sim_mapping *sim = enclave->sim;
    int error = sim_may_map(enclave, diag);

    if (error)
        return error;
    error = sim_view_open(enclave);
    /* Nothing was brought in yet: what the EPCM loses from now on is flushed before the next entry. */
    atomic_store(&sim->epoch, atomic_load(&sim->header->epoch));
    if (error)
        diag_set(diag, error, TEEMATE_STEP_MAP, 0, 0, "cannot map the %llu MiB of the simulated enclave: %s",
                 (unsigned long long)enclave->size >> 20, strerror(-error));
    return error;
}

/* The index of the TCS at `offset`, or -EINVAL. */
static int tcs_index(const struct teemate_enclave *enclave, uint64_t offset)
{
    uint64_t entry = atomic_load(&enclave->sim->epcm[offset / SGX_PAGE]);

    if (!(entry & SIM_EPCM_VALID) || SIM_EPCM_TYPE(entry) != SGX_PT_TCS || SIM_EPCM_TCS(entry) >= SIM_TCS_MAX)
        return -EINVAL;
    return (int)SIM_EPCM_TCS(entry);
}

/*
 * Nothing is mapped: the page of a TCS is readable for nobody, and the reservation refuses
 * as well as a mapping would.  Who may enter is a mark of this process.
 */
static int map_tcs(struct teemate_enclave *enclave, uint64_t offset, struct teemate_diag *diag)
{
    int index = tcs_index(enclave, offset);

    if (index < 0)
        return diag_set(diag, index, TEEMATE_STEP_MAP, 0, offset, "there is no TCS at offset %#llx",
                        (unsigned long long)offset);
    atomic_store(&enclave->sim->tcs_mapped[index], 1);
    sim_fetch_for(enclave, &enclave->sim->tcs[index]);
    return 0;
}

static int unmap_tcs(struct teemate_enclave *enclave, uint64_t offset)
{
    int index = tcs_index(enclave, offset);

    if (index < 0)
        return index;
    atomic_store(&enclave->sim->tcs_mapped[index], 0);
    return 0;
}

static void close_enclave(struct teemate_enclave *enclave)
{
    if (enclave_is_ours(enclave)) {
        enclave_unmap(enclave);
        sim_close(enclave);
        return;
    }
    /* A child of fork has none of the mappings; something else may be at their addresses. */
    free(enclave->sim);
    enclave->sim = NULL;
}

/* Registers of the dead: nothing that could be taken for an address. */
#define POISON 0xdeaddeaddeaddeadull

int sim_tcs_bury(struct teemate_enclave *enclave, uint64_t tcs_offset)
{
    struct sim_mapping *sim = enclave->sim;
    uint64_t size = (uint64_t)enclave->info.ssa_frame_pages * SGX_PAGE, word, frame;
    struct sgx_gprs *gprs;
    int index, error;
    uint64_t *all;
    uint8_t *ssa;

    if (!enclave_is_ours(enclave))
        return -ENOTCONN;
    if (tcs_offset >= enclave->size)
        return -EINVAL;
    index = tcs_index(enclave, tcs_offset);
    if (index < 0)
        return index;
    error = sim_view_open(enclave);
    if (error)
        return error;
    word = atomic_load(&sim->tcs[index].word);
    if (!(word & SIM_TCS_BUSY))
        return 0;
    frame = sim->tcs[index].ossa + SIM_TCS_CSSA(word) * size;
    if (frame > enclave->size || size > enclave->size - frame)
        return -EBADMSG;
    ssa = sim->view + frame;
    /* The holder is dead and nobody else touches a busy TCS's frame.  ERESUME refuses what
     * lies there (RIP is not canonical) until the enclave has written a frame of its own. */
    memset(ssa, 0, size);
    gprs = (struct sgx_gprs *)(ssa + size - sizeof(*gprs));
    all = (uint64_t *)gprs;
    for (size_t i = 0; i < sizeof(*gprs) / sizeof(*all); i++)
        all[i] = POISON;
    gprs->rflags = 0x202;
    gprs->exitinfo = 0;
    gprs->reserved = 0;
    *(uint16_t *)ssa = 0x37f;         /* FCW */
    *(uint32_t *)(ssa + 24) = 0x1f80; /* MXCSR */
    if (!atomic_compare_exchange_strong(&sim->tcs[index].word, &word, SIM_TCS_WORD(0, SIM_TCS_CSSA(word) + 1, 0)))
        return -EAGAIN;
    return 1;
}

const struct backend backend_sim = {
    .name = "sim",
    .id = TEEMATE_SIM,
    .available = available,
    .enterable = available,
    .create = create,
    .add_pages = sim_add_pages,
    .init = sim_init,
    .open = open_enclave,
    .reserves_file = true,
    .map = map,
    .map_tcs = map_tcs,
    .unmap_tcs = unmap_tcs,
    .enter = sim_enter,
    .restrict_permissions = sim_restrict_permissions,
    .modify_types = sim_modify_types,
    .remove_pages = sim_remove_pages,
    .close = close_enclave,
};
