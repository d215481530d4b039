/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a warden gives up before it listens to anybody: capabilities, new
 * privileges, other descriptors, core dumps, and all system calls but those
 * that entering an enclave takes.
 */
#ifndef TEEMATE_WARDEN_SANDBOX_H
#define TEEMATE_WARDEN_SANDBOX_H

#include <stdbool.h>

/* Descriptors that the broker gives: its socketpair and, with storage, the enclave's folder. */
#define WARDEN_SOCKET 3
#define STORAGE_DIRECTORY 4

/*
 * Capabilities, privileges, descriptors other than 0 to 3 (0 and 1 become
 * /dev/null), limits, name.  With `storage` also STORAGE_DIRECTORY, which is opened anew so that its lock
 * is this process's own, and is all that can be opened anything in, where the kernel has Landlock.  Fails
 * with the errno of the step that failed and names it in *step.
 */
int sandbox_enter(bool storage, const char **step);

/* The warden's own list of system calls, longer with `storage`; holds for all threads made later. */
int sandbox_filter(bool storage);

/* The list for the disposable child that resumes a rewritten frame: shorter still. */
int sandbox_filter_child(void);

#endif
