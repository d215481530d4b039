/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The branches of the SDM's pseudo-code, by name.
 *
 *   if (SIM_CHECK("EREPORT.TARGETINFO.ALIGN", regs->rbx & 511))
 *       return sim_gp(fault);
 *
 * Each id stands once in the sim's sources and is guarded by at least one tested
 * row of tests/conformance/table/.  In a mutation build (-DSIM_MUTATIONS) the
 * branch whose id is in the environment variable TEEMATE_SIM_MUTANT is not there:
 * its condition is false.  The conformance tests run every mutant and fail when one
 * survives.  In other builds the macro is its condition and the id costs nothing.
 *
 * An effect instead of a branch (CR2's low bits cleared, a register scrubbed):
 *
 *   if (SIM_STEP("AEX.CR2"))
 *       address &= ~0xfffull;
 *
 * Use them in C; a branch in assembly asks sim_mutated() before it gets there, or keeps
 * its condition in a field that C fills in.
 */
#ifndef TEEMATE_SIM_CHECK_H
#define TEEMATE_SIM_CHECK_H

#include <stdbool.h>

#ifdef SIM_MUTATIONS
/* Async-signal-safe: the environment is read once, before main. */
bool sim_mutated(const char *id);
#define SIM_CHECK(id, condition) (!sim_mutated(id) && (condition))
#else
#define SIM_CHECK(id, condition) (condition)
#endif

#define SIM_STEP(id) SIM_CHECK(id, true)

#endif
