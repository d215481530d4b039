/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The client of the broker, inside.
 *
 *   message.c   one message: CBOR
 *   error.c     codes and sentences
 *   request.c   a request until its answer has come, which may be over several sockets
 *   link.c      the sockets to the broker, one after the other; whoever waits for an answer reads
 *   resume.c    what makes a new socket the same client again
 *   listener.c  the thread that reads when nobody waits
 *   broker.c    connect, disconnect, ping, enclaves, events
 *   grant.c     attach, detach
 *   slots.c     acquire, release: slots of a grant
 *   lease.c     a slot for one thread: calls, and how they end
 *   revoke.c    what the broker says of grants without being asked
 *
 * One lock per broker guards all but what a call needs: calls take no lock.  A lease has
 * a flag (`inside`) that its caller holds during a call and whoever closes the slot takes; of `gone`,
 * `revoked` and that flag each side writes its own and then reads the other's, so one of the two closes.
 *
 * Functions that end in _locked are called with the broker's lock held, and leave it held.
 */
#ifndef TEEMATE_CLIENT_INSIDE_H
#define TEEMATE_CLIENT_INSIDE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/un.h>

#include "enclave.h"
#include "message.h"
#include "slot.h"
#include "teemate_client.h"

#define NS_PER_MS 1000000ull
#define NS_PER_S 1000000000ull
#define FOREVER UINT64_MAX
#define REPLY_TIMEOUT (60 * NS_PER_S) /* a broker that is there has this for an answer, on top of the request's own wait */
#define LEAVE_WAIT NS_PER_S           /* calls in other threads get this to end when their grant does */
#define TOKEN_SIZE 32
#define EVENTS_KEPT 64u

uint64_t now_ns(void); /* CLOCK_MONOTONIC */

/* ---- errors (error.c) ---- */

/* Fill `error` (may be NULL) and return `code`. */
int error_set(struct teemate_error *error, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));
int error_copy(struct teemate_error *error, const struct teemate_error *from);
/* The broker's `error` of a reply. */
int error_read(struct teemate_error *error, const struct value *untrusted);
/* A negative errno of the library's lower half, and its diag (may be NULL). */
int error_native(struct teemate_error *error, int number, const struct teemate_diag *diag, const char *doing);
/* A status other than 0 that call `name` of `enclave` gave; `reply`: what of its output fitted. */
int error_status(struct teemate_error *error, int status, const char *enclave, const char *name, uint64_t length,
                 const uint8_t *reply, size_t reply_size);
int error_fault(struct teemate_error *error, const struct sgx_enclave_run *run, const struct teemate_enclave_entry *enclave,
                const char *name);

/* ---- requests (request.c) ---- */

struct descriptors {
    int count;
    int fd[MESSAGE_FDS]; /* -1: somebody took it over */
};
void descriptors_close(struct descriptors *descriptors);

/*
 * Gets an answer's `ok` in whichever thread reads, under the lock; may take descriptors over.
 * Returns 0 or a code, with `error` filled.
 */
typedef int (*answer_take)(struct teemate_broker *broker, const struct value *ok, struct descriptors *descriptors,
                           void *context, struct teemate_error *error);
/* Gives back what an answer granted after its caller had gone. */
typedef void (*answer_undo)(struct teemate_broker *broker, const struct value *ok, uint64_t grant);

enum { REQUEST_GIVES_BACK = 1, REQUEST_REPEATABLE = 2 };

struct request {
    struct request *next;
    uint64_t number;
    const char *op;      /* static */
    uint32_t flags;
    uint64_t session;    /* in which its grant's number means something; 0: it has none */
    uint64_t grant;      /* for undo */
    uint64_t wait;       /* ns that it lets the broker wait */
    uint64_t deadline;   /* now_ns() */
    bool sent;
    bool queued;         /* still to be sent on this socket */
    bool answered;
    bool orphan;         /* nobody waits: whoever takes the answer frees it */
    int code;
    answer_take take;    /* or NULL: nothing in the answer matters */
    void *context;
    answer_undo undo;    /* or NULL */
    struct teemate_error *error; /* the waiter's, or NULL */
    struct writer writer;
    uint8_t data[];
};

/* A request with room for `capacity` bytes of arguments, which its maker writes (`args` pairs); NULL: no memory. */
struct request *request_new(struct teemate_broker *broker, const char *op, uint32_t flags, size_t args, size_t capacity);
/*
 * Send it, wait for the answer (also over a restart of the broker), have `take` read it, and free it.
 * `meanwhile` (may be NULL) is called while the broker works.
 */
int request_do(struct teemate_broker *broker, struct request *request, void (*meanwhile)(void), struct teemate_error *error);
/* The same for what gives something back: while the broker is away it does not wait.  Errors are none. */
void request_tell(struct teemate_broker *broker, struct request *request);
/* Send it, and forget it. */
void request_post_locked(struct teemate_broker *broker, struct request *request);
/* Answer it: whoever waits has the code and the error, an orphan is freed. */
void request_answer_locked(struct teemate_broker *broker, struct request *request, int code,
                           const struct teemate_error *error);

/* ---- the link (link.c, resume.c) ---- */

struct session {
    uint64_t number;      /* counts the times that a broker did not know this client any more */
    bool welcomed;        /* a broker has greeted us */
    bool kept;            /* and keeps grants across its restarts */
    uint64_t grace;       /* ns after the end of a connection in which the next one is the same client's */
    uint8_t token[TOKEN_SIZE];
};

struct absence {
    uint64_t deadline, next_try, pause;
    uint64_t over;        /* when the last one was over; 0: none was */
    bool dialled;         /* a connection is there that waits for its greeting */
    char reason[128];     /* of the last try */
};

struct teemate_broker {
    pthread_mutex_t lock;
    pthread_cond_t wake;  /* answers, free slots, events, and who may read */
    atomic_uint references; /* the program's, one for each grant, the listener's while it reads */
    uint64_t process;     /* fork_process() of who connected */
    struct sockaddr_un address;
    char client[68];

    int fd;               /* -1: none */
    bool greeted;         /* our hello is out on this socket */
    bool reading;         /* a thread does; only it receives and reconnects */
    bool away;            /* between two sockets */
    bool watched;         /* by the listener */
    bool muted;           /* it leaves the socket to whoever reads */
    atomic_bool attention; /* it has something to do here without a packet: we are away */
    unsigned waiting;     /* threads that wait for `wake` */
    unsigned asking;      /* threads that wait for an answer */
    struct session session;
    struct absence absence;
    _Atomic uint64_t last_number;
    struct request *first, **last; /* without an answer, in the order of their numbers */
    unsigned backlog;     /* of them, how many are queued */
    uint8_t *buffer;      /* MESSAGE_MAX, for whoever reads */

    struct teemate_error lost;     /* code 0: not lost */
    struct teemate_error farewell; /* what the broker said before it closed */
    struct teemate_error broken;   /* what a send met */

    struct teemate_grant *grants;
    struct teemate_counters *counters; /* where a viewer has our calls counted; NULL: nobody has looked */
    struct teemate_event events[EVENTS_KEPT];
    unsigned event_first, event_count;
    uint64_t events_missed;
    struct teemate_broker *next_watched, *next_step; /* listener.c */
};

int link_connect(struct teemate_broker *broker, struct teemate_error *error);
/* Fails with what ended the connection, or the session that the request is of. */
int link_send_locked(struct teemate_broker *broker, struct request *request, struct teemate_error *error);
void link_flush_locked(struct teemate_broker *broker);
/* With `reading` set and the lock not held: take one packet or get back to the broker, within `patience` ns. */
void link_read(struct teemate_broker *broker, uint64_t patience);
void link_stop_reading_locked(struct teemate_broker *broker);
/* The connection is over for good. */
void link_end_locked(struct teemate_broker *broker, const struct teemate_error *error, bool forgotten);
void link_close_locked(struct teemate_broker *broker);
/* Does this errno of a socket say that the other side has gone? */
bool link_is_end(int number);

/* A new client; fails with -errno where there is no randomness. */
int session_begin(struct session *session);
/* Write the greeting; returns its size. */
size_t session_hello(const struct teemate_broker *broker, bool resume, uint8_t *buffer, size_t size);
/* The connection ended: with what the broker said, or to come back. */
void resume_ended_locked(struct teemate_broker *broker);
/* With `reading` set and the lock held, which is given up: one try, or the time until it. */
void resume_come_back_unlock(struct teemate_broker *broker, uint64_t patience);
void resume_welcome_locked(struct teemate_broker *broker, const struct value *ok);
void resume_give_up_locked(struct teemate_broker *broker);
int resume_over(const struct teemate_broker *broker, struct teemate_error *error);

/* ---- listener.c: under the lock, but for the first ---- */

/* Start its thread, which the first call will want; needs no lock. */
void listener_ready(void);
/* Have the process's listener read from now on whenever nobody else does. */
void listener_watch_locked(struct teemate_broker *broker);
/* Somebody else reads, or does not any more. */
void listener_mute_locked(struct teemate_broker *broker, bool muted);
/* Before a descriptor is closed, and after there is a new one. */
void listener_drop_fd_locked(struct teemate_broker *broker);
void listener_add_fd_locked(struct teemate_broker *broker);
/* Have it look at its brokers: one is away. */
void listener_kick(void);
void listener_forget_locked(struct teemate_broker *broker);

/* ---- broker.c ---- */

int broker_check_process(const struct teemate_broker *broker, struct teemate_error *error);
/* Wait for `wake` until `deadline` (now_ns(), FOREVER). */
void broker_wait_locked(struct teemate_broker *broker, uint64_t deadline);
void broker_wake_locked(struct teemate_broker *broker);
void broker_unreference(struct teemate_broker *broker);
void broker_event_locked(struct teemate_broker *broker, struct teemate_event event);
/* enclave-info of the wire. */
const char *entry_read(const struct value *untrusted, struct teemate_enclave_entry *entry);

/* ---- grants and leases ---- */

/* Why a grant or a slot cannot be used any more; in the order in which one may take another's place: never. */
enum gone {
    GONE_NOT = 0,
    GONE_DETACHED,   /* by this program */
    GONE_REVOKED,    /* by the broker */
    GONE_TAKEN_BACK, /* the same, while it could not be heard */
    GONE_FORGOTTEN,  /* no broker knows of it */
    GONE_LOST,       /* the enclave's memory is not there any more */
    GONE_REFUSED,    /* the enclave refused the slot's key */
};

struct teemate_lease {
    struct teemate_lease *next;
    struct teemate_grant *grant;
    struct teemate_slot *native; /* NULL: closed, or not opened yet */
    uint32_t index;
    bool taken;              /* by a thread of the program's, between teemate_take and teemate_give */
    bool acknowledged;       /* its revocation */
    bool closed;
    bool stolen;             /* another process resumed a call of it */
    atomic_bool inside;      /* a thread is in a call, or closes it: it alone has `native` and `broken` */
    _Atomic uint32_t gone;   /* enum gone: REVOKED, REFUSED */
    char broken[112];        /* why it cannot be used any more; empty while it can */
    struct teemate_slot_args args; /* until it is opened, then wiped */
};

struct teemate_grant {
    struct teemate_grant *next;
    struct teemate_broker *broker; /* a reference */
    uint64_t process;
    uint64_t number;
    uint64_t session;
    struct teemate_enclave_entry entry;
    struct teemate_enclave *native; /* NULL while it is attached, and once it is unmapped */
    struct teemate_lease *leases;   /* owned; those that are taken outlive the grant's end */
    unsigned taken;
    unsigned visitors;              /* threads in teemate_take, _acquire or _release */
    bool ended;                     /* the program has given it up */
    bool over;                      /* whoever gave it knows nothing of it any more */
    bool draining;
    atomic_bool listening;          /* the broker is heard without being asked */
    _Atomic uint32_t gone;          /* enum gone */
    _Atomic uint64_t patience;      /* now_ns(): until then calls that are inside may end by themselves */

    /* While it is attached. */
    int enclave_fd, arena_fd;
    struct teemate_segment *segments;
    size_t segment_count;
};

/* lease.c */
/* Fill `error` with why the grant or the lease is gone, and return the code. */
int gone_error(const struct teemate_grant *grant, const struct teemate_lease *lease, struct teemate_error *error);
/* Forget the key and unmap the TCS.  False: a thread is inside, and will do it. */
bool lease_close_locked(struct teemate_lease *lease);
void lease_free_locked(struct teemate_lease *lease);

/* slots.c: slots of a grant come from the broker and go back to it */
/* Append what an answer's `slots` are; NULL, or the key that is wrong, "" where there is no memory. */
const char *slots_read_locked(struct teemate_grant *grant, const struct value *slots);
/* Open those that are not open yet; what fails is left as it is. */
int slots_open_locked(struct teemate_grant *grant, struct teemate_error *error);
/* `slots.release` of `count` slots, of which the caller writes the numbers. */
struct request *slots_release_request(struct teemate_broker *broker, uint64_t grant, uint64_t session, size_t count,
                                      bool stolen);
/* Say of the slots that were taken away and are closed that they are unmapped, each once. */
void slots_acknowledge_locked(struct teemate_grant *grant);

/* grant.c */
/* A thread that uses the grant without a lease: until it leaves, teemate_detach does not free it. */
void grant_visit(struct teemate_grant *grant);
void grant_leave(struct teemate_grant *grant);
void grant_mark_locked(struct teemate_grant *grant, enum gone gone, uint64_t patience);
/* Refuse every later call, and unmap once those inside have left: they get `patience` ns.  The broker is told nothing. */
void grant_end_locked(struct teemate_grant *grant, enum gone gone, uint64_t patience);
void grant_unmap_when_left_locked(struct teemate_grant *grant);
/* The lock is given up: the program has ended the grant, and no thread has a lease of it. */
void grant_free_unlock(struct teemate_grant *grant);

/* revoke.c */
void event_take_locked(struct teemate_broker *broker, const struct value *message,
                       const struct descriptors *descriptors);
/* After an absence: these grants (an array, or VALUE_NONE: none) live on. */
void grants_resumed_locked(struct teemate_broker *broker, const struct value *numbers);
void grants_forgotten_locked(struct teemate_broker *broker);

#endif
