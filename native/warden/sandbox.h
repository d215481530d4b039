/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a warden gives up before it listens to anybody: capabilities, new
 * privileges, other descriptors, core dumps, and all system calls but those
 * that entering an enclave takes.
 */
#ifndef TEEMATE_WARDEN_SANDBOX_H
#define TEEMATE_WARDEN_SANDBOX_H

/*
 * Capabilities, privileges, descriptors other than 0 to 3 (0 and 1 become
 * /dev/null), limits, name.  Fails with the errno of the step that failed and
 * names it in *step.
 */
int sandbox_enter(const char **step);

/* The warden's own list of system calls; holds for all threads made later. */
int sandbox_filter(void);

/* The list for the disposable child that resumes a rewritten frame: shorter still. */
int sandbox_filter_child(void);

#endif
