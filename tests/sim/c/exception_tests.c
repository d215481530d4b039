/* SPDX-License-Identifier: Apache-2.0 */
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include "tests.h"

extern const uint8_t enclave_code[], enclave_divide[];

#define EXITINFO(vector) (SGX_EXITINFO_VALID | SGX_EXITINFO_HARDWARE | (vector))

static void a_division_by_zero_is_saved_and_can_be_resumed(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    struct result r = call(enclave, 0, OP_DIVIDE, 0x51, 0xd1);
    struct sgx_gprs saved = frame_get(enclave, 0, 0);

    FAULTED(r, SGX_ERESUME, SGX_VECTOR_DE);
    EQUAL(r.run.exception_error_code, 0);
    EQUAL(r.run.exception_addr, 0);
    EQUAL(tcs_word(enclave, 0), IDLE(1));
    EQUAL(saved.exitinfo, EXITINFO(SGX_VECTOR_DE));
    EQUAL(saved.rip, BASE + (uint64_t)(enclave_divide - enclave_code));
    EQUAL(saved.rax, 7);
    EQUAL(saved.rdi, OP_DIVIDE);
    EQUAL(saved.rsi, 0x51);
    EQUAL(saved.rdx, 0);
    EQUAL(saved.fsbase, BASE + FSPAGE);
    EQUAL(saved.gsbase, BASE + GSPAGE);
    EQUAL(saved.rsp, saved.ursp); /* this enclave has no stack of its own */
    EQUAL(saved.rflags & 0x10000, 0x10000);
    /* The enclave would do this at CSSA 1. */
    frame_skip(enclave, 0, 0, 3);
    r = resume(enclave, 0);
    LEFT(r);
    EQUAL(r.regs.rsi, 7);
    EQUAL(tcs_word(enclave, 0), IDLE(0));
}

static void an_illegal_instruction_is_ud(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);

    FAULTED(call(enclave, 0, OP_ILLEGAL, 0, 0), SGX_ERESUME, SGX_VECTOR_UD);
    EQUAL(frame_get(enclave, 0, 0).exitinfo, EXITINFO(SGX_VECTOR_UD));
}

/* The kernel takes them for spurious after an AEX (traps.c, math_error), so nobody hears of them. */
/* QEMU's TCG has no #XM: a masked division of the host's tells. */
static bool raises_xm(void)
{
    int pid = fork(), status;

    CHECK(pid >= 0);
    if (!pid) {
        const uint32_t unmasked = 0x1d80; /* division by zero */
        volatile float zero = 0, one = 1;

        signal(SIGFPE, SIG_DFL);
        __asm__ volatile("ldmxcsr %0" : : "m"(unmasked));
        one /= zero;
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    if (WIFEXITED(status))
        puts("skipped for #XM: this processor does not raise it");
    return WIFSIGNALED(status);
}

static void floating_point_exceptions_repeat_until_the_call_is_paused(void)
{
    static const struct {
        uint64_t op;
        uint32_t vector;
    } faults[] = {{OP_SIMD_FAULT, SGX_VECTOR_XM}, {OP_X87_FAULT, SGX_VECTOR_MF}};
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    uint32_t mxcsr = 0;

    for (unsigned tcs = raises_xm() ? 0 : 1; tcs < 2; tcs++) {
        struct teemate_regs regs = {.rdi = faults[tcs].op};
        struct sgx_enclave_run run = {0};

        EQUAL(teemate_enter(enclave, tcs_of(tcs), &regs, SGX_EENTER, 1000000, &run), TEEMATE_PAUSED);
        if (!on_sgx()) /* there the last exit may have been an interrupt's */
            EQUAL(frame_get(enclave, tcs, 0).exitinfo, EXITINFO(faults[tcs].vector));
        EQUAL(tcs_word(enclave, tcs), IDLE(1));
    }
    __asm__ volatile("stmxcsr %0" : "=m"(mxcsr));
    EQUAL(mxcsr & 0x1f80, 0x1f80);
}

static void a_page_fault_tells_the_page_and_no_more(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    struct result r;

    without_sgx2(enclave);
    r = call(enclave, 0, OP_READ, BASE + UNMAPPED + 0x123, 0);
    FAULTED(r, SGX_ERESUME, SGX_VECTOR_PF);
    EQUAL(r.run.exception_addr, BASE + UNMAPPED);
    EQUAL(frame_get(enclave, 0, 0).exitinfo, 0); /* MISCSELECT has no EXINFO */
    r = call(enclave, 1, OP_WRITE, BASE + CODE + 0x10, 0);
    FAULTED(r, SGX_ERESUME, SGX_VECTOR_PF);
    EQUAL(r.run.exception_error_code & (SGX_PF_W | SGX_PF_U), SGX_PF_W | SGX_PF_U);
    r = call(enclave, 2, OP_READ, BASE + tcs_of(2) + 8, 0);
    FAULTED(r, SGX_ERESUME, SGX_VECTOR_PF);
    EQUAL(r.run.exception_error_code, SGX_PF_SGX | SGX_PF_P | SGX_PF_U);
    r = call(enclave, 3, OP_READ, 0x1008, 0); /* of the host */
    FAULTED(r, SGX_ERESUME, SGX_VECTOR_PF);
    EQUAL(r.run.exception_addr, 0x1000);
    r = call(enclave, 4, OP_JUMP, BASE + DATA, 0);
    FAULTED(r, SGX_ERESUME, SGX_VECTOR_PF);
    EQUAL(r.run.exception_error_code & SGX_PF_I, SGX_PF_I);
    EQUAL(frame_get(enclave, 4, 0).rip, BASE + DATA);
    /* No code outside of ELRANGE; on the sim what is mapped there would be executed. */
    r = call(enclave, 5, OP_JUMP, on_sgx() ? (uint64_t)(uintptr_t)abort_test : 0x1000, 0);
    FAULTED(r, SGX_ERESUME, SGX_VECTOR_GP);
}

static void exinfo_tells_the_enclave_what_the_host_may_not_know(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(&(struct options){.miscselect = SGX_MISC_EXINFO});
    struct sgx_exinfo exinfo;
    struct result r;

    without_sgx2(enclave);
    r = call(enclave, 0, OP_READ, BASE + UNMAPPED + 0x123, 0);
    FAULTED(r, SGX_ERESUME, SGX_VECTOR_PF);
    EQUAL(r.run.exception_addr, BASE + UNMAPPED);
    EQUAL(frame_get(enclave, 0, 0).exitinfo, EXITINFO(SGX_VECTOR_PF));
    exinfo = exinfo_get(enclave, 0, 0);
    EQUAL(exinfo.maddr, BASE + UNMAPPED + 0x123);
    EQUAL(exinfo.errcd, r.run.exception_error_code);
    FAULTED(call(enclave, 1, OP_GP, 0, 0), SGX_ERESUME, SGX_VECTOR_GP);
    EQUAL(frame_get(enclave, 1, 0).exitinfo, EXITINFO(SGX_VECTOR_GP));
    exinfo = exinfo_get(enclave, 1, 0);
    EQUAL(exinfo.maddr, 0);
    EQUAL(exinfo.errcd, 0);
}

static void gp_is_not_told_to_the_enclave_without_exinfo(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);

    FAULTED(call(enclave, 0, OP_GP, 0, 0), SGX_ERESUME, SGX_VECTOR_GP);
    EQUAL(frame_get(enclave, 0, 0).exitinfo, 0);
}

static void entering_from_inside_is_gp(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);

    FAULTED(call(enclave, 0, OP_ENTER_INSIDE, SGX_EENTER, 0), SGX_ERESUME, SGX_VECTOR_GP);
    FAULTED(call(enclave, 1, OP_ENTER_INSIDE, SGX_ERESUME, 0), SGX_ERESUME, SGX_VECTOR_GP);
    FAULTED(call(enclave, 2, OP_ENTER_INSIDE, 77, 0), SGX_ERESUME, SGX_VECTOR_GP);
}

static void leaving_to_an_address_that_is_none_is_gp_inside(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);

    FAULTED(call(enclave, 0, OP_NONCANONICAL_EXIT, 0, 0), SGX_ERESUME, SGX_VECTOR_GP);
    EQUAL(tcs_word(enclave, 0), IDLE(1));
}

static struct teemate_enclave *trap_enclave;
static volatile int trapped;
static uint64_t trap_skip;

static void on_trap(int sig, siginfo_t *info, void *context)
{
    ucontext_t *uc = context;
    uint8_t code;

    (void)sig, (void)info;
    trapped++;
    /* Delivered at the AEP, with the synthetic state. */
    EQUAL(uc->uc_mcontext.gregs[REG_RIP], aep());
    EQUAL(uc->uc_mcontext.gregs[REG_RAX], SGX_ERESUME);
    EQUAL(uc->uc_mcontext.gregs[REG_R12], 0);
    EQUAL(tcs_word(trap_enclave, 0), IDLE(1));
    EQUAL(frame_get(trap_enclave, 0, 0).exitinfo, SGX_EXITINFO_VALID | SGX_EXITINFO_SOFTWARE | SGX_VECTOR_BP);
    if (trap_skip) {
        memory_read(trap_enclave, frame_get(trap_enclave, 0, 0).rip - BASE, &code, 1);
        EQUAL(code, 0xcc);
    }
    frame_skip(trap_enclave, 0, 0, trap_skip);
}

static void run_into_breakpoint(const struct options *options, uint64_t tcs_flags, uint64_t skip)
{
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO};
    struct result r;

    CHECK(sigaction(SIGTRAP, &action, NULL) == 0);
    trap_skip = skip;
    trap_enclave = test_enclave_mapped(options);
    tcs_set_flags(trap_enclave, 0, tcs_flags); /* as a debugger does it, with EDBGWR */
    r = call(trap_enclave, 0, OP_INT3, 0, 0);
    LEFT(r);
    EQUAL(trapped, 1);
    EQUAL(r.regs.rsi, 2);
    EQUAL(tcs_word(trap_enclave, 0), IDLE(0));
}

static void a_breakpoint_is_a_signal_of_the_host_at_the_aep(void)
{
    run_into_breakpoint(NULL, 0, 1); /* as a fault: RIP is at the INT3 */
}

static void a_breakpoint_is_a_trap_when_a_debugger_opted_in(void)
{
    run_into_breakpoint(&(struct options){.attributes = SGX_ATTR_DEBUG}, SGX_TCS_DBGOPTIN, 0);
}

static void pages_come_in_on_demand_after_mapping(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    uint64_t value;

    for (unsigned i = 0; i < DATA_SIZE / 4096; i++) {
        LEFT(call(enclave, 0, OP_WRITE, BASE + DATA + i * 4096ull + 8, i));
        memory_read(enclave, DATA + i * 4096ull + 8, &value, sizeof(value));
        EQUAL(value, i);
    }
}

const struct test exception_tests[] = {
    TEST(a_division_by_zero_is_saved_and_can_be_resumed),
    TEST(an_illegal_instruction_is_ud),
    TEST(floating_point_exceptions_repeat_until_the_call_is_paused),
    TEST(a_page_fault_tells_the_page_and_no_more),
    TEST(exinfo_tells_the_enclave_what_the_host_may_not_know),
    TEST(gp_is_not_told_to_the_enclave_without_exinfo),
    TEST(entering_from_inside_is_gp),
    TEST(leaving_to_an_address_that_is_none_is_gp_inside),
    TEST(a_breakpoint_is_a_signal_of_the_host_at_the_aep),
    TEST(a_breakpoint_is_a_trap_when_a_debugger_opted_in),
    TEST(pages_come_in_on_demand_after_mapping),
    {0},
};
