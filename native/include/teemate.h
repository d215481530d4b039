/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libteemate: make SGX enclaves, map them and enter them.
 *
 * Two backends with one behaviour: `sgx` is Linux's driver, `sim` a model of
 * SGX in ordinary memory that runs the same images (and protects nothing).
 *
 * Conventions.  Functions that can fail return 0 (or a count) or a negative
 * errno; the comment says which.  A `struct teemate_diag *` may be NULL; when a
 * function fails it is filled with the step that failed and a sentence for
 * people.  fds are owned by whoever the comment names; every fd that the library
 * makes is close-on-exec.  All functions are thread safe unless they say
 * otherwise; one slot is for one thread at a time.
 *
 * This is the lower half: images, mappings, entries.  teemate_client.h has the verbs of a program
 * that shares an enclave through the broker: connect, attach, call, detach.
 *
 * The lines between the cffi marks are read by native/binding/build_binding.py as well:
 * only declarations that cffi understands may stand there.
 */
#ifndef TEEMATE_H
#define TEEMATE_H

#include <stddef.h>
#include <stdint.h>

#include "sgx_arch.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* cffi: begin */

/* ---- errors ---------------------------------------------------------------- */

enum teemate_step {
    TEEMATE_STEP_NONE = 0,
    TEEMATE_STEP_READ = 1,      /* reading the image */
    TEEMATE_STEP_PARSE = 2,     /* an SGXS record is wrong; `offset` is where it starts in the file */
    TEEMATE_STEP_SIGSTRUCT = 3, /* the SIGSTRUCT itself is wrong; `offset` is the field's */
    TEEMATE_STEP_ECREATE = 4,
    TEEMATE_STEP_EADD = 5,
    TEEMATE_STEP_EINIT = 6,     /* `code` is the SGX error where there is one */
    TEEMATE_STEP_MAP = 7,
    TEEMATE_STEP_ENTER = 8,
    TEEMATE_STEP_CONTROL = 9,   /* a control ECALL; `code` is its tm_status */
    TEEMATE_STEP_SIGNALS = 10,  /* somebody replaced the library's signal handlers */
};

/* `code` of TEEMATE_STEP_PARSE: what is wrong with the record. */
enum teemate_bad_record {
    TEEMATE_BAD_TRUNCATED = 1,   /* the file ends inside of it */
    TEEMATE_BAD_TAG = 2,         /* no record of SGXS, or not at this place */
    TEEMATE_BAD_RESERVED = 3,    /* bytes that must be zero are not */
    TEEMATE_BAD_SIZE = 4,        /* of ELRANGE, or of the SSA frames */
    TEEMATE_BAD_UNSIZED = 5,     /* the stream has no size yet, so it cannot be measured */
    TEEMATE_BAD_ALIGNMENT = 6,
    TEEMATE_BAD_RANGE = 7,       /* outside of ELRANGE */
    TEEMATE_BAD_ORDER = 8,       /* pages do not ascend, or data belongs to another page */
    TEEMATE_BAD_OVERLAP = 9,     /* a page or chunk comes twice */
    TEEMATE_BAD_SECINFO = 10,    /* page type or permissions that EADD does not take */
    TEEMATE_BAD_LIMIT = 11,      /* more pages or segments than the library takes */
    TEEMATE_BAD_HEADER = 12,     /* the SDK's image header contradicts the image */
};

struct teemate_diag {
    int32_t step;
    int32_t code;
    uint64_t offset;
    char text[304];
};

/* ---- images ---------------------------------------------------------------- */

enum teemate_backend { TEEMATE_AUTO = 0, TEEMATE_SIM = 1, TEEMATE_SGX = 2 };

/* A run of pages of one type with equal permissions. */
struct teemate_segment {
    uint64_t offset; /* from the base, bytes */
    uint64_t size;   /* bytes */
    uint32_t prot;   /* PROT_READ | PROT_WRITE | PROT_EXEC */
    uint32_t type;   /* enum sgx_page_type: SGX_PT_TCS or SGX_PT_REG */
};

struct teemate_image_info {
    uint64_t size;            /* of ELRANGE, bytes */
    uint64_t pages;           /* EADDed */
    uint64_t measured_bytes;  /* EEXTENDed */
    uint64_t file_bytes;      /* length of the stream */
    uint32_t ssa_frame_pages;
    uint32_t tcs_count;
    uint32_t segment_count;
    uint32_t sdk;             /* 1 when the first page carries the SDK's image header */
    uint8_t mrenclave[32];
    uint8_t header[128];      /* struct tm_image_header when sdk, else zero */
};

/*
 * Read the SGXS stream in `fd` from offset 0 (pread; the position stays) and
 * measure it.  The fd stays the caller's.
 * Fails with -EBADMSG for a bad stream, else with the errno of reading.
 */
int teemate_image_measure(int fd, struct teemate_image_info *info, struct teemate_diag *diag);

/*
 * Check a SIGSTRUCT by itself as EINIT does: constants, exponent 3, Q1 and Q2,
 * signature; and against `mrenclave` unless that is NULL.  Writes SHA-256 of
 * the modulus to `mrsigner` unless that is NULL.
 * Fails with -EBADMSG (malformed), -EKEYREJECTED (signature), -EKEYEXPIRED
 * (it signs another MRENCLAVE).
 */
int teemate_sigstruct_verify(const uint8_t *sigstruct, const uint8_t *mrenclave, uint8_t *mrsigner,
                             struct teemate_diag *diag);

/* SHA-256 as the measurement uses it (with the CPU's SHA instructions where it has them). */
void teemate_sha256(const void *data, size_t length, uint8_t *digest);

/* ---- the host --------------------------------------------------------------- */

/*
 * Which backend `wanted` means for this process on this host: TEEMATE_SIM or
 * TEEMATE_SGX.  AUTO takes sgx where it is available, else sim; then the diag says
 * why not sgx (empty otherwise).  Nothing is built: `teemate doctor` does that.
 * Fails with -ENODEV or -EACCES (not available here: the diag says why), -EINVAL (no such backend).
 */
int teemate_backend_choose(int wanted, struct teemate_diag *diag);

/*
 * CPUID as this processor, or its hypervisor, answers it: eax, ebx, ecx, edx.
 * Fails with -ENXIO when there is no such leaf.
 */
int teemate_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t registers[4]);
/* XCR0: the components that XSAVE saves here; 0 when the system has switched XSAVE off. */
uint64_t teemate_xcr0(void);
/* 1 when the vDSO of this process has __vdso_sgx_enter_enclave, else 0. */
int teemate_vdso_enters(void);

/* ---- enclaves -------------------------------------------------------------- */

struct teemate_enclave;

struct teemate_enclave_info {
    uint64_t base;
    uint64_t size;
    uint64_t attributes;
    uint64_t xfrm;
    uint64_t pages;          /* added, as this side counted; 0 for an enclave that was opened */
    uint32_t backend;
    uint32_t miscselect;
    uint32_t ssa_frame_pages;
    uint32_t tcs_count;
    uint32_t segment_count;
    uint32_t sdk;
    uint16_t isvprodid;
    uint16_t isvsvn;
    uint8_t mrenclave[32];
    uint8_t mrsigner[32];
    uint8_t header[128];
};

/*
 * Build an enclave from the SGXS stream in `image_fd` and its SIGSTRUCT (1808
 * bytes), as far as EINIT.  Nothing is mapped or entered.  `base` is a multiple
 * of the enclave's size, or 0: then a free range of the window (0x400000000000,
 * 1 TiB) is chosen, with as much again kept free above it.  `attributes` may add
 * SGX_ATTR_DEBUG when the SIGSTRUCT allows it.  image_fd stays the caller's; the
 * enclave's own fd belongs to *enclave.
 * Fails with -EBADMSG, -EKEYREJECTED, -EKEYEXPIRED, -EACCES (attributes; SGX's device
 * may not be opened), -ENODEV (backend not here), -ENOMEM, -ENOSPC (no range free), -EIO
 * (SGX memory was lost meanwhile); what was built is torn down.
 */
int teemate_create(int backend, uint64_t base, uint64_t attributes, int image_fd,
                   const uint8_t *sigstruct, struct teemate_enclave **enclave,
                   struct teemate_diag *diag);

/*
 * An enclave that somebody else built.  Takes `fd` over (also when it fails).
 * `segments` is copied; it is checked to lie in `size`, sorted, without overlap.
 * AUTO: the backend whose enclave it is.  No device is needed.  Linux's driver tells nobody
 * what an enclave is: opened on sgx, its info has base, size, backend and what follows
 * from the segments; the rest is zero.
 * Fails with -EINVAL, -ENODEV (no enclave of that backend), -ESTALE (not finished, or of
 * another geometry), -EACCES (this program may map none), -ENOMEM.
 */
int teemate_open(int backend, int fd, uint64_t base, uint64_t size,
                 const struct teemate_segment *segments, size_t count,
                 struct teemate_enclave **enclave, struct teemate_diag *diag);

/* Unmap everything, close the fd, free.  Slots of it must be closed before. */
void teemate_close(struct teemate_enclave *enclave);

/* -ESTALE when the file does not belong to a finished enclave of that geometry. */
int teemate_enclave_describe(const struct teemate_enclave *enclave, struct teemate_enclave_info *info);
/* The fd stays the enclave's. */
int teemate_enclave_fd(const struct teemate_enclave *enclave);
/* Copy at most `capacity` entries; returns how many there are. */
size_t teemate_enclave_segments(const struct teemate_enclave *enclave, struct teemate_segment *segments,
                                size_t capacity);
/* Offsets of the TCS pages, ascending. */
size_t teemate_enclave_tcs(const struct teemate_enclave *enclave, uint64_t *offsets, size_t capacity);

/*
 * Map all segments but the TCSs at the enclave's base, and the landing page
 * above.  Everything is MADV_DONTFORK.
 * Fails with -EEXIST when something is in the way (diag names the mapping), or
 * with the errno of mmap.
 */
int teemate_map(struct teemate_enclave *enclave, struct teemate_diag *diag);
/* Map one TCS page / unmap it again. */
int teemate_map_tcs(struct teemate_enclave *enclave, uint64_t offset, struct teemate_diag *diag);
int teemate_unmap_tcs(struct teemate_enclave *enclave, uint64_t offset);
/* Map the arena (TM_ARENA_SIZE bytes) at its place; `fd` stays the caller's. */
int teemate_map_arena(struct teemate_enclave *enclave, int fd, struct teemate_diag *diag);
/* A sealed arena memfd; the caller owns it.  -errno on failure. */
int teemate_arena_create(void);

/* ---- entering -------------------------------------------------------------- */

struct teemate_regs {
    uint64_t rdi, rsi, rdx, r8, r9; /* in and out */
    uint64_t r12, r13;              /* in only: the key; cleared in memory before the return */
};

enum teemate_outcome {
    TEEMATE_LEFT = 0,   /* EEXIT, or an exception: run->function and exception_vector tell */
    TEEMATE_PAUSED = 1, /* interrupted; run->function goes on, not doing so leaves the slot interrupted */
    TEEMATE_LANDED = 2, /* the enclave refused the entry or was reset: arrived at the landing page,
                         * with what `regs` says (RDI is enum tm_exit, 0 for a refusal) */
};

/*
 * Enter through the TCS at `tcs_offset` (mapped before) with function EENTER
 * (2) or ERESUME (3), with the contract of the vDSO's __vdso_sgx_enter_enclave,
 * run->user_handler included.  run->tcs and run->function are set here.
 * Signals of the host find this thread at the edge of the enclave: their handlers run there
 * on the host's stack, and after one the call returns TEEMATE_PAUSED within a few
 * milliseconds, so that an interpreter can run its own handlers.  sim: signals wait for the
 * next tick, and the call pauses when it has to deliver one, or after `pause_after_ns` (0:
 * never; a lower bound).  sgx: nothing is blocked, and since nobody can tell whether a handler
 * ran, a call that stays inside for longer than 5 to 10 ms pauses at every tick, whatever
 * `pause_after_ns` says.  So on both a pause needs no reason of its caller's: look at what
 * may have happened (signals, time) and go on, or do not.  TEEMATE_TICK="20us-200us" in the
 * environment has ticks come at random intervals of that length (tests).
 * A paused call goes on with function run->function: ERESUME, or EENTER when nothing has
 * been entered yet (the kernel found no EPC for the TCS for 100 ms); then `regs` is as it was
 * but for the key, and not going on leaves nothing behind.  It may be resumed from another
 * depth of the stack and by another thread.
 * A memory error while inside is vector 18 (#MC) on sgx, after which the enclave is lost; the
 * vDSO itself would end the process with SIGBUS.
 * What a user handler does (longjmp out of it, too) ends the entry for the library; it runs on a
 * stack of 256 KiB that belongs to the TCS (sgx).
 * A negative errno says that nothing was entered or resumed.
 * Returns enum teemate_outcome, or -EINVAL (reserved bytes, function, enclave not
 * mapped), -ENOTCONN (a child of fork), -ENODEV (no vDSO function for sgx), -EDEADLK (sim:
 * this thread is inside already, or in a signal handler on an alternate stack), -ENOMEM and
 * -EAGAIN (no memory or thread for the ticker), -EUCLEAN (somebody replaced the library's signal
 * handlers and it could not put itself before them; diag of
 * teemate_signals_check tells who).  A TCS that is busy or not mapped is an
 * exception of EENTER in `run`: #GP or #PF.
 */
int teemate_enter(struct teemate_enclave *enclave, uint64_t tcs_offset, struct teemate_regs *regs,
                  uint32_t function, uint64_t pause_after_ns, struct sgx_enclave_run *run);

/*
 * Do now what the first entry of this process and thread would do: signal handlers, ticker,
 * the thread's block.  For who waits for something else anyway; the entry reports errors.
 */
void teemate_prepare(void);

/*
 * Who handles the signals that the library took for its entries so far (sgx: SIGBUS and the
 * tick; sim: SIGILL, SIGSEGV, SIGFPE and SIGTRAP too) now?  0: we do.
 * Otherwise -EUCLEAN and a sentence that names the signal and the library that
 * took it.  With `adopt`, puts our handlers before the others again (which are
 * then called for everything that did not happen inside an enclave).
 */
int teemate_signals_check(int adopt, struct teemate_diag *diag);

/* ---- slots of SDK enclaves -------------------------------------------------- */

struct teemate_slot;

struct teemate_slot_args {
    uint32_t index;       /* number of the TCS */
    uint32_t reserved;
    uint64_t tcs_offset;
    uint64_t generation;
    uint8_t key[16];
    uint8_t bind[88];     /* struct tm_bind: identity and MAC */
};

/* Outcomes of a call.  status is the enclave's, 0 or a tm_status, or an author's number. */
enum teemate_call_outcome {
    TEEMATE_CALL_DONE = 0,
    TEEMATE_CALL_PAUSED = 1,  /* go on with teemate_slot_resume, or teemate_slot_abandon */
    TEEMATE_CALL_OCALL = 2,   /* answer with teemate_slot_answer */
    TEEMATE_CALL_FAULT = 3,   /* `run` tells; the slot is interrupted */
    TEEMATE_CALL_REVOKED = 4, /* the gate refused the key */
    TEEMATE_CALL_LOST = 5,    /* the enclave is gone */
    TEEMATE_CALL_STOLEN = 6,  /* another process resumed the call: its result is lost, the slot interrupted */
};

struct teemate_call {
    int32_t outcome;
    int32_t status;
    uint64_t out_length;      /* DONE: bytes in out, or needed when status is TM_E_SPACE */
    const char *ocall_name;   /* OCALL: in the slot's buffer until the answer, not terminated */
    uint64_t ocall_name_length;
    const uint8_t *ocall_data;
    uint64_t ocall_length;
    struct sgx_enclave_run run;
};

/*
 * Map the slot's TCS and keep its key in a page that a child of fork() finds
 * empty.  The enclave must stay open until teemate_slot_close.
 */
int teemate_slot_open(struct teemate_enclave *enclave, const struct teemate_slot_args *args,
                      struct teemate_slot **slot, struct teemate_diag *diag);
/*
 * Forget the key and unmap the TCS.  Returns 1 when no call was left in it, 0 when one was
 * left parked or interrupted.  Either may be acknowledged to the broker, since no thread of
 * this process is inside or at its AEP; but 0 in a child of fork says nothing.  -EBUSY while
 * a thread is inside.
 */
int teemate_slot_close(struct teemate_slot *slot);

/*
 * The enclave's code has lent this slot the file `name` (io = "client"), and `fd` is the descriptor that the broker gave:
 * calls do with it what the code asks of that file.  It is the slot's from here on, also when this fails, and is closed
 * when another takes its place or with the slot; -1: the slot has none any more.  At most 4 at a time: -ENOSPC.
 * -EINVAL: no such name can be; -EBUSY while a thread is inside.
 */
int teemate_slot_lend(struct teemate_slot *slot, const char *name, int fd);

/*
 * ECALL by name.  `in`, `out` and `name` stay the caller's and must live until the
 * call is done or abandoned.  The first call of a slot binds its identity as
 * well.  Besides a signal and `pause_after_ns`, a call that only waits for a lock
 * of the enclave's is PAUSED at least every 100 ms.  Returns 0 with `call`
 * filled, or -EINVAL, -ENOTCONN (child of fork), -EBUSY (another thread is in
 * this slot, or a call of it is not finished), -ESTALE (slot interrupted by a
 * fault or an abandoned call), -EBADMSG (what the enclave answered cannot be;
 * the slot is interrupted), -EUCLEAN.
 */
int teemate_slot_call(struct teemate_slot *slot, const char *name, size_t name_length, const void *in,
                      size_t in_length, void *out, size_t out_capacity, uint64_t pause_after_ns,
                      struct teemate_call *call);
/* Go on with a call that is PAUSED; returns as teemate_slot_call does. */
int teemate_slot_resume(struct teemate_slot *slot, uint64_t pause_after_ns, struct teemate_call *call);
/*
 * Answer an OCALL and go on; `data` is copied, 1 MiB at most (-EINVAL).  `status` 0, or negative: the OCALL failed (the enclave sees
 * TM_E_OCALL).  Returns as teemate_slot_call does.
 */
int teemate_slot_answer(struct teemate_slot *slot, int32_t status, const void *data, size_t length,
                        uint64_t pause_after_ns, struct teemate_call *call);
/* Give a paused, faulted or OCALLing call up; the slot stays as it is in the enclave. */
void teemate_slot_abandon(struct teemate_slot *slot);
/* Raw entry with the slot's key: for images with an entry of their own. */
int teemate_slot_enter(struct teemate_slot *slot, struct teemate_regs *regs, uint32_t function,
                       uint64_t pause_after_ns, struct sgx_enclave_run *run);

/*
 * Counting calls in a page of the broker's, for who looks at this process from outside.  A slot writes
 * into line `index % TEEMATE_COUNTER_LINES`; all of it wraps.
 */
#define TEEMATE_COUNTER_LINES 64
struct teemate_counters {
    uint64_t calls;      /* that have ended */
    uint64_t inside_ns;  /* in calls, their waits for locks included; without handlers of named OCALLs */
    uint64_t entered_ns; /* CLOCK_MONOTONIC: since when a thread is in one; 0: none is */
    uint64_t reserved[5];
};
/*
 * Map the page that `fd` is (it stays the caller's), a memfd that can be neither cut nor made longer;
 * else -EINVAL.  `*page`: NULL, or a page that the new one takes the place of, for whoever counts in it.
 * Unmap it when no enclave counts there any more (teemate_enclave_count with NULL, or closed).
 */
int teemate_counters_map(int fd, struct teemate_counters **page);
void teemate_counters_unmap(struct teemate_counters *page);
/* Count the calls of this enclave there from now on. */
void teemate_enclave_count(struct teemate_enclave *enclave, struct teemate_counters *page);

/*
 * The conventional way: make this process the warden of an enclave that it
 * created and mapped.  Draws a control key, starts the SDK, arms every client
 * slot, maps an arena.  For SDK images only (-ENOTSUP otherwise).
 */
int teemate_private_start(struct teemate_enclave *enclave, struct teemate_diag *diag);
/* What teemate_slot_open wants for client slot `n` (0 is the first that is not the warden's). */
int teemate_private_slot(struct teemate_enclave *enclave, uint32_t n, struct teemate_slot_args *args);
/*
 * Control ECALL of a private enclave: both structures as in teemate_abi.h; the MAC
 * is added here.  Returns 0 when the enclave answered, with its tm_status in
 * *status; else -EBUSY, -EFAULT (it faulted), -ENODEV (it is lost), -EACCES,
 * -EBADMSG, -ENOTCONN (a child of fork).
 */
int teemate_private_control(struct teemate_enclave *enclave, void *tm_control, void *tm_control_result,
                            int32_t *status);

/*
 * Does what the code of a private enclave asks of its files: struct tm_file_request of teemate_abi.h, with the data
 * to be written, or room for `length` bytes to be read.  Returns what that structure says.  Called by the thread
 * whose call asks, outside of the enclave, one request at a time.
 */
typedef int64_t teemate_disk(void *context, const void *tm_file_request, void *data);
/*
 * Keep the files of a private enclave in the folder `directory` (the fd stays the caller's).  `limit`: bytes, each
 * file in blocks of 4 KiB; 0: none.  Fails with -EALREADY when it has a folder, or the errno of reading that; else as
 * teemate_private_control.
 */
int teemate_private_storage(struct teemate_enclave *enclave, int directory, uint64_t limit);
/* The same, and the program itself is the disk: for tests of what a disk may do. */
int teemate_private_disk(struct teemate_enclave *enclave, teemate_disk *disk, void *context);

/* ---- the sim's own ----------------------------------------------------------- */

/* 1 when `fd` is a sim enclave (also an unfinished one), 0 when not. */
int teemate_sim_is(int fd);
/* Blocks of memory that the enclave's file holds, in pages. */
int64_t teemate_sim_pages(int fd);
/* Test builds say here what is switched off (meson's option test_build); "" in products.  Static. */
const char *teemate_test_build(void);

/* cffi: end */

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

#endif
