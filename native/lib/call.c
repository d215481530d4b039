/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ECALLs by name, and the OCALLs that they make.
 *
 * One function, slot_run(), drives a call from entry to entry until the caller
 * is needed.  Between entries the whole state is in the slot: what entry comes
 * next.  So a pause, an error of the entry itself and a refused handler all
 * leave a slot that can go on or be given up.
 *
 * OCALLs that the SDK itself makes (wait, wake, print, and files of a private enclave) are done here.  A wait is
 * bounded, and its wake-up is only a hint: whoever maps the arena can write it.
 * The enclave looks again in any case.
 */
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "counters.h"
#include "files.h"
#include "private.h"
#include "slot.h"

#define WAIT_LIMIT_NS 100000000ull
/*
 * A call that only waits (or prints) hands control back to its caller this
 * often.  A signal whose handler ran just before the wait began would otherwise
 * go unnoticed by an interpreter that runs its own handlers later.  Below the
 * longest wait by more than a tick of the coarse clock: such a wait always counts.
 */
#define ATTENTION_NS 90000000ull
#define PRINT_LIMIT 2048u
/* Pauses of an entry that the gate refuses at once: it cannot begin, or the gate is none. */
#define PROBE_LIMIT 20
/*
 * EENTERs of a TCS that is busy.  The warden looks at it, who takes a microsecond; but on the sim a TCS stays
 * busy while whoever is in it has no processor, so what is busy after the yields is given a second.  Who
 * is in there for longer runs there, and is a thief.
 */
#define BUSY_YIELDS 50
#define BUSY_PAUSES 500
#define BUSY_PAUSE_NS 2000000

/* What came from the enclave cannot be: it is given up, as after a fault. */
static int slot_nonsense(struct teemate_slot *slot)
{
    slot->state = SLOT_INTERRUPTED;
    return -EBADMSG;
}

/* ---- OCALLs of the SDK --------------------------------------------------------- */

static uint64_t clock_now(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static int32_t ocall_wait_begin(struct teemate_slot *slot, const struct tm_ocall_wait *wait)
{
    uint64_t ns = wait->timeout_ns < WAIT_LIMIT_NS ? wait->timeout_ns : WAIT_LIMIT_NS;

    if (wait->index >= TM_ARENA_WORDS || !slot->enclave->arena_mapped)
        return TM_E_OCALL;
    slot->wait = *wait;
    slot->wait_until = clock_now(CLOCK_MONOTONIC) + ns;
    return 0;
}

/*
 * Go on with the slot's wait, if there is one, for `limit_ns` at most (0: to its end).
 * False when it is not over yet: a lock's patience counts whole waits, so neither a pause
 * nor a signal may end one.
 */
static bool ocall_wait(struct teemate_slot *slot, uint64_t limit_ns)
{
    uint32_t *words = (uint32_t *)TM_ARENA(slot->enclave->base, slot->enclave->size);
    struct timespec timeout = {0};
    uint64_t now, ns;

    if (slot->wait_until == 0)
        return true;
    now = clock_now(CLOCK_MONOTONIC);
    ns = slot->wait_until > now ? slot->wait_until - now : 0;
    timeout.tv_nsec = (long)(limit_ns != 0 && limit_ns < ns ? limit_ns : ns);
    /* With a timeout, FUTEX_WAIT ends with EINTR after any handler (kernel/futex: restart block). */
    if (syscall(SYS_futex, &words[slot->wait.index], FUTEX_WAIT, slot->wait.expected, &timeout, NULL, 0) != 0 &&
        (errno == EINTR || errno == ETIMEDOUT) && clock_now(CLOCK_MONOTONIC) < slot->wait_until)
        return false;
    slot->wait_until = 0;
    return true;
}

static int32_t ocall_wake(struct teemate_slot *slot, const struct tm_ocall_wait *wait)
{
    uint32_t *words = (uint32_t *)TM_ARENA(slot->enclave->base, slot->enclave->size);
    uint32_t count = wait->expected < INT_MAX ? wait->expected : INT_MAX;

    if (wait->index >= TM_ARENA_WORDS || !slot->enclave->arena_mapped)
        return TM_E_OCALL;
    __atomic_add_fetch(&words[wait->index], 1, __ATOMIC_SEQ_CST);
    if (count > 0)
        syscall(SYS_futex, &words[wait->index], FUTEX_WAKE, count, NULL, NULL, 0);
    return 0;
}

/* The text goes to a terminal perhaps: no control characters but line ends and tabs. */
static int32_t ocall_print(const uint8_t *text, uint64_t length)
{
    char line[PRINT_LIMIT];
    size_t size = length < sizeof(line) ? (size_t)length : sizeof(line);
    size_t done = 0;

    for (size_t i = 0; i < size; i++) {
        uint8_t c = text[i];
        bool plain = c >= 0x20 ? c != 0x7f : c == '\n' || c == '\t';

        line[i] = plain ? (char)c : '?';
    }
    while (done < size) {
        ssize_t n = write(STDERR_FILENO, line + done, size - done);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return TM_E_OCALL;
        done += (size_t)n;
    }
    return 0;
}

/* With the descriptor that the slot was lent. */
static int64_t lent_file(const struct teemate_slot *slot, const struct tm_file_request *request, void *data)
{
    for (size_t i = 0; i < SLOT_LENT; i++)
        if (slot->lent[i].name[0] != '\0' && memcmp(slot->lent[i].name, request->name, sizeof(request->name)) == 0)
            return file_do(slot->lent[i].fd, request, data);
    return -EBADF;
}

/* A request of `length` bytes lies in the slot's buffer, where its answer of *answer bytes goes. */
static int32_t ocall_file(struct teemate_slot *slot, uint64_t length, uint64_t *answer)
{
    uint8_t *buffer = slot->ocall_buffer, *place;
    struct tm_file_request request;
    uint64_t data = 0, room = 0;
    int64_t result;

    memcpy(&request, buffer, sizeof(request));
    if (request.op == TM_FILE_OP_READ)
        room = request.length;
    else if (request.op == TM_FILE_OP_WRITE)
        data = request.length;
    if (room > TM_FILE_DATA || data > TM_FILE_DATA || length != sizeof(request) + data)
        return TM_E_OCALL;
    place = buffer + (data != 0 ? sizeof(request) : sizeof(result));
    result = private_has_disk(slot->enclave) ? private_file(slot->enclave, &request, place)
                                             : lent_file(slot, &request, place);
    if (room != 0 && result > (int64_t)room)
        result = -EIO;
    memcpy(buffer, &result, sizeof(result));
    *answer = sizeof(result) + (room != 0 && result > 0 ? (uint64_t)result : 0);
    return 0;
}

/* The next entry returns from the outstanding OCALL. */
static void slot_prepare_return(struct teemate_slot *slot, int32_t status, uint64_t length)
{
    slot->entry = (struct slot_entry){
        .rdi = TM_SEL_OCALL_RETURN,
        .rsi = slot->nonce,
        .rdx = (uint64_t)(int64_t)status,
        .r8 = length,
    };
    slot->function = SGX_EENTER;
    slot->state = SLOT_PAUSED;
}

/*
 * An OCALL of `length` bytes lies in the buffer.  Returns 1 when it was done here
 * and the next entry returns from it, 0 when it is the caller's (`call` tells it).
 */
static int slot_ocall(struct teemate_slot *slot, uint64_t kind, uint64_t length, struct teemate_call *call)
{
    const uint8_t *buffer = slot->ocall_buffer;
    struct tm_ocall_wait wait;
    uint32_t name_length;
    int32_t status;

    slot->asked = true;
    if (length > SLOT_OCALL_CAPACITY)
        return slot_nonsense(slot);
    switch (kind) {
    case TM_OCALL_WAIT:
    case TM_OCALL_WAKE:
        if (length != sizeof(wait))
            return slot_nonsense(slot);
        memcpy(&wait, buffer, sizeof(wait));
        status = kind == TM_OCALL_WAIT ? ocall_wait_begin(slot, &wait) : ocall_wake(slot, &wait);
        slot_prepare_return(slot, status, 0);
        return 1;
    case TM_OCALL_PRINT:
        slot_prepare_return(slot, ocall_print(buffer, length), 0);
        return 1;
    case TM_OCALL_FILE: {
        uint64_t answer = 0;

        if (length < sizeof(struct tm_file_request))
            return slot_nonsense(slot);
        status = ocall_file(slot, length, &answer);
        slot_prepare_return(slot, status, answer);
        return 1;
    }
    case TM_OCALL_NAMED:
        if (length < sizeof(name_length))
            return slot_nonsense(slot);
        memcpy(&name_length, buffer, sizeof(name_length));
        if (name_length < 1 || name_length > TM_NAME_MAX || name_length > length - sizeof(name_length))
            return slot_nonsense(slot);
        call->outcome = TEEMATE_CALL_OCALL;
        call->ocall_name = (const char *)buffer + sizeof(name_length);
        call->ocall_name_length = name_length;
        call->ocall_data = buffer + sizeof(name_length) + name_length;
        call->ocall_length = length - sizeof(name_length) - name_length;
        slot->state = SLOT_ASKING;
        return 0;
    default:
        return slot_nonsense(slot);
    }
}

/* ---- calls --------------------------------------------------------------------- */

static void busy_pause(void)
{
    static const struct timespec pause = {.tv_nsec = BUSY_PAUSE_NS};

    nanosleep(&pause, NULL);
}

static int slot_done(struct teemate_slot *slot, const struct teemate_regs *regs, struct teemate_call *call)
{
    int64_t status = (int64_t)regs->rsi;

    if (status < INT32_MIN || status > INT32_MAX)
        return slot_nonsense(slot);
    /* TM_E_SPACE tells how much it would have taken; everything else fits. */
    if (status != TM_E_SPACE && regs->rdx > slot->request.out_cap)
        return slot_nonsense(slot);
    slot->state = SLOT_IDLE;
    /* These may have come before the identity was bound; binding the same again is harmless. */
    if (status != TM_E_ARGUMENT && status != TM_E_UNBOUND && status != TM_E_MAC && status != TM_E_STATE)
        slot->bound = true;
    call->outcome = TEEMATE_CALL_DONE;
    call->status = (int32_t)status;
    call->out_length = regs->rdx;
    return 0;
}

/*
 * Is the TCS gone?  One entry without a key tells: of an enclave that is there, the gate
 * refuses it (#GP: the TCS has no SSA frame left, but it is there).  Where the EPC is
 * empty, EENTER cannot get at the TCS.
 */
static bool tcs_gone(struct teemate_slot *slot)
{
    struct sgx_enclave_run run = {0};
    uint32_t function = SGX_EENTER;
    int result = TEEMATE_PAUSED;

    for (int tries = 0; result == TEEMATE_PAUSED && tries < PROBE_LIMIT; tries++) {
        struct teemate_regs regs = {0};

        result = enclave_enter(slot->enclave, slot->tcs_offset, &regs, function, 0, ENTRY_STACK_CALLER, &run);
        function = run.function;
    }
    return result == TEEMATE_LEFT && run.function == SGX_EENTER && run.exception_vector == SGX_VECTOR_PF;
}

/*
 * #GP of ERESUME is a mistake of the enclave's own, or there was nothing to resume.  Only the
 * gate knows, and it tells who has the key: a call of this key that was interrupted is the
 * own one.  A key that is refused was taken away, and the warden has undone the call.  When the
 * key opens the slot, or it stays busy, a stranger has resumed the call to its end, or still does.
 */
static enum teemate_call_outcome slot_unresumed(struct teemate_slot *slot)
{
    struct sgx_enclave_run run = {0};
    uint32_t function = SGX_EENTER;

    for (int tries = 0; tries < BUSY_YIELDS + BUSY_PAUSES; tries++) {
        struct teemate_regs regs = {
            .rdi = TM_SEL_BIND, /* harmless: the same again */
            .rsi = (uintptr_t)&slot->bind,
            .r12 = slot->secret->key[0],
            .r13 = slot->secret->key[1],
        };
        int result = enclave_enter(slot->enclave, slot->tcs_offset, &regs, function, 0, ENTRY_STACK_CALLER, &run);

        if (result == TEEMATE_LANDED)
            return regs.rdi == TM_EXIT_INTERRUPTED ? TEEMATE_CALL_FAULT : TEEMATE_CALL_REVOKED;
        if (result == TEEMATE_LEFT && run.function == SGX_EEXIT)
            return TEEMATE_CALL_STOLEN;
        if (result == TEEMATE_LEFT && run.function == SGX_EENTER && run.exception_vector == SGX_VECTOR_PF)
            return TEEMATE_CALL_LOST;
        if (result < 0 || (result == TEEMATE_LEFT && run.exception_vector != SGX_VECTOR_GP))
            return TEEMATE_CALL_FAULT;
        function = result == TEEMATE_PAUSED ? run.function : SGX_EENTER;
        if (result == TEEMATE_PAUSED)
            continue;
        if (tries < BUSY_YIELDS)
            sched_yield();
        else
            busy_pause();
    }
    return TEEMATE_CALL_STOLEN;
}

/*
 * A page fault of EENTER itself is one at the TCS: the EPC is empty.  When it is emptied
 * under a thread that is inside, that thread's next access to a page of ELRANGE faults, or
 * the ERESUME after its next interrupt: this looks like a mistake of the enclave's own, so
 * it is tried, once.  #GP is a busy TCS or one without a free SSA frame: somebody else's
 * thread stands in it.
 */
static void slot_faulted(struct teemate_slot *slot, struct teemate_call *call)
{
    const struct sgx_enclave_run *run = &call->run;
    bool page_fault = run->exception_vector == SGX_VECTOR_PF;
    bool in_elrange = run->exception_addr - slot->enclave->base < slot->enclave->size;

    slot->state = SLOT_INTERRUPTED;
    call->outcome = TEEMATE_CALL_FAULT;
    if (run->exception_vector == SGX_VECTOR_MC)
        call->outcome = TEEMATE_CALL_LOST; /* a page of it failed, and the kernel gives none in its place */
    if (page_fault && (run->function == SGX_EENTER || (in_elrange && tcs_gone(slot))))
        call->outcome = TEEMATE_CALL_LOST;
    if (run->exception_vector == SGX_VECTOR_GP && run->function == SGX_ERESUME)
        call->outcome = slot_unresumed(slot);
    slot->revoked = call->outcome == TEEMATE_CALL_REVOKED;
}

/* Drive the entry that the slot holds until the call is done or its caller is needed. */
static int slot_run(struct teemate_slot *slot, uint64_t pause_after_ns, struct teemate_call *call)
{
    uint64_t start = clock_now(CLOCK_MONOTONIC_COARSE);
    uint64_t left_ns = pause_after_ns;
    int busy = 0;

    memset(call, 0, sizeof(*call));
    if (!ocall_wait(slot, left_ns)) {
        call->outcome = TEEMATE_CALL_PAUSED;
        return 0;
    }
    for (;;) {
        uint32_t function = slot->function;
        struct teemate_regs regs = {
            .rdi = slot->entry.rdi,
            .rsi = slot->entry.rsi,
            .rdx = slot->entry.rdx,
            .r8 = slot->entry.r8,
            .r12 = slot->secret->key[0],
            .r13 = slot->secret->key[1],
        };
        uint64_t passed;
        bool waited;
        int result = enclave_enter(slot->enclave, slot->tcs_offset, &regs, function, left_ns,
                                   ENTRY_STACK_CALLER, &call->run);

        if (result < 0)
            return result; /* not entered: the slot still holds what was to be done */
        if (result == TEEMATE_PAUSED) {
            /* Paused before EENTER had begun, the same entry is made again. */
            slot->function = call->run.function == SGX_EENTER ? SGX_EENTER : SGX_ERESUME;
            slot->state = SLOT_PAUSED;
            call->outcome = TEEMATE_CALL_PAUSED;
            return 0;
        }
        if (result == TEEMATE_LANDED) {
            /* A refused ECALL left nothing inside; anything else was reset or stands there. */
            bool began = function != SGX_EENTER || slot->entry.rdi != TM_SEL_ECALL;

            slot->state = began ? SLOT_INTERRUPTED : SLOT_IDLE;
            slot->revoked = true;
            call->outcome = TEEMATE_CALL_REVOKED;
            return 0;
        }
        if (call->run.function == SGX_EENTER && call->run.exception_vector == SGX_VECTOR_GP) {
            if (++busy < BUSY_YIELDS) {
                sched_yield();
                continue;
            }
            if (slot->busy_pauses++ < BUSY_PAUSES) { /* the caller may have a deadline, or a signal to handle */
                busy_pause();
                slot->state = SLOT_PAUSED;
                call->outcome = TEEMATE_CALL_PAUSED;
                return 0;
            }
        }
        slot->busy_pauses = 0;
        if (call->run.function != SGX_EEXIT) {
            slot_faulted(slot, call);
            return 0;
        }
        if (regs.rdi == TM_EXIT_DONE)
            return slot_done(slot, &regs, call);
        if (regs.rdi != TM_EXIT_OCALL)
            return slot_nonsense(slot);

        slot->bound = true; /* code of an ECALL runs after the binding only */
        slot->nonce = regs.r8;
        result = slot_ocall(slot, regs.rsi, regs.rdx, call);
        if (result <= 0)
            return result;
        passed = clock_now(CLOCK_MONOTONIC_COARSE) - start;
        if (pause_after_ns != 0)
            left_ns = pause_after_ns > passed ? pause_after_ns - passed : 1;
        waited = ocall_wait(slot, left_ns);
        passed = clock_now(CLOCK_MONOTONIC_COARSE) - start;
        if (!waited || passed >= ATTENTION_NS || (pause_after_ns != 0 && passed >= pause_after_ns)) {
            call->outcome = TEEMATE_CALL_PAUSED;
            return 0;
        }
        left_ns = pause_after_ns != 0 ? pause_after_ns - passed : 0;
    }
}

/* The same, counted where somebody looks. */
static int slot_step(struct teemate_slot *slot, uint64_t pause_after_ns, struct teemate_call *call)
{
    struct counters_step step = counters_enter(slot);
    int result = slot_run(slot, pause_after_ns, call);

    counters_leave(step, result == 0 && call->outcome == TEEMATE_CALL_DONE);
    return result;
}

/* Take the slot for a step that is allowed in `state`. */
static int slot_take_in(struct teemate_slot *slot, enum slot_state state)
{
    int result = slot_take(slot);

    if (result < 0)
        return result;
    if (slot->state == state)
        return 0;
    if (slot->state == SLOT_INTERRUPTED)
        result = -ESTALE;
    else
        result = state == SLOT_IDLE ? -EBUSY : -EINVAL;
    slot_give(slot);
    return result;
}

int teemate_slot_call(struct teemate_slot *slot, const char *name, size_t name_length, const void *in,
                      size_t in_length, void *out, size_t out_capacity, uint64_t pause_after_ns,
                      struct teemate_call *call)
{
    int result;

    if (slot == NULL || name == NULL || name_length < 1 || name_length > TM_NAME_MAX || call == NULL ||
        (in == NULL && in_length != 0) || (out == NULL && out_capacity != 0))
        return -EINVAL;
    result = slot_take_in(slot, SLOT_IDLE);
    if (result == -ESTALE && slot->revoked)
        goto revoked;
    if (result < 0)
        return result;
    if (slot->revoked) {
        slot_give(slot);
        goto revoked;
    }
    if (slot->enclave->warden != NULL) {
        result = private_tick(slot->enclave);
        if (result < 0) {
            slot_give(slot);
            return result;
        }
    }
    slot->request = (struct tm_call){
        .name = (uintptr_t)name,
        .name_len = name_length,
        .in = (uintptr_t)in,
        .in_len = in_length,
        .out = (uintptr_t)out,
        .out_cap = out_capacity,
        .ocall_buf = (uintptr_t)slot->ocall_buffer,
        .ocall_cap = SLOT_OCALL_CAPACITY,
        .bind = slot->bound ? 0 : (uintptr_t)&slot->bind,
    };
    slot->entry = (struct slot_entry){.rdi = TM_SEL_ECALL, .rsi = (uintptr_t)&slot->request};
    slot->function = SGX_EENTER;
    slot->busy_pauses = 0;
    result = slot_step(slot, pause_after_ns, call);
    slot_give(slot);
    return result;

revoked:
    memset(call, 0, sizeof(*call));
    call->outcome = TEEMATE_CALL_REVOKED;
    return 0;
}

int teemate_slot_resume(struct teemate_slot *slot, uint64_t pause_after_ns, struct teemate_call *call)
{
    int result;

    if (slot == NULL || call == NULL)
        return -EINVAL;
    result = slot_take_in(slot, SLOT_PAUSED);
    if (result < 0)
        return result;
    /* Time passes for who stays inside, too; if it could not be told the next call says so. */
    if (slot->enclave->warden != NULL)
        private_tick(slot->enclave);
    result = slot_step(slot, pause_after_ns, call);
    slot_give(slot);
    return result;
}

int teemate_slot_answer(struct teemate_slot *slot, int32_t status, const void *data, size_t length,
                        uint64_t pause_after_ns, struct teemate_call *call)
{
    int result;

    if (slot == NULL || call == NULL || (data == NULL && length != 0) || length > SLOT_OCALL_CAPACITY)
        return -EINVAL;
    result = slot_take_in(slot, SLOT_ASKING);
    if (result < 0)
        return result;
    if (status < 0)
        length = 0;
    else if (length > 0)
        memmove(slot->ocall_buffer, data, length);
    slot_prepare_return(slot, status < 0 ? TM_E_OCALL : status, length);
    result = slot_step(slot, pause_after_ns, call);
    slot_give(slot);
    return result;
}
