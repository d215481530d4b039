/* SPDX-License-Identifier: Apache-2.0 */
/* Where sim_entry.S finds the fields of struct sim_thread; checked in sim_enter.c. */
#ifndef TEEMATE_SIM_OFFSETS_H
#define TEEMATE_SIM_OFFSETS_H

#include "entry_offsets.h"

#define THREAD_INSIDE 16
#define THREAD_NO_FSGSBASE 20
#define THREAD_FS 24
#define THREAD_GS 32
#define THREAD_TCS 40
#define THREAD_CSSA 48
#define THREAD_XFRM 56
#define THREAD_XSAVE 64
#define THREAD_FRAME 128
#define THREAD_GPRS 168

/* What sim_go() wants done. */
#define SIM_GO_EENTER 1
#define SIM_GO_ERESUME 2
#define SIM_GO_FAULT 3

#endif
