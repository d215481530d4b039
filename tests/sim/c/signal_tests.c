/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include "tests.h"

static struct teemate_enclave *enclave;
static volatile int received, on_host_stack;
static volatile uint64_t word_seen;
static uintptr_t stack_low, stack_high;
static __thread int tls_mark;

static void set_handler(int sig, void (*handler)(int, siginfo_t *, void *), int flags)
{
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};

    CHECK(sigaction(sig, &action, NULL) == 0);
}

static void start_timer(int which, long microseconds, long again)
{
    struct itimerval timer = {.it_value.tv_usec = microseconds, .it_interval.tv_usec = again};

    CHECK(setitimer(which, &timer, NULL) == 0);
}

/* What a host's handler expects: its stack, its TLS, and (seen from here) a TCS that is free. */
static void note(void)
{
    char here;

    received++;
    tls_mark++;
    /* On sgx that may be the TCS's. */
    on_host_stack += on_sgx() || ((uintptr_t)&here > stack_low && (uintptr_t)&here < stack_high);
    word_seen = tcs_word(enclave, 0);
}

static void stop_spinning(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)info, (void)context;
    if (sig == SIGALRM && !board_get(enclave, ROUNDS))
        return; /* too early: the timer comes again */
    if (sig == SIGALRM && received)
        return; /* it came again before it was stopped */
    if (sig == SIGALRM)
        start_timer(ITIMER_REAL, 0, 0);
    note();
    board_set(enclave, STOP, 1);
}

static void prepare(void)
{
    pthread_attr_t attr;
    void *low;
    size_t size;

    enclave = test_enclave_mapped(NULL);
    CHECK(pthread_getattr_np(pthread_self(), &attr) == 0);
    CHECK(pthread_attr_getstack(&attr, &low, &size) == 0);
    pthread_attr_destroy(&attr);
    stack_low = (uintptr_t)low;
    stack_high = stack_low + size;
}

/* OP_SPIN until a signal's handler ends it; how often was it paused? */
static int spin(void)
{
    struct result r = enter(enclave, 0, OP_SPIN, 0, 0);
    int pauses = 0;

    while (r.outcome == TEEMATE_PAUSED) {
        pauses++;
        EQUAL(r.run.function, SGX_ERESUME);
        r = resume(enclave, 0);
    }
    LEFT(r);
    EQUAL(tcs_word(enclave, 0), IDLE(0));
    return pauses;
}

static void an_alarm_reaches_the_host_while_a_thread_is_inside(void)
{
    prepare();
    set_handler(SIGALRM, stop_spinning, 0);
    start_timer(ITIMER_REAL, 3000, 3000);
    CHECK(spin() >= handler_pauses());
    EQUAL(received, 1);
    EQUAL(on_host_stack, 1);
    EQUAL(tls_mark, 1);
    EQUAL(word_seen, IDLE(1)); /* the thread was out, its frame saved */
}

struct sender {
    pthread_t target;
    int sig;
};

static void *send_when_inside(void *argument)
{
    struct sender *sender = argument;

    while (board_get(enclave, ROUNDS) == 0)
        sched_yield();
    pthread_kill(sender->target, sender->sig);
    return NULL;
}

static void an_interrupt_from_another_thread_pauses_the_call(void)
{
    struct sender sender = {pthread_self(), SIGINT};
    pthread_t other;

    SIM_ONLY("handlers run without a pause, and any tick pauses");
    prepare();
    set_handler(SIGINT, stop_spinning, 0);
    CHECK(pthread_create(&other, NULL, send_when_inside, &sender) == 0);
    EQUAL(enter(enclave, 0, OP_SPIN, 0, 0).outcome, TEEMATE_PAUSED);
    EQUAL(received, 1); /* delivered before the call came back */
    EQUAL(tcs_word(enclave, 0), IDLE(1));
    LEFT(resume(enclave, 0));
    pthread_join(other, NULL);
}

static void a_paused_call_can_be_abandoned(void)
{
    struct teemate_regs regs = {.rdi = OP_SPIN};
    struct sgx_enclave_run run = {0};

    prepare();
    EQUAL(teemate_enter(enclave, tcs_of(0), &regs, SGX_EENTER, 1, &run), TEEMATE_PAUSED);
    EQUAL(tcs_word(enclave, 0), IDLE(1));
    LEFT(call(enclave, 0, OP_REGISTERS, 0, 0));
    EQUAL(board_get(enclave, 0), 1); /* RAX at entry */
    board_set(enclave, STOP, 1);
    LEFT(resume(enclave, 0)); /* and can still be brought to its end */
}

static void a_pause_comes_no_earlier_than_asked_for(void)
{
    struct teemate_regs regs = {.rdi = OP_SPIN};
    struct sgx_enclave_run run = {0};
    struct timespec from, to;

    SIM_ONLY("any tick pauses");
    prepare();
    clock_gettime(CLOCK_MONOTONIC, &from);
    EQUAL(teemate_enter(enclave, tcs_of(0), &regs, SGX_EENTER, 30000000, &run), TEEMATE_PAUSED);
    clock_gettime(CLOCK_MONOTONIC, &to);
    CHECK((to.tv_sec - from.tv_sec) * 1000000000ll + to.tv_nsec - from.tv_nsec >= 30000000);
}

static void on_profile(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)info, (void)context;
    note();
    if (received == 20)
        board_set(enclave, STOP, 1);
}

static void a_profiler_samples_on_the_hosts_stack(void)
{
    prepare();
    set_handler(SIGPROF, on_profile, SA_RESTART);
    start_timer(ITIMER_PROF, 1000, 1000);
    spin();
    start_timer(ITIMER_PROF, 0, 0);
    CHECK(received >= 20);
    EQUAL(on_host_stack, received);
}

static void a_child_that_ends_is_noticed_while_inside(void)
{
    prepare();
    set_handler(SIGCHLD, stop_spinning, 0);
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
    if (fork() == 0)
        _exit(0);
    spin();
    EQUAL(received, 1);
}

static sigjmp_buf out;

static void jump_away(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)info, (void)context;
    if (!board_get(enclave, ROUNDS))
        return;
    start_timer(ITIMER_REAL, 0, 0);
    note();
    siglongjmp(out, 1);
}

static void a_handler_may_jump_out_of_a_call(void)
{
    prepare();
    set_handler(SIGALRM, jump_away, 0);
    for (volatile unsigned i = 0; i < 3; i++) {
        board_set(enclave, ROUNDS, 0);
        if (sigsetjmp(out, 1) == 0) {
            start_timer(ITIMER_REAL, 3000, 3000);
            if (enter(enclave, i, OP_SPIN, 0, 0).outcome == TEEMATE_PAUSED) /* on sgx also by a tick that comes first */
                while (resume(enclave, i).outcome == TEEMATE_PAUSED)
                    ;
            abort_test();
        }
        EQUAL(tcs_word(enclave, i), IDLE(1));
        LEFT(call(enclave, 8, OP_NOTHING, 0, 0));
        EQUAL(call(enclave, 9, OP_LANDING, 0, 0).outcome, TEEMATE_LANDED);
    }
}

static void enter_again(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)info, (void)context;
    if (!board_get(enclave, ROUNDS) || received)
        return; /* too early, or it came again before it was stopped */
    start_timer(ITIMER_REAL, 0, 0);
    note();
    LEFT(call(enclave, 0, OP_REGISTERS, 0, 0)); /* CSSA is 1 now */
    EQUAL(board_get(enclave, 0), 1);
    LEFT(call(enclave, 7, OP_NOTHING, 0, 0));
    board_set(enclave, STOP, 1);
}

static void a_handler_may_enter_while_its_thread_waits_at_the_aep(void)
{
    prepare();
    set_handler(SIGALRM, enter_again, 0);
    start_timer(ITIMER_REAL, 3000, 3000);
    spin();
    EQUAL(received, 1);
}

static void a_foreign_alternate_stack_and_the_mask_are_put_back(void)
{
    static char stack[65536];
    stack_t mine = {.ss_sp = stack, .ss_size = sizeof(stack)}, now;
    struct teemate_regs regs = {.rdi = OP_SPIN};
    struct sgx_enclave_run run = {0};
    sigset_t mask, mask_now;

    prepare();
    CHECK(sigaltstack(&mine, NULL) == 0);
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR2);
    sigaddset(&mask, SIGTERM);
    sigprocmask(SIG_SETMASK, &mask, NULL);
    for (int way = 0; way < 6; way++) {
        switch (way) {
        case 0:
            LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
            break;
        case 1:
            FAULTED(call(enclave, 1, OP_DIVIDE, 0, 0), SGX_ERESUME, SGX_VECTOR_DE);
            break;
        case 2:
            FAULTED(resume(enclave, 2), SGX_ERESUME, SGX_VECTOR_GP);
            break;
        case 3:
            EQUAL(call(enclave, 3, OP_LANDING, 0, 0).outcome, TEEMATE_LANDED);
            break;
        case 4:
            EQUAL(teemate_enter(enclave, tcs_of(4), &regs, SGX_EENTER, 1, &run), TEEMATE_PAUSED);
            break;
        default:
            EQUAL(teemate_enter(enclave, tcs_of(5), &regs, SGX_EREPORT, 0, &run), -EINVAL);
        }
        CHECK(sigaltstack(NULL, &now) == 0);
        EQUAL((uintptr_t)now.ss_sp, (uintptr_t)stack);
        EQUAL(now.ss_size, sizeof(stack));
        sigprocmask(SIG_SETMASK, NULL, &mask_now);
        CHECK(memcmp(&mask, &mask_now, 8) == 0);
    }
}

static void on_alternate_stack(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)info, (void)context;
    received++;
    EQUAL(call(enclave, 0, OP_NOTHING, 0, 0).outcome, on_sgx() ? TEEMATE_LEFT : -EDEADLK);
}

static void entering_from_a_handler_on_an_alternate_stack_is_refused_on_the_sim(void)
{
    static char stack[65536];
    stack_t mine = {.ss_sp = stack, .ss_size = sizeof(stack)};

    prepare();
    CHECK(sigaltstack(&mine, NULL) == 0);
    set_handler(SIGUSR1, on_alternate_stack, SA_ONSTACK);
    raise(SIGUSR1);
    EQUAL(received, 1);
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
}

/* ---- who owns SIGSEGV? ------------------------------------------------------- */

static volatile int others, earlier;
static struct sigaction before_other;

static void skip_fault(void *context)
{
    ucontext_t *uc = context;

    uc->uc_mcontext.gregs[REG_RIP] += 2; /* mov (%rax), %eax */
}

static void fault_on_the_host(void)
{
    uint64_t address = 8;

    __asm__ volatile(".byte 0x8b, 0x00" : "+a"(address) : : "memory");
}

static void other_handler(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)info;
    others++;
    skip_fault(context);
}

static void faults_of_the_host_go_to_the_handler_that_was_there(void)
{
    set_handler(SIGSEGV, other_handler, 0);
    prepare();
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
    fault_on_the_host();
    EQUAL(others, 1);
    FAULTED(call(enclave, 0, OP_READ, 8, 0), SGX_ERESUME, SGX_VECTOR_PF);
    EQUAL(others, 1);
}

static void a_handler_installed_later_is_named_and_put_behind_us(void)
{
    struct teemate_diag diag = {0};

    SIM_ONLY("the vDSO gets the exceptions: SIGSEGV is not the library's");
    prepare();
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
    EQUAL(teemate_signals_check(0, &diag), 0);
    set_handler(SIGSEGV, other_handler, 0);
    set_handler(SIGILL, other_handler, 0);
    EQUAL(teemate_signals_check(0, &diag), -EUCLEAN);
    EQUAL(diag.step, TEEMATE_STEP_SIGNALS);
    CHECK(strstr(diag.text, "Illegal instruction"));
    CHECK(strstr(diag.text, "sim-tests"));
    /* The next entry puts itself before them. */
    FAULTED(call(enclave, 0, OP_READ, 8, 0), SGX_ERESUME, SGX_VECTOR_PF);
    EQUAL(others, 0);
    EQUAL(teemate_signals_check(0, &diag), 0);
    fault_on_the_host();
    EQUAL(others, 1);
}

static void a_check_puts_us_before_a_new_handler(void)
{
    SIM_ONLY("the vDSO gets the exceptions: SIGSEGV is not the library's");
    prepare();
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
    set_handler(SIGSEGV, other_handler, 0);
    EQUAL(teemate_signals_check(0, NULL), -EUCLEAN);
    EQUAL(teemate_signals_check(1, NULL), 0);
    FAULTED(call(enclave, 0, OP_READ, 8, 0), SGX_ERESUME, SGX_VECTOR_PF);
    fault_on_the_host();
    EQUAL(others, 1);
}

static void earlier_handler(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)info;
    earlier++;
    skip_fault(context);
}

static void calling_handler(int sig, siginfo_t *info, void *context)
{
    others++;
    before_other.sa_sigaction(sig, info, context); /* which is ours */
}

static void a_handler_that_calls_its_predecessor_does_not_go_in_circles(void)
{
    struct sigaction action = {.sa_sigaction = calling_handler, .sa_flags = SA_SIGINFO};

    set_handler(SIGSEGV, earlier_handler, 0);
    prepare();
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
    for (int i = 1; i <= 20; i++) { /* again and again, as some libraries do */
        CHECK(sigaction(SIGSEGV, &action, i == 1 ? &before_other : NULL) == 0);
        EQUAL(teemate_signals_check(1, NULL), 0);
        LEFT(call(enclave, 1, OP_NOTHING, 0, 0));
        fault_on_the_host();
        EQUAL(others, i);
        EQUAL(earlier, i);
    }
}

/* As faulthandler does it: put the predecessor back and raise again. */
static void raising_handler(int sig, siginfo_t *info, void *context)
{
    (void)info;
    others++;
    sigaction(sig, &before_other, NULL);
    raise(sig);
    skip_fault(context);
}

static void counting_handler(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)info, (void)context;
    earlier++;
}

static void a_handler_that_restores_and_raises_reaches_the_one_before_us(void)
{
    struct sigaction action = {.sa_sigaction = raising_handler, .sa_flags = SA_SIGINFO | SA_NODEFER};

    set_handler(SIGSEGV, counting_handler, 0);
    prepare();
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
    CHECK(sigaction(SIGSEGV, &action, &before_other) == 0);
    EQUAL(teemate_signals_check(1, NULL), 0);
    fault_on_the_host();
    EQUAL(others, 1);
    EQUAL(earlier, 1);
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
}

#define CROWD(n)                                                        \
    static void crowd_##n(int sig, siginfo_t *info, void *context)      \
    {                                                                   \
        (void)sig, (void)info, (void)context;                           \
        abort_test();                                                   \
    }
CROWD(0) CROWD(1) CROWD(2) CROWD(3) CROWD(4) CROWD(5) CROWD(6) CROWD(7)

static void jumping_handler(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)info, (void)context;
    others++;
    siglongjmp(out, 1);
}

/* As runtimes do that catch their own faults: each comes from the same place, with the same stack. */
static void a_handler_that_jumps_out_of_a_fault_is_called_for_the_next_one_too(void)
{
    static uint8_t stack[1 << 16];
    const stack_t alternate = {.ss_sp = stack, .ss_size = sizeof(stack)};

    CHECK(sigaltstack(&alternate, NULL) == 0);
    set_handler(SIGSEGV, jumping_handler, SA_ONSTACK);
    prepare();
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
    for (volatile int i = 1; i <= 6; i++) {
        if (sigsetjmp(out, 1) == 0) {
            if (i <= 3)
                fault_on_the_host();
            else
                raise(SIGSEGV);
        }
        EQUAL(others, i);
    }
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
}

static void a_crowd_of_handlers_that_we_cannot_remember_is_an_error(void)
{
    void (*const crowd[])(int, siginfo_t *, void *) = {crowd_0, crowd_1, crowd_2, crowd_3,
                                                       crowd_4, crowd_5, crowd_6, crowd_7};
    struct teemate_diag diag = {0};

    SIM_ONLY("the vDSO gets the exceptions: SIGILL is not the library's");
    prepare();
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0)); /* behind us: the default action, and room for seven */
    for (int i = 0; i < 7; i++) {
        set_handler(SIGILL, crowd[i], 0);
        LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
    }
    set_handler(SIGILL, crowd[7], 0);
    EQUAL(call(enclave, 0, OP_NOTHING, 0, 0).outcome, -EUCLEAN);
    EQUAL(teemate_signals_check(1, &diag), -EUCLEAN);
    CHECK(strstr(diag.text, "Illegal instruction"));
    EQUAL(tcs_word(enclave, 0), IDLE(0));
    set_handler(SIGILL, crowd[3], 0); /* one that we know */
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
}

static bool is_handler(int sig, void (*handler)(int, siginfo_t *, void *))
{
    struct sigaction now;

    CHECK(sigaction(sig, NULL, &now) == 0);
    return now.sa_sigaction == handler;
}

static void *crowd_while_inside(void *unused)
{
    void (*const crowd[])(int, siginfo_t *, void *) = {crowd_0, crowd_1, crowd_2, crowd_3,
                                                       crowd_4, crowd_5, crowd_6, crowd_7};

    (void)unused;
    while (board_get(enclave, ROUNDS) == 0)
        sched_yield();
    for (int i = 0; i < 8; i++) {
        set_handler(SIGBUS, crowd[i], 0);
        while (i < 7 && is_handler(SIGBUS, crowd[i])) /* until the next interrupt puts it behind us */
            sched_yield();
    }
    return NULL;
}

static void a_call_that_cannot_be_resumed_by_itself_is_paused_and_not_lost(void)
{
    struct result r;
    pthread_t other;

    SIM_ONLY("the vDSO resumes, whoever has the handlers");
    prepare();
    CHECK(pthread_create(&other, NULL, crowd_while_inside, NULL) == 0);
    r = enter(enclave, 0, OP_SPIN, 0, 0);
    pthread_join(other, NULL);
    EQUAL(r.outcome, TEEMATE_PAUSED);
    EQUAL(r.run.function, SGX_ERESUME);
    EQUAL(tcs_word(enclave, 0), IDLE(1));
    EQUAL(resume(enclave, 0).outcome, -EUCLEAN);
    EQUAL(tcs_word(enclave, 0), IDLE(1));
    set_handler(SIGBUS, crowd_3, 0); /* one that we know */
    board_set(enclave, STOP, 1);
    LEFT(resume(enclave, 0));
}

static void on_sent_segv(int sig, siginfo_t *info, void *context)
{
    (void)sig, (void)context;
    EQUAL((unsigned)info->si_code, (unsigned)SI_TKILL);
    note();
    board_set(enclave, STOP, 1);
}

static void a_segv_that_somebody_sent_is_the_hosts(void)
{
    struct sender sender = {pthread_self(), SIGSEGV};
    pthread_t other;

    set_handler(SIGSEGV, on_sent_segv, 0);
    prepare();
    CHECK(pthread_create(&other, NULL, send_when_inside, &sender) == 0);
    CHECK(spin() >= handler_pauses());
    EQUAL(received, 1);
    EQUAL(on_host_stack, 1);
    pthread_join(other, NULL);
}

static void fault_as_a_child(void *unused)
{
    (void)unused;
    enclave = test_enclave_from_fd(dup(enclave->fd), true);
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
    fault_on_the_host();
}

static void a_fault_without_any_handler_ends_the_process_as_ever(void)
{
    int pid, status;

    prepare();
    pid = start_child(fault_as_a_child, NULL);
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFSIGNALED(status));
    EQUAL(WTERMSIG(status), SIGSEGV);
}

const struct test signal_tests[] = {
    TEST(an_alarm_reaches_the_host_while_a_thread_is_inside),
    TEST(an_interrupt_from_another_thread_pauses_the_call),
    TEST(a_paused_call_can_be_abandoned),
    TEST(a_pause_comes_no_earlier_than_asked_for),
    TEST(a_profiler_samples_on_the_hosts_stack),
    TEST(a_child_that_ends_is_noticed_while_inside),
    TEST(a_handler_may_jump_out_of_a_call),
    TEST(a_handler_may_enter_while_its_thread_waits_at_the_aep),
    TEST(a_foreign_alternate_stack_and_the_mask_are_put_back),
    TEST(entering_from_a_handler_on_an_alternate_stack_is_refused_on_the_sim),
    TEST(faults_of_the_host_go_to_the_handler_that_was_there),
    TEST(a_handler_installed_later_is_named_and_put_behind_us),
    TEST(a_check_puts_us_before_a_new_handler),
    TEST(a_handler_that_calls_its_predecessor_does_not_go_in_circles),
    TEST(a_handler_that_restores_and_raises_reaches_the_one_before_us),
    TEST(a_handler_that_jumps_out_of_a_fault_is_called_for_the_next_one_too),
    TEST(a_crowd_of_handlers_that_we_cannot_remember_is_an_error),
    TEST(a_call_that_cannot_be_resumed_by_itself_is_paused_and_not_lost),
    TEST(a_segv_that_somebody_sent_is_the_hosts),
    TEST(a_fault_without_any_handler_ends_the_process_as_ever),
    {0},
};
