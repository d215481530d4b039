/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whose signal is it?
 *
 * The sim needs SIGILL, SIGSEGV, SIGFPE, SIGBUS, SIGTRAP and one real-time signal, the
 * tick; on sgx the tick and SIGBUS are enough, since the vDSO gets the exceptions.  The
 * library takes what its entries need.  What did not happen inside an enclave goes to the handlers that were there
 * before (faulthandler, the JVM, ASan), in the order in which they would have run.
 *
 * The kernel is asked and told directly: libraries that wrap sigaction() (libjsig, the
 * sanitizers) would put themselves before us, and they expect the host's FS.
 *
 * Built without stack protector and sanitizers: on the sim the handler starts with the
 * enclave's FS.
 */
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "enclave.h"
#include "sgx_enter.h"
#include "sim_thread.h"

#define SA_RESTORER 0x04000000ul
#define CHAIN_MAX 8u
#define OWNED 5u
#define TICK OWNED /* index of the tick in the tables */

#define RFLAGS_AC 0x40000
#define HANDLER_STACK (1u << 20) /* what a handler needs at most, for a guess */

/* The kernel's struct sigaction. */
struct action {
    void (*handler)(int, siginfo_t *, void *);
    unsigned long flags;
    void (*restorer)(void);
    uint64_t mask;
};

/* Who comes after us, latest first.  Never changed once published, never freed. */
struct chain {
    uint32_t count;
    struct action actions[CHAIN_MAX];
};

static const int owned[OWNED] = {SIGILL, SIGSEGV, SIGFPE, SIGBUS, SIGTRAP};
static struct chain *_Atomic chains[OWNED + 1];
static _Atomic int tick_signal;
static _Atomic uint32_t installed; /* a bit for each of the tables */
static _Atomic uint64_t checked_at; /* time stamp counter */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/*
 * A handler that calls its predecessor calls us again; then it is the turn of the next
 * in the chain, not of that handler.  Only used while FS is the host's.
 */
static __thread struct {
    const void *context;
    uint32_t depth;
} nested[OWNED + 1] __attribute__((tls_model("initial-exec")));

static void on_signal(int sig, siginfo_t *info, void *context);

int signals_tick(void)
{
    return atomic_load_explicit(&tick_signal, memory_order_relaxed);
}

static int get_action(int sig, struct action *action)
{
    return (int)bare_syscall(SYS_rt_sigaction, sig, 0, (long)action, 8);
}

static int set_action(int sig, const struct action *action)
{
    return (int)bare_syscall(SYS_rt_sigaction, sig, (long)action, 0, 8);
}

static bool is_default(const struct action *action)
{
    return (void *)action->handler == (void *)SIG_DFL;
}

static uint32_t index_of(int sig)
{
    for (uint32_t i = 0; i < OWNED; i++)
        if (owned[i] == sig)
            return i;
    return TICK;
}

/* ---- in the handler -------------------------------------------------------- */

/* End as if nobody had a handler: with the signal's default action, at the same place. */
static void take_default(int sig, siginfo_t *info)
{
    const struct action action = {.handler = (void (*)(int, siginfo_t *, void *))(void *)SIG_DFL};

    set_action(sig, &action);
    bare_syscall(SYS_rt_tgsigqueueinfo, bare_syscall(SYS_getpid, 0, 0, 0, 0), bare_syscall(SYS_gettid, 0, 0, 0, 0), sig,
                (long)info);
}

static bool from_ourselves(const siginfo_t *info)
{
    return info->si_code <= 0 && info->si_pid == bare_syscall(SYS_getpid, 0, 0, 0, 0);
}

/* Raised by a handler that was called with `outer`, which lies right above it on its stack? */
static bool is_above(const void *outer, const ucontext_t *uc)
{
    uint64_t rsp = (uint64_t)uc->uc_mcontext.gregs[REG_RSP];

    return (uint64_t)(uintptr_t)outer - rsp < HANDLER_STACK;
}

/*
 * Not ours: to whom it would have gone without us.  `called`: by another handler, not by
 * the kernel.
 */
static void pass_on(int sig, siginfo_t *info, void *context, bool called)
{
    uint32_t index = index_of(sig), depth = 0;
    const struct chain *chain = atomic_load(&chains[index]);
    const ucontext_t *uc = context;
    const struct action *action;
    const void *outer = nested[index].context;
    uint32_t outer_depth = nested[index].depth;
    uint64_t mask;

    /*
     * Called by a handler that we called: with our own context, or by raise() after it put
     * its predecessor back.  A new fault starts at the top again: a handler may have left
     * with siglongjmp and not told us, and the next context lies where that one's was.
     */
    if (outer && (called ? outer == context : from_ourselves(info) && is_above(outer, uc)))
        depth = outer_depth + 1;
    if (!chain || depth >= chain->count || is_default(&chain->actions[depth])) {
        nested[index].context = NULL;
        take_default(sig, info);
        return;
    }
    action = &chain->actions[depth];
    if ((void *)action->handler == (void *)SIG_IGN) {
        if (info->si_code > 0)
            take_default(sig, info); /* the kernel does not let a fault be ignored */
        return;
    }
    nested[index].context = context;
    nested[index].depth = depth;
    memcpy(&mask, &uc->uc_sigmask, sizeof(mask));
    mask |= action->mask;
    if (!(action->flags & SA_NODEFER))
        mask |= SIGNAL_MASK(sig);
    bare_syscall(SYS_rt_sigprocmask, SIG_SETMASK, (long)&mask, 0, 8);
    if (action->flags & SA_SIGINFO)
        action->handler(sig, info, context);
    else
        ((void (*)(int))(void *)action->handler)(sig);
    nested[index].context = outer;
    nested[index].depth = outer_depth;
}

/* The block whose alternate stack was in use when the signal came, or NULL. */
static struct sim_thread *block_of(const ucontext_t *uc)
{
    struct sim_thread *thread;

    if (uc->uc_stack.ss_size != SIM_STACK_SIZE || (uintptr_t)uc->uc_stack.ss_sp % SGX_PAGE)
        return NULL;
    thread = (struct sim_thread *)((uint8_t *)uc->uc_stack.ss_sp - SIM_HEADER_PAGES * SGX_PAGE);
    return thread->magic == SIM_THREAD_MAGIC && thread->self == thread ? thread : NULL;
}

static void on_signal(int sig, siginfo_t *info, void *context)
{
    ucontext_t *uc = context;
    uint64_t rip = (uint64_t)uc->uc_mcontext.gregs[REG_RIP];
    struct sim_thread *thread = block_of(uc);
    uint64_t flags;

    /* The kernel clears DF and TF for a handler, but not the enclave's AC. */
    __asm__ volatile("pushfq; pop %0" : "=r"(flags));
    if (flags & RFLAGS_AC)
        __asm__ volatile("push %0; popfq" : : "r"(flags & ~(uint64_t)RFLAGS_AC) : "cc");

    if (thread && rip >= (uint64_t)(uintptr_t)sim_region_start && rip < (uint64_t)(uintptr_t)sim_region_end) {
        if (sig == signals_tick())
            return; /* half inside: the ticker comes again */
    } else if (thread && atomic_load_explicit(&thread->inside, memory_order_relaxed) && !thread->handling) {
        sim_inside(thread, sig, info, context);
        return;
    }
    if (sig == signals_tick() && info->si_code == SI_QUEUE && info->si_value.sival_ptr == &tick_signal) {
        sgx_on_tick(uc); /* or came late: outside already */
        return;
    }
    if (sig == SIGBUS && info->si_code > 0 && sgx_on_memory_error(info, uc))
        return;
    /* The kernel puts the context right above the return address (struct rt_sigframe). */
    pass_on(sig, info, context, context != (uint64_t *)__builtin_frame_address(0) + 2);
}

/* ---- outside --------------------------------------------------------------- */

const void *signals_tick_cookie(void)
{
    return &tick_signal;
}

/* Install ours and put `before` at the head of the chain; the lock is held. */
static int put_first(int sig, const struct action *before)
{
    struct action ours = {
        .handler = on_signal,
        .flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART | SA_RESTORER,
        .restorer = signals_restorer,
        .mask = ~0ull,
    };
    const struct chain *old = atomic_load(&chains[index_of(sig)]);
    struct chain *chain = calloc(1, sizeof(*chain));

    if (!chain)
        return -ENOMEM;
    /* The synchronous ones stay open: a fault of the handler's own must not hang. */
    for (uint32_t i = 0; i < OWNED; i++)
        ours.mask &= ~SIGNAL_MASK(owned[i]);
    chain->actions[chain->count++] = *before;
    for (uint32_t i = 0; old && i < old->count; i++) {
        if (old->actions[i].handler == before->handler)
            continue; /* it came back: once is enough */
        if (chain->count == CHAIN_MAX) {
            free(chain);
            return -EUCLEAN;
        }
        chain->actions[chain->count++] = old->actions[i];
    }
    atomic_store(&chains[index_of(sig)], chain);
    return set_action(sig, &ours) ? -EUCLEAN : 0;
}

static int adopt(int sig)
{
    struct action now;
    int error = 0;

    pthread_mutex_lock(&lock);
    if (get_action(sig, &now))
        error = -EUCLEAN;
    else if (now.handler != on_signal)
        error = put_first(sig, &now);
    pthread_mutex_unlock(&lock);
    return error;
}

static int choose_tick(void)
{
    struct action now;

    for (int sig = SIGRTMAX - 1; sig > SIGRTMIN; sig--)
        if (!get_action(sig, &now) && is_default(&now))
            return sig;
    return SIGRTMAX - 1; /* Go handles all of them: chained like the others */
}

/*
 * dlclose() must not take the code away: handlers and the ticker stay for the life of the process.
 * A program that has the library linked in stays anyway, and may no longer open files (the warden).
 */
static void stay_loaded(void)
{
    struct link_map *map = NULL;
    Dl_info who;

    /* The loader's own name, so that it finds the library without opening a file; the program has none. */
    if (dladdr1((void *)on_signal, &who, (void **)&map, RTLD_DL_LINKMAP) && map && map->l_name[0])
        dlopen(map->l_name, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
}

static int owned_signal(uint32_t index)
{
    return index == TICK ? signals_tick() : owned[index];
}

int signals_install(uint32_t which)
{
    int error = 0;

    if (__builtin_expect((atomic_load_explicit(&installed, memory_order_acquire) & which) == which, 1))
        return 0;
    pthread_mutex_lock(&lock);
    if (!atomic_load(&tick_signal))
        atomic_store(&tick_signal, choose_tick());
    pthread_mutex_unlock(&lock);
    stay_loaded();
    for (uint32_t i = 0; i <= OWNED && !error; i++)
        if (which & 1u << i)
            error = adopt(owned_signal(i));
    if (!error)
        atomic_fetch_or_explicit(&installed, which, memory_order_release);
    return error;
}

static uint64_t now(void)
{
    uint32_t a, d;

    __asm__ volatile("rdtsc" : "=a"(a), "=d"(d));
    return (uint64_t)d << 32 | a;
}

int signals_recheck(void)
{
    struct action action;
    uint64_t at = now();
    int error = 0;

    /* EEXIT itself is a SIGILL or a SIGSEGV; who replaces handlers replaces these. */
    get_action(SIGILL, &action);
    if (action.handler == on_signal && at - atomic_load_explicit(&checked_at, memory_order_relaxed) < 2000000)
        return 0;
    for (uint32_t i = 0; i <= OWNED && !error; i++)
        error = adopt(owned_signal(i));
    atomic_store_explicit(&checked_at, at, memory_order_relaxed);
    return error;
}

bool signals_tick_ready(void)
{
    return adopt(signals_tick()) == 0;
}

int teemate_signals_check(int put_back, struct teemate_diag *diag)
{
    uint32_t mine = atomic_load(&installed);

    for (uint32_t i = 0; i <= OWNED; i++) {
        int sig = owned_signal(i);
        struct action action;
        Dl_info who = {0};
        int error = 0;

        if (!(mine & 1u << i)) /* nobody can have taken what we never had */
            continue;
        if (!get_action(sig, &action) && action.handler == on_signal)
            continue;
        if (put_back) {
            error = adopt(sig);
            if (!error)
                continue;
        }
        if (is_default(&action))
            who.dli_fname = "nobody (the default action was restored)";
        else if ((void *)action.handler == (void *)SIG_IGN)
            who.dli_fname = "nobody (it is ignored)";
        else if (!dladdr((void *)action.handler, &who) || !who.dli_fname)
            who.dli_fname = "code that belongs to no library (compiled at run time?)";
        return diag_set(diag, -EUCLEAN, TEEMATE_STEP_SIGNALS, sig, 0,
                        "the handler of signal %d (%s) was replaced; it is now handled by %s%s%s%s: "
                        "install that handler before the first entry, or call teemate_signals_check(1, ...)",
                        sig, strsignal(sig), who.dli_fname, who.dli_sname ? " (" : "",
                        who.dli_sname ? who.dli_sname : "", who.dli_sname ? ")" : "");
    }
    return 0;
}

/* In a child of fork: another thread may have held it. */
void signals_forked(void)
{
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    memset(nested, 0, sizeof(nested));
}
