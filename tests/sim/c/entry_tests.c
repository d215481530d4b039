/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests.h"

static void an_entry_has_the_registers_of_the_sdm(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    struct result r = {.regs = {OP_REGISTERS, 11, 12, 13, 14, 0x1111, 0x2222}};
    const uint64_t fs = 0xf5f5, gs = 0x9595;
    uint64_t seen[14];

    memory_write(enclave, FSPAGE, &fs, sizeof(fs));
    memory_write(enclave, GSPAGE, &gs, sizeof(gs));
    r.outcome = teemate_enter(enclave, tcs_of(3), &r.regs, SGX_EENTER, 0, &r.run);
    LEFT(r);
    memory_read(enclave, DATA, seen, sizeof(seen));
    EQUAL(seen[0], 0);                             /* RAX: CSSA */
    EQUAL(seen[1], BASE + tcs_of(3));              /* RBX */
    EQUAL(seen[2], behind_enclu());                /* RCX */
    EQUAL(seen[3], frame_get(enclave, 3, 0).ursp);
    EQUAL(seen[4], frame_get(enclave, 3, 0).urbp);
    if (!on_sgx()) /* there a raw entry has a stack of the TCS's */
        CHECK(seen[3] < (uint64_t)(uintptr_t)&r && seen[3] > (uint64_t)(uintptr_t)&r - 65536);
    EQUAL(seen[5], 0xf5f5);
    EQUAL(seen[6], 0x9595);
    EQUAL(seen[8], 0x1111); /* the key */
    EQUAL(seen[9], 0x2222);
    EQUAL(seen[10], 11);
    EQUAL(seen[11], 12);
    EQUAL(seen[12], 13);
    EQUAL(seen[13], 14);
    EQUAL(r.regs.r12, 0);
    EQUAL(r.regs.r13, 0);
    EQUAL(r.regs.rsi, 12);
    EQUAL(r.regs.rdx, 14);
    EQUAL(r.regs.r8, 16);
    EQUAL(r.regs.r9, 18);
    EQUAL(tcs_word(enclave, 3), IDLE(0));
    teemate_close(enclave);
}

static void the_key_is_wiped_from_memory_when_an_entry_is_refused(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    struct result r = {.regs = {.r12 = 1, .r13 = 2}, .run = {.reserved[7] = 1}};

    EQUAL(teemate_enter(enclave, tcs_of(0), &r.regs, SGX_EENTER, 0, &r.run), -EINVAL);
    EQUAL(r.regs.r12 | r.regs.r13, 0);
    r = (struct result){.regs = {.r12 = 1, .r13 = 2}};
    r.outcome = teemate_enter(enclave, tcs_of(0), &r.regs, SGX_ERESUME, 0, &r.run);
    FAULTED(r, SGX_ERESUME, SGX_VECTOR_GP);
    EQUAL(r.regs.r12 | r.regs.r13, 0);
}

static void other_functions_and_reserved_bytes_are_einval(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    struct result r = {0};

    EQUAL(teemate_enter(enclave, tcs_of(0), &r.regs, SGX_EEXIT, 0, &r.run), -EINVAL);
    EQUAL(teemate_enter(enclave, tcs_of(0), &r.regs, SGX_EGETKEY, 0, &r.run), -EINVAL);
    r.run.reserved[215] = 1;
    EQUAL(teemate_enter(enclave, tcs_of(0), &r.regs, SGX_EENTER, 0, &r.run), -EINVAL);
}

static void an_entry_through_what_is_no_tcs_faults_as_the_vdso_reports_it(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    struct result r = {0};

    r.outcome = teemate_enter(enclave, DATA, &r.regs, SGX_EENTER, 0, &r.run); /* a regular page */
    FAULTED(r, SGX_EENTER, SGX_VECTOR_PF);
    EQUAL(r.run.exception_error_code, SGX_PF_SGX | SGX_PF_P | SGX_PF_U);
    EQUAL(r.run.exception_addr, BASE + DATA);
    r = (struct result){0};
    r.outcome = teemate_enter(enclave, UNMAPPED, &r.regs, SGX_EENTER, 0, &r.run); /* no page */
    FAULTED(r, SGX_EENTER, SGX_VECTOR_PF);
    EQUAL(r.run.exception_addr, BASE + UNMAPPED);
    r = (struct result){0};
    r.outcome = teemate_enter(enclave, tcs_of(0) + 8, &r.regs, SGX_EENTER, 0, &r.run);
    FAULTED(r, SGX_EENTER, SGX_VECTOR_GP);
    CHECK(teemate_unmap_tcs(enclave, tcs_of(1)) == 0);
    r = call(enclave, 1, OP_NOTHING, 0, 0);
    FAULTED(r, SGX_EENTER, SGX_VECTOR_PF);
    EQUAL(r.run.exception_error_code & SGX_PF_SGX, 0);
    EQUAL(r.run.exception_addr, BASE + tcs_of(1));
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
}

static void a_tcs_with_all_frames_in_use_refuses_eenter(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);

    for (unsigned i = 0; i < NSSA; i++) {
        FAULTED(call(enclave, 0, OP_ILLEGAL, 0, 0), SGX_ERESUME, SGX_VECTOR_UD);
        EQUAL(tcs_word(enclave, 0), IDLE(i + 1));
    }
    FAULTED(call(enclave, 0, OP_NOTHING, 0, 0), SGX_EENTER, SGX_VECTOR_GP);
    EQUAL(tcs_word(enclave, 0), IDLE(NSSA));
}

static void eresume_without_a_frame_is_gp(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);

    FAULTED(resume(enclave, 0), SGX_ERESUME, SGX_VECTOR_GP);
    EQUAL(tcs_word(enclave, 0), IDLE(0));
}

static void eresume_refuses_frames_that_no_processor_would_load(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    uint8_t area[1024];
    struct sgx_gprs good;

    FAULTED(call(enclave, 0, OP_DIVIDE, 0, 0), SGX_ERESUME, SGX_VECTOR_DE);
    good = frame_get(enclave, 0, 0);
    FRAME_SET(enclave, 0, 0, rip, 1ull << 62);
    FAULTED(resume(enclave, 0), SGX_ERESUME, SGX_VECTOR_GP);
    frame_set(enclave, 0, 0, &good);
    FRAME_SET(enclave, 0, 0, fsbase, 1ull << 62);
    FAULTED(resume(enclave, 0), SGX_ERESUME, SGX_VECTOR_GP);
    frame_set(enclave, 0, 0, &good);
    memory_read(enclave, SSA, area, sizeof(area));
    area[512] |= 4; /* XSTATE_BV: AVX, which XFRM does not have */
    memory_write(enclave, SSA, area, sizeof(area));
    FAULTED(resume(enclave, 0), SGX_ERESUME, SGX_VECTOR_GP);
    area[512] &= (uint8_t)~4;
    area[520] = 1; /* XCOMP_BV */
    memory_write(enclave, SSA, area, sizeof(area));
    FAULTED(resume(enclave, 0), SGX_ERESUME, SGX_VECTOR_GP);
    area[520] = 0;
    area[27] = 1; /* MXCSR */
    memory_write(enclave, SSA, area, sizeof(area));
    FAULTED(resume(enclave, 0), SGX_ERESUME, SGX_VECTOR_GP);
    area[27] = 0;
    memory_write(enclave, SSA, area, sizeof(area));
    EQUAL(tcs_word(enclave, 0), IDLE(1)); /* none of them was a resume */
    frame_skip(enclave, 0, 0, 3);
    LEFT(resume(enclave, 0));
    EQUAL(tcs_word(enclave, 0), IDLE(0));
}

static void an_entry_whose_frame_is_no_memory_faults_at_eenter(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    struct result r;

    SIM_ONLY("the fields of a TCS come from a page that EADD has checked");
    without_sgx2(enclave);
    enclave->sim->tcs[0].ossa = UNMAPPED;
    r = call(enclave, 0, OP_NOTHING, 0, 0);
    FAULTED(r, SGX_EENTER, SGX_VECTOR_PF);
    EQUAL(r.run.exception_addr, BASE + UNMAPPED);
    enclave->sim->tcs[0].ossa = CODE; /* not writable */
    FAULTED(call(enclave, 0, OP_NOTHING, 0, 0), SGX_EENTER, SGX_VECTOR_PF);
    EQUAL(tcs_word(enclave, 0), IDLE(0));
}

static void the_landing_page_needs_no_register(void)
{
    static uint8_t other[65536];
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    struct result r = call(enclave, 0, OP_LANDING, (uint64_t)(uintptr_t)(other + sizeof(other)), 0);

    EQUAL(r.outcome, TEEMATE_LANDED);
    EQUAL(r.run.function, SGX_EEXIT);
    EQUAL(tcs_word(enclave, 0), IDLE(0));
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
}

static void the_host_gets_its_flags_and_control_words_back(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    double one = 1.0, sum = 0;
    uint32_t mxcsr = 0;
    uint16_t fcw = 0;
    uint64_t flags;

    LEFT(call(enclave, 0, OP_FLAGS, 0, 0));
    __asm__ volatile("pushfq; pop %0" : "=r"(flags));
    __asm__ volatile("stmxcsr %0" : "=m"(mxcsr));
    __asm__ volatile("fnstcw %0" : "=m"(fcw));
    EQUAL(flags & 0x40400, 0);
    EQUAL(mxcsr & ~0x3full, 0x1f80);
    EQUAL(fcw, 0x37f);
    for (int i = 0; i < 8; i++) /* the x87 stack has room for eight */
        __asm__ volatile("fldl %0" : : "m"(one));
    for (int i = 0; i < 8; i++) {
        __asm__ volatile("fstpl %0" : "=m"(one));
        sum += one;
    }
    CHECK(sum == 8.0);
}

static int handled;

static int on_exit_handler(long rdi, long rsi, long rdx, long rsp, long r8, long r9, struct sgx_enclave_run *run)
{
    (void)rdi, (void)rdx, (void)r8, (void)r9;
    handled++;
    EQUAL(run->function, SGX_EEXIT);
    EQUAL(run->user_data, 77);
    EQUAL(*(uint64_t *)rsp, 0x1234); /* what the enclave pushed */
    EQUAL(rsi, 5);
    return handled < 3 ? SGX_EENTER : -41;
}

static void a_user_handler_decides_how_it_goes_on(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    struct result r = {.regs = {.rdi = OP_PUSH, .rsi = 5}};

    r.run.user_handler = (uint64_t)(uintptr_t)on_exit_handler;
    r.run.user_data = 77;
    r.outcome = teemate_enter(enclave, tcs_of(0), &r.regs, SGX_EENTER, 0, &r.run);
    EQUAL(r.outcome, -41);
    EQUAL(handled, 3);
    LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
}

static struct teemate_enclave *handled_enclave;

static int on_exception_handler(long rdi, long rsi, long rdx, long rsp, long r8, long r9, struct sgx_enclave_run *run)
{
    (void)rsi, (void)rdx, (void)rsp, (void)r8, (void)r9;
    handled++;
    if (run->function == SGX_EEXIT)
        return 0;
    EQUAL(run->function, SGX_ERESUME);
    EQUAL(run->exception_vector, SGX_VECTOR_DE);
    EQUAL(rdi, SGX_VECTOR_DE);
    /* As SDKs do it: the same TCS at CSSA 1; and others. */
    LEFT(call(handled_enclave, 0, OP_REGISTERS, 0, 0));
    EQUAL(board_get(handled_enclave, 0), 1);
    LEFT(call(handled_enclave, 5, OP_NOTHING, 0, 0));
    EQUAL(call(handled_enclave, 6, OP_LANDING, 0, 0).outcome, TEEMATE_LANDED);
    frame_skip(handled_enclave, 0, 0, 3);
    return SGX_ERESUME;
}

static void a_user_handler_may_enter_and_resume(void)
{
    struct result r = {.regs = {.rdi = OP_DIVIDE}};

    handled_enclave = test_enclave_mapped(NULL);
    r.run.user_handler = (uint64_t)(uintptr_t)on_exception_handler;
    r.outcome = teemate_enter(handled_enclave, tcs_of(0), &r.regs, SGX_EENTER, 0, &r.run);
    LEFT(r);
    EQUAL(r.regs.rsi, 7);
    EQUAL(handled, 2);
    EQUAL(tcs_word(handled_enclave, 0), IDLE(0));
}

static void a_taken_address_range_names_what_is_there(void)
{
    struct teemate_enclave *enclave = test_enclave(NULL);
    void *place = (void *)(BASE + SIZE + 4096);
    struct teemate_diag diag = {0};
    int fd = memfd_create("somebody-elses", 0);

    CHECK(ftruncate(fd, 8192) == 0);
    CHECK(mmap(place, 8192, PROT_READ, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0) == place);
    EQUAL(teemate_map(enclave, &diag), -EEXIST);
    CHECK(strstr(diag.text, "somebody-elses"));
    CHECK(strstr(diag.text, "0x400000201000-0x400000203000"));
    EQUAL(diag.step, TEEMATE_STEP_MAP);
    CHECK(munmap(place, 8192) == 0);
    EQUAL(teemate_map(enclave, &diag), 0);
    teemate_close(enclave);
}

static unsigned mappings(void)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    unsigned lines = 0;
    int c;

    while ((c = getc(maps)) != EOF)
        lines += c == '\n';
    fclose(maps);
    return lines;
}

static void closing_leaves_no_mapping_behind(void)
{
    struct teemate_enclave *enclave;
    unsigned before = 0, after;
    int fd = teemate_arena_create();

    CHECK(fd >= 0);
    for (int i = 0; i < 3; i++) {
        enclave = test_enclave_mapped(NULL);
        CHECK(teemate_map_arena(enclave, fd, NULL) == 0);
        *(volatile uint32_t *)(BASE + SIZE + 4096) += 5;
        LEFT(call(enclave, 0, OP_NOTHING, 0, 0));
        teemate_close(enclave);
        if (i == 0)
            before = mappings();
    }
    after = mappings();
    EQUAL(after, before);
    enclave = test_enclave_mapped(NULL);
    CHECK(teemate_map_arena(enclave, fd, NULL) == 0);
    EQUAL(*(volatile uint32_t *)(BASE + SIZE + 4096), 15);
}

static void an_arena_that_could_shrink_is_refused(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    struct teemate_diag diag = {0};
    int fd = memfd_create("arena", 0);

    CHECK(ftruncate(fd, 4096) == 0);
    EQUAL(teemate_map_arena(enclave, fd, &diag), -EINVAL);
    CHECK(strstr(diag.text, "SHRINK"));
}

static void a_tick_length_that_makes_no_sense_is_refused(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);

    setenv("TEEMATE_TICK", "fast", 1);
    EQUAL(call(enclave, 0, OP_NOTHING, 0, 0).outcome, -EINVAL);
}

const struct test entry_tests[] = {
    TEST(an_entry_has_the_registers_of_the_sdm),
    TEST(the_key_is_wiped_from_memory_when_an_entry_is_refused),
    TEST(other_functions_and_reserved_bytes_are_einval),
    TEST(an_entry_through_what_is_no_tcs_faults_as_the_vdso_reports_it),
    TEST(a_tcs_with_all_frames_in_use_refuses_eenter),
    TEST(eresume_without_a_frame_is_gp),
    TEST(eresume_refuses_frames_that_no_processor_would_load),
    TEST(an_entry_whose_frame_is_no_memory_faults_at_eenter),
    TEST(the_landing_page_needs_no_register),
    TEST(the_host_gets_its_flags_and_control_words_back),
    TEST(a_user_handler_decides_how_it_goes_on),
    TEST(a_user_handler_may_enter_and_resume),
    TEST(a_taken_address_range_names_what_is_there),
    TEST(closing_leaves_no_mapping_behind),
    TEST(an_arena_that_could_shrink_is_refused),
    TEST(a_tick_length_that_makes_no_sense_is_refused),
    {0},
};
