/* SPDX-License-Identifier: Apache-2.0 */
/* What ECREATE refuses, for both backends: Linux's driver says no more than EIO. */
#include "secs.h"

#include "sim_thread.h"

const char *secs_fault(const struct create_params *params, const struct secs_limits *limits)
{
    uint64_t frame = (uint64_t)params->ssa_frame_pages * SGX_PAGE;
    uint64_t xfrm = params->attributes.xfrm;

    if (params->size & (params->size - 1) || params->size < 2 * SGX_PAGE || params->size > limits->size_max)
        return "the size must be a power of two from 8 KiB to what the processor takes (64 GiB at most)";
    if (params->base & (params->size - 1) || params->base >> 47)
        return "the base must be a multiple of the size and below 2^47";
    if (params->attributes.flags & ~limits->attributes)
        return "ATTRIBUTES has a bit that the processor does not have";
    if (!(params->attributes.flags & SGX_ATTR_MODE64BIT))
        return "ATTRIBUTES.MODE64BIT is not set: there are no 32-bit enclaves here";
    if ((xfrm & SGX_XFRM_LEGACY) != SGX_XFRM_LEGACY)
        return "XFRM must have bits 0 and 1 (x87, SSE)";
    if (xfrm & ~limits->xfrm)
        return "XFRM has a feature that this computer or its kernel does not have";
    if (params->miscselect & ~limits->miscselect)
        return "MISCSELECT has a bit that the processor does not have";
    if (frame > params->size ||
        frame < sim_xsave_size(xfrm) + sizeof(struct sgx_exinfo) + sizeof(struct sgx_gprs))
        return "the SSA frame does not fit: it must hold the XSAVE area of XFRM and 200 bytes";
    return NULL;
}
