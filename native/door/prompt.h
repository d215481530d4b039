/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TEEMATE_DOOR_PROMPT_H
#define TEEMATE_DOOR_PROMPT_H

/* cffi: begin */

/*
 * Asks the scheduler to let the calling thread run soon after it was woken: slices of `slice_us`
 * (Linux 6.12; no more CPU time than others get, but sooner), and the priority `nice` if that is
 * allowed.  Threads and processes that it starts are ordinary again.  A thread of another policy than
 * SCHED_OTHER keeps it.  Returns 0, or 1 when the priority is not allowed; fails as sched_setattr(2).
 */
int door_be_prompt(int nice, unsigned int slice_us);

/* cffi: end */

#endif
