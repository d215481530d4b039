/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What passes between the world and an SDK enclave: the image header, registers
 * at entry and exit, the structures that an entry points to, and the MACs.
 *
 * Both sides of the enclave's border include this file: the SDK's gate and
 * dispatcher inside, libteemate and the warden outside.  The broker's Python
 * mirrors the MAC inputs (broker/enclaves/control.py), `teemate image build` mirrors the
 * header and the static part of the thread data (client/image/layout.py).
 * All integers are little endian; every structure is free of padding.
 *
 * Registers at EENTER
 *   R12:R13  the key: a slot key, or the control key (two little-endian words)
 *   RDI      selector (enum tm_selector)
 *   RSI, RDX, R8, R9  its arguments
 *   RSP, RBP are the caller's and come back unchanged
 * Registers at EEXIT (the ordinary way out, to RCX as it was at EENTER)
 *   RDI      what happened (enum tm_exit)
 *   RSI      DONE: status, 0 or a negative tm_status; OCALL: enum tm_ocall
 *   RDX      DONE: length of the output; OCALL: length of its request
 *   R8       OCALL: the nonce that its return must bring back
 *   R9       0
 *   all others are zero, flags clear, XMM registers zero
 * A refused entry (no key matches, or the slot's state forbids it) tells nothing:
 * all registers are scrubbed and it leaves to the landing page at base + size.
 * There it also says INTERRUPTED to who has the key of a slot with CSSA >= 1, and
 * UNWOUND to the warden: RSI is the CSSA, RDX the slot word before, R8 is 1 when all
 * frames below were rewritten and the slot is FREE now.
 */
#ifndef TEEMATE_ABI_H
#define TEEMATE_ABI_H

#include <stddef.h>
#include <stdint.h>

#define TM_ABI_VERSION 1u

/* ---- the image ------------------------------------------------------------ */

#define TM_IMAGE_MAGIC 0x3145544d45455400ull /* "\0TEEMTE1", first word of ELRANGE */

#define TM_IMAGE_DEBUG 0x1u /* debug prints, and faulting RIPs are told */
#define TM_IMAGE_TIME 0x2u  /* wants TM_CTL_TIME at least every 250 ms */

/*
 * The first 128 bytes of ELRANGE in every SDK image; measured and read only.
 * Offsets count from the enclave's base, sizes in bytes.
 * Slots are numbered by TCS: 0 and 1 are the warden's, then `io_slots` for its
 * I/O, then `client_slots`.  TCS i is the page tcs_offset + i * 4096; its
 * thread data page is td_offset + i * td_stride, its stack of stack_size bytes
 * starts at stack_offset + i * stack_stride (an unmapped guard page below it),
 * its nssa SSA frames at ssa_offset + i * nssa * ssa_frame_size.
 */
struct tm_image_header {
    uint64_t magic;
    uint32_t abi_version;
    uint32_t flags;
    uint32_t io_slots;
    uint32_t client_slots;
    uint32_t nssa;
    uint32_t ssa_frame_size;
    uint64_t size; /* of ELRANGE */
    uint64_t tcs_offset;
    uint64_t td_offset;
    uint64_t td_stride;
    uint64_t stack_offset;
    uint64_t stack_stride;
    uint64_t stack_size;
    uint64_t ssa_offset;
    uint64_t heap_offset;
    uint64_t heap_size;
    uint64_t rela_offset; /* R_X86_64_RELATIVE entries, applied by the first entry */
    uint64_t rela_count;
};
_Static_assert(sizeof(struct tm_image_header) == 128, "tm_image_header");

#define TM_WARDEN_SLOTS 2u
#define TM_MAX_SLOTS 4096u

/* The first bytes of every thread data page, written by `teemate image build`. */
struct tm_td_static {
    uint64_t self_offset; /* of this page */
    uint64_t index;       /* number of the TCS */
    uint64_t stack_top;   /* offset of the first byte above the stack */
    uint64_t reserved[2];
    uint64_t canary; /* at 0x28: where the compiler looks for it (FS:0x28); random, set in the enclave */
};
_Static_assert(offsetof(struct tm_td_static, canary) == 0x28, "stack protector");

/* ---- entries -------------------------------------------------------------- */

enum tm_selector {
    TM_SEL_ECALL = 0,        /* RSI: struct tm_call, in the caller's memory */
    TM_SEL_OCALL_RETURN = 1, /* RSI: nonce, RDX: status, R8: length of the answer in the OCALL buffer */
    TM_SEL_BIND = 2,         /* RSI: struct tm_bind */
    TM_SEL_CONTROL = 16,     /* RSI: struct tm_control; needs the control key */
    /*
     * Through a client's slot: RSI is 0 to look, or the generation whose interrupted
     * frames are to be undone; done only when that generation's key was taken away.
     * Needs the control key; reads and writes nothing outside, so it has no MAC.
     */
    TM_SEL_UNWIND = 17,
    /* Through an I/O slot at CSSA 0: RSI is struct tm_io_step.  Needs the control key. */
    TM_SEL_IO = 18,
};

enum tm_exit {
    TM_EXIT_DONE = 0,
    TM_EXIT_OCALL = 1,
    /* At the landing page; 0 there is a refusal or a rewritten frame. */
    TM_EXIT_UNWOUND = 2,
    TM_EXIT_INTERRUPTED = 3,
};

/* Statuses that the SDK itself gives; authors use positive numbers. */
enum tm_status {
    TM_OK = 0,
    TM_E_ARGUMENT = -1,  /* a pointer, length or field that the SDK refuses */
    TM_E_UNKNOWN = -2,   /* no ECALL, OCALL or control operation of that name */
    TM_E_UNBOUND = -3,   /* no identity is bound to this slot yet */
    TM_E_MAC = -4,       /* the MAC of a bind or a control operation is wrong */
    TM_E_STATE = -5,     /* not now: wrong generation, or the key is already another one */
    TM_E_NOMEM = -6,     /* the enclave's heap is full */
    TM_E_SPACE = -7,     /* the output does not fit; RDX tells how much is needed */
    TM_E_BUSY = -8,      /* waited longer than lock_patience; the output is struct tm_holder */
    TM_E_OWNERDEAD = -9, /* a lock's holder died; its data may need repair */
    TM_E_OCALL = -10,    /* the caller refused or failed an OCALL */
    TM_E_NOTREADY = -11, /* the enclave has no control key yet */
    TM_E_PLATFORM = -12, /* a report of another platform: the sim's, another computer's, other microcode's */
    TM_E_INTERRUPTED = -13, /* control: somebody was interrupted in this TCS, and the operation wants a whole stack */
};

/* Who holds the lock that was not to be had. */
struct tm_holder {
    uint32_t slot;
    uint32_t reserved;   /* 0 */
    uint64_t generation; /* of the slot's assignment; 0: the warden */
};
_Static_assert(sizeof(struct tm_holder) == 16, "tm_holder");

/*
 * One ECALL.  Copied in once, before anything in it is looked at; every range
 * must lie outside of [base, base + size), without overflow.
 */
struct tm_call {
    uint64_t name; /* not terminated */
    uint64_t name_len; /* 1 to TM_NAME_MAX */
    uint64_t in;
    uint64_t in_len;
    uint64_t out;
    uint64_t out_cap;
    uint64_t ocall_buf; /* where OCALLs of this call put requests and find answers */
    uint64_t ocall_cap; /* TM_OCALL_MIN at least */
    uint64_t bind;      /* struct tm_bind to be bound first, or 0 */
    uint64_t reserved;  /* 0 */
};
_Static_assert(sizeof(struct tm_call) == 80, "tm_call");

#define TM_NAME_MAX 64u
#define TM_OCALL_MIN 4096u

/* ---- OCALLs --------------------------------------------------------------- */

enum tm_ocall {
    TM_OCALL_NAMED = 0, /* request: u32 length of the name, name, data; goes to the application */
    TM_OCALL_WAIT = 1,  /* request: struct tm_ocall_wait; libteemate does it */
    TM_OCALL_WAKE = 2,  /* request: struct tm_ocall_wait; libteemate does it */
    TM_OCALL_PRINT = 3, /* request: text for stderr; debug images only; libteemate does it */
    TM_OCALL_FILE = 4,  /* request: struct tm_file_request, then what is to be written; libteemate does it
                         * for a private enclave, and with a descriptor that the slot was lent.  Answer: i64
                         * result, then what was read */
};

/*
 * Wait until arena[index] is no longer `expected`, `timeout_ns` (100 ms at
 * most) at the longest; WAKE increments it and wakes `expected` waiters.
 */
struct tm_ocall_wait {
    uint32_t index;
    uint32_t expected;
    uint64_t timeout_ns;
};

#define TM_ARENA_WORDS 1024u /* 32-bit wake counters, one page, at base + size + 4096 */
#define TM_ARENA_SIZE 4096u

/* ---- files ------------------------------------------------------------------ */

enum tm_file_op {
    TM_FILE_OP_OPEN = 1, /* is it there?  TM_FILE_OP_CREATE: make it when it is not */
    TM_FILE_OP_READ = 2,
    TM_FILE_OP_WRITE = 3,
    TM_FILE_OP_SYNC = 4,
    TM_FILE_OP_SIZE = 5,
    TM_FILE_OP_TRUNCATE = 6,
    TM_FILE_OP_DELETE = 7,
};

#define TM_FILE_OP_CREATE 0x1u
/* A warden that is no more took the same request and may have done it. */
#define TM_FILE_OP_AGAIN 0x2u

#define TM_FILE_DATA 65536u /* bytes in one request */

/*
 * What enclave code wants of its host.  Every request is whole in itself, so that any warden can do it,
 * and twice does what once does.  The result is a count of bytes, a size, 0, or a negative errno of Linux.
 */
struct tm_file_request {
    uint32_t op;
    uint32_t flags;
    uint64_t offset; /* READ, WRITE; TRUNCATE: the size */
    uint64_t length; /* READ, WRITE; TM_FILE_DATA at most */
    char name[64];   /* zero padded: 1 to 63 of A-Z a-z 0-9 . _ -, the first of them no other than a letter or digit */
};
_Static_assert(sizeof(struct tm_file_request) == 88, "tm_file_request");

/*
 * One entry of the warden's I/O thread: with the answer to the request that it took by the
 * last one, out with the next.  In the warden's memory; copied in once.  All state is in the enclave: a
 * warden that ends between two entries leaves nothing half done, and its successor's REINIT of the I/O
 * slot gives back what was taken.  A warden that is not quite dead may take something after that: so does the
 * successor's first entry, which it makes when the other one is.
 */
struct tm_io_step {
    uint64_t ticket;   /* of the request that is answered; out: of the next; 0: none */
    int64_t result;
    uint64_t data;     /* TM_FILE_DATA bytes: in what was read, out what is to be written */
    uint32_t wake;     /* out: arena word to increment, with its waiters woken; TM_ARENA_WORDS: none */
    uint32_t idle;     /* out, when there is no request: arena word to wait at while it is `expected` */
    uint32_t expected;
    uint32_t begins;   /* 1: a warden's first, now that no other works in the folder; 0 */
    struct tm_file_request request; /* out */
};
_Static_assert(sizeof(struct tm_io_step) == 128, "tm_io_step");

/* TM_CTL_STORAGE: who does what files.h asks for. */
enum tm_storage {
    TM_STORAGE_NONE = 0,   /* nobody; after WARDEN this means MOVED */
    TM_STORAGE_WARDEN = 1, /* the warden's I/O thread */
    TM_STORAGE_CALLER = 2, /* the calling process: TM_OCALL_FILE */
    TM_STORAGE_MOVED = 3,  /* nobody any more: the enclave's next generation has it */
    /* The warden's I/O thread, but for files that a slot was lent: its process has a descriptor and does TM_OCALL_FILE. */
    TM_STORAGE_LENT = 4,
};

/* TM_CTL_LENT. */
enum tm_lent {
    TM_LENT_NOT = 0,
    TM_LENT_READ = 1,  /* a descriptor that reads */
    TM_LENT_WRITE = 2, /* one that writes too */
};

/* ---- identity ------------------------------------------------------------- */

/*
 * Who uses a slot, as the broker asserts it.  `principal` is the SHA-256 of the
 * canonical text that the policy chose, "uid=1000" or "uid=1000\ncgroup=/a/b".
 */
struct tm_identity {
    uint8_t principal[32];
    uint32_t uid;
    uint32_t gid;
    uint64_t grant;
};
_Static_assert(sizeof(struct tm_identity) == 48, "tm_identity");

struct tm_bind {
    uint64_t generation;
    struct tm_identity identity;
    uint8_t mac[32]; /* HMAC(mac key, TM_BIND_LABEL | u64 slot | u64 generation | identity) */
};
_Static_assert(sizeof(struct tm_bind) == 88, "tm_bind");

/* All MACs are HMAC-SHA256; labels are 16 bytes, zero padded. */
#define TM_MACKEY_LABEL "teemate mac key" /* mac key = HMAC(control key, label) */
#define TM_BIND_LABEL "teemate bind"
#define TM_CONTROL_LABEL "teemate control"
#define TM_LABEL_SIZE 16u

/* ---- control ECALLs -------------------------------------------------------- */

enum tm_control_op {
    /* The first entry after EINIT: R12:R13 becomes the control key, relocations
     * are applied, the image's tm_on_start() runs.  Again with the same key: OK.
     * Result: the image header, as the enclave itself has it. */
    TM_CTL_SET_KEY = 1,
    /* Write key and generation into a free slot.  Then tm_on_slot_armed() may run, unless `argument` is 1: somebody
     * waits for the slot.  MAC. */
    TM_CTL_ARM = 2,
    /* Take the key of generation `generation` away; result: the slot word.  MAC. */
    TM_CTL_CLEAR = 3,
    /* Result: CSSA of the TCS that was entered, and its slot word. */
    TM_CTL_PROBE = 4,
    /* Scrub stack, thread data and SSA frames of a FREE slot, whose CSSA the warden has
     * seen to be 0: its locks become owner-dead, its pending operation is done, and
     * tm_on_slot_reset() runs.  ARM wants it between two generations.  MAC. */
    TM_CTL_RESET = 5,
    /* Result: EXITINFO, RIP (debug images, or when the report's CPUSVN says
     * sim; else 0), MADDR of SSA frame `argument` of `slot`. */
    TM_CTL_SSA = 6,
    /* Make frames 0 .. argument-1 (NSSA at most) of `slot` (not the one that is
     * used now) leave to the landing page when they are resumed.  A client's: only
     * of `generation` when its key was taken away, and only when its TCS has no frame
     * left and its holder is dead, else TM_SEL_UNWIND; the slot is then FREE.
     * MAC.  As PROBE and REINIT it takes no lock: whoever held one may be dead. */
    TM_CTL_REWRITE = 7,
    /* Forget what `slot`'s warden thread was doing, after its frames are gone: locks
     * and half-done operations.  Harmless when it was doing nothing.  Of an I/O slot: what
     * it took and did not answer is to be taken again.  MAC. */
    TM_CTL_REINIT = 8,
    /* `argument`: nanoseconds of CLOCK_REALTIME; time never goes back. MAC. */
    TM_CTL_TIME = 9,
    /* A control ECALL of the image's author by name (TM_CONTROL()), in `data`:
     * the name, zero padded to 64 bytes, then up to 192 bytes of input.  MAC. */
    TM_CTL_AUTHOR = 10,
    /* EREPORT for the target in `data` (TARGETINFO's first 64 bytes are enough
     * for ourselves: zeros mean this enclave) with reportdata; result: REPORT. */
    TM_CTL_REPORT = 11,
    /* `argument`: enum tm_storage.  MAC. */
    TM_CTL_STORAGE = 12,
    /* `data`: a file's name, 64 bytes, zero padded.  What the enclave's code lends the holder of `slot` of it
     * just now: result: data[0], enum tm_lent.  MAC. */
    TM_CTL_LENT = 13,
};

/* A control ECALL's request, in the warden's memory; copied in once. */
struct tm_control {
    uint32_t op;
    uint32_t reserved; /* 0 */
    uint64_t slot;
    uint64_t generation;
    uint64_t argument;
    uint8_t key[16];    /* ARM: the slot key */
    uint64_t sequence;  /* larger than that of every MACed request before: CLOCK_MONOTONIC in ns; 0 where no MAC is needed */
    uint64_t result;    /* where to write struct tm_control_result, or 0 */
    uint8_t mac[32];    /* HMAC(mac key, TM_CONTROL_LABEL | op .. sequence | data) */
    uint8_t data[256];
};
_Static_assert(sizeof(struct tm_control) == 352, "tm_control");
_Static_assert(offsetof(struct tm_control, result) == 56, "what the MAC covers ends before it");

struct tm_control_result {
    uint64_t cssa;
    uint64_t word;       /* slot word: generation << 8 | enum tm_slot_state */
    uint64_t calls;      /* ECALLs that this slot has finished, ever */
    uint64_t exitinfo;
    uint64_t rip;        /* offset from the base when inside of ELRANGE */
    uint64_t maddr;
    uint64_t abi_version;
    uint64_t length;     /* of what is in data */
    uint8_t data[448];
};
_Static_assert(sizeof(struct tm_control_result) == 512, "tm_control_result");

enum tm_slot_state {
    TM_SLOT_FREE = 0,   /* no key opens it */
    TM_SLOT_ARMED = 1,  /* its key opens it; nobody is inside */
    TM_SLOT_INSIDE = 2, /* a thread is inside, or was interrupted there; with CSSA 0 it was stolen */
    TM_SLOT_PARKED = 3, /* in an OCALL: only that OCALL's return is accepted */
};

/*
 * TM_CTL_CLEAR met a slot that was INSIDE or PARKED: the bit is added to its
 * state, no key opens it any more.  A call that ends all the same makes it FREE, and
 * so does TM_SEL_UNWIND.
 */
#define TM_SLOT_CLEARED 0x80u

#define TM_WORD(generation, state) ((uint64_t)(generation) << 8 | (uint64_t)(state))
#define TM_WORD_STATE(word) ((enum tm_slot_state)((word) & 0x7f))
#define TM_WORD_GENERATION(word) ((word) >> 8)

/* ---- around ELRANGE -------------------------------------------------------- */

#define TM_LANDING(base, size) ((base) + (size))        /* one page of the process's own code */
#define TM_ARENA(base, size) ((base) + (size) + 4096u)  /* TM_ARENA_SIZE bytes */

#endif
