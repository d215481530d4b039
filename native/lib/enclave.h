/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An enclave as libteemate holds it, and what a backend has to do.
 *
 *   image.c (SGXS, measurement) -> loader.c -> backend (sim_*.c | sgx_*.c)
 *   map.c, enter.c -> backend
 *
 * The loader reads each byte of an image once; what it hashes is what it adds.
 */
#ifndef TEEMATE_ENCLAVE_H
#define TEEMATE_ENCLAVE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "teemate.h"

#define TEEMATE_WINDOW_START 0x400000000000ull
#define TEEMATE_WINDOW_SIZE (1ull << 40)

struct backend;
struct sgx_stack;   /* sgx_enter.h */
struct sim_mapping; /* sim.h */
struct sgx_pages;   /* sgx_map.c */

/* Private enclaves: what their warden, this process, knows (private.c). */
struct private_warden;

struct teemate_enclave {
    const struct backend *backend;
    int fd; /* owned */
    uint64_t base;
    uint64_t size;
    struct teemate_segment *segments; /* owned; ascending, without overlap */
    size_t segment_count;
    bool mapped;
    bool arena_mapped;
    bool finished; /* EINIT has been done */
    uint64_t process; /* fork_process() of who made this; a child of fork may only free it */
    pthread_mutex_t lock; /* mapping and unmapping */
    struct teemate_enclave_info info;
    struct sim_mapping *sim; /* owned by the sim backend: its own view of the file's tables */
    struct sgx_pages *sgx_made_tcs; /* owned by the sgx backend: pages that this process made TCSs of */
    struct private_warden *warden;
    _Atomic(struct sgx_stack *) stacks; /* sgx_stack.c */
    _Atomic(struct teemate_counters *) counters; /* counters.h; NULL while nobody looks */
};

/* What ECREATE needs, as the SGXS stream and the SIGSTRUCT give it. */
struct create_params {
    uint64_t base;
    uint64_t size;
    uint32_t ssa_frame_pages;
    uint32_t miscselect;
    struct sgx_attributes attributes;
};

/*
 * A call that was paused may go on from another depth of the stack and in another thread.
 * The vDSO's function needs the RBP of its own frame at EEXIT, so on sgx it matters what
 * the enclave puts there.
 */
enum entry_stack {
    ENTRY_STACK_TCS,    /* perhaps that of the EENTER: the frame is at a place of the TCS's */
    ENTRY_STACK_CALLER, /* SDK images take both from SSA URSP and URBP, which ERESUME renews */
};

/*
 * All return 0 or a negative errno and fill the diag.  add_pages gets a run of
 * pages of one SECINFO; `data` NULL means zeros.  `measured`: all chunks of
 * these pages are EEXTENDed (a page with some chunks measured comes alone,
 * with measured = false and partly = true: the sim takes it, Linux cannot).
 */
struct backend {
    const char *name;
    enum teemate_backend id;
    /* Can enclaves be made, mapped and entered here?  Cheap: asked at every create. */
    int (*available)(struct teemate_diag *diag);
    /* Could this process enter one that it was handed?  Asks for no device. */
    int (*enterable)(struct teemate_diag *diag);
    int (*create)(struct teemate_enclave *enclave, const struct create_params *params,
                  struct teemate_diag *diag);
    int (*add_pages)(struct teemate_enclave *enclave, uint64_t offset, const void *data, uint64_t size,
                     uint64_t secinfo_flags, bool measured, bool partly, struct teemate_diag *diag);
    /* `mrenclave`: what the loader measured. */
    int (*init)(struct teemate_enclave *enclave, const struct sgx_sigstruct *sigstruct,
                const uint8_t mrenclave[32], struct teemate_diag *diag);
    /* An enclave of somebody else's making: fill info from the file. */
    int (*open)(struct teemate_enclave *enclave, struct teemate_diag *diag);
    /* Whether map.c's reservation, without any permission, is to be one of the file from its start on. */
    bool reserves_file;
    /* All segments but the TCSs, over the PROT_NONE reservation that map.c has made and will
     * keep out of fork as a whole. */
    int (*map)(struct teemate_enclave *enclave, struct teemate_diag *diag);
    int (*map_tcs)(struct teemate_enclave *enclave, uint64_t offset, struct teemate_diag *diag);
    /* The page is mapped no more, and its place stays reserved. */
    int (*unmap_tcs)(struct teemate_enclave *enclave, uint64_t offset);
    /* The vDSO's contract: returns what it returns; `pause` as in teemate_enter. */
    int (*enter)(struct teemate_enclave *enclave, uint64_t tcs_offset, struct teemate_regs *regs,
                 uint32_t function, uint64_t pause_after_ns, enum entry_stack stack,
                 struct sgx_enclave_run *run);
    /* SGX2 (sgx2.h), one call each: -EBUSY and -EAGAIN when to be asked again. */
    int (*restrict_permissions)(struct teemate_enclave *enclave, uint64_t offset, uint64_t length,
                                uint64_t permissions, uint64_t *result, uint64_t *count);
    int (*modify_types)(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t type,
                        uint64_t *result, uint64_t *count);
    int (*remove_pages)(struct teemate_enclave *enclave, uint64_t offset, uint64_t length, uint64_t *count);
    void (*close)(struct teemate_enclave *enclave);
};

extern const struct backend backend_sim;
extern const struct backend backend_sgx;

/* enclave.c: which backend makes enclaves here?  AUTO: sgx where it is available, else sim.
 * -ENODEV or -EACCES with the reason, -EINVAL (no such backend). */
int backend_choose(int wanted, const struct backend **backend, struct teemate_diag *diag);
/* enclave.c: an empty enclave; teemate_close ends it at any stage of building. */
int enclave_new(const struct backend *backend, struct teemate_enclave **enclave, struct teemate_diag *diag);

/* enclave.c: -ENOTSUP in a program whose sanitizer has the address window: nothing can be mapped there. */
int enclave_check_runtime(struct teemate_diag *diag);
/* map.c: take away all that was mapped for the enclave (also nothing); called by teemate_close. */
void enclave_unmap(struct teemate_enclave *enclave);

/* enter.c: teemate_enter with the stack that its public form does not choose. */
int enclave_enter(struct teemate_enclave *enclave, uint64_t tcs_offset, struct teemate_regs *regs, uint32_t function,
                  uint64_t pause_after_ns, enum entry_stack stack, struct sgx_enclave_run *run);

/*
 * fork.c: a number for this process, never 0, that a child of fork (or of a bare
 * clone) does not share.  Costs a load.
 */
uint64_t fork_process(void);
/* Was this made by this process?  If not, nothing of it is mapped here: MADV_DONTFORK. */
static inline bool enclave_is_ours(const struct teemate_enclave *enclave)
{
    return enclave->process == fork_process();
}

/* landing.c: the landing page's code at its place; 0 or a negative errno. */
int landing_map(uint64_t address);

/*
 * Whether this process has READ_IMPLIES_EXEC, with which it maps no enclave on either backend.  execve() clears it
 * in 64-bit programs, whatever setarch(8) set before.  Where asking is refused (LockPersonality= of systemd, which
 * allows no other argument than the personality that it locked), so was setting it.
 */
bool map_all_executable(void);
#define ALL_EXECUTABLE                                                                                   \
    "this process has set its personality to READ_IMPLIES_EXEC, with which Linux lets nobody map an enclave: " \
    "leave out that call of personality(2), or attach before it"

/* diag.c: fill and return `error`; diag may be NULL. */
int diag_set(struct teemate_diag *diag, int error, enum teemate_step step, int code, uint64_t offset,
             const char *format, ...) __attribute__((format(printf, 6, 7)));

#endif
