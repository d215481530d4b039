/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the stepping of a child needs to be fast: one instruction after the other with the
 * processor's trap flag (PTRACE_SINGLESTEP), and comparing and copying an enclave's memory.
 * Functions return 0 or more, or a negative errno.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#define PAGE 4096u
#define FLAG_TF 0x100u
#define FLAG_RF 0x10000u

struct range {
    uint64_t offset, size;
};

static int set_debug(pid_t pid, int number, uint64_t value)
{
    size_t place = offsetof(struct user, u_debugreg) + (size_t)number * 8;

    return ptrace(PTRACE_POKEUSER, pid, place, value) ? -errno : 0;
}

/* The next stop of the child, without signals that only tell it that it has been inside for long. */
static int go(pid_t pid, int request, int signal)
{
    int status;

    for (;; signal = 0) {
        if (ptrace(request, pid, 0, signal))
            return -errno;
        if (waitpid(pid, &status, 0) != pid)
            return -errno;
        if (!WIFSTOPPED(status))
            return -ESRCH;
        if (WSTOPSIG(status) < SIGRTMIN)
            return WSTOPSIG(status);
    }
}

static int64_t read_rip(pid_t pid)
{
    errno = 0;
    return ptrace(PTRACE_PEEKUSER, pid, offsetof(struct user_regs_struct, rip), 0);
}

/* Let it run, first with `signal`, until it is about to execute what is at `address`. */
static int run_to(pid_t pid, uint64_t address, int signal)
{
    int error = set_debug(pid, 0, address), stopped;

    if (!error)
        error = set_debug(pid, 7, 1);
    if (error)
        return error;
    stopped = go(pid, PTRACE_CONT, signal);
    error = set_debug(pid, 7, 0);
    if (stopped != SIGTRAP || error)
        return stopped < 0 ? stopped : error ? error : -EINTR;
    return (uint64_t)read_rip(pid) == address ? 0 : -EFAULT;
}

/* Let the stopped child run to the enclave's first instruction. */
int step_run_to(pid_t pid, uint64_t address)
{
    return run_to(pid, address, 0);
}

/*
 * Let the handler of a page fault do its work, up to the instruction that is tried again.  A
 * fault leaves RF set in the flags that the handler returns to: breakpoints would not count.
 */
static int handle_fault(pid_t pid, uint64_t address)
{
    struct user_regs_struct regs;
    int stopped = go(pid, PTRACE_SINGLESTEP, SIGSEGV);
    uint64_t place, flags;

    if (stopped != SIGTRAP)
        return stopped < 0 ? stopped : -EINTR;
    if (ptrace(PTRACE_GETREGS, pid, 0, &regs))
        return -errno;
    place = regs.rdx + offsetof(ucontext_t, uc_mcontext.gregs) + REG_EFL * 8; /* the handler's third argument */
    errno = 0;
    flags = (uint64_t)ptrace(PTRACE_PEEKDATA, pid, place, 0);
    if (errno || ptrace(PTRACE_POKEDATA, pid, place, flags & ~(uint64_t)(FLAG_TF | FLAG_RF)))
        return -errno;
    return run_to(pid, address, 0);
}

/*
 * One instruction: 1, or 0 when it is an ENCLU and so the thread's way out.  A page fault
 * is the sim's business: its handler brings the page in, and the instruction is tried again.
 */
static int step(pid_t pid, uint64_t base, const uint8_t *memory, uint64_t size)
{
    for (;;) {
        int stopped = go(pid, PTRACE_SINGLESTEP, 0);
        uint64_t rip = (uint64_t)read_rip(pid);

        if (errno)
            return -errno;
        if (stopped < 0)
            return stopped;
        if (rip - base >= size)
            return -EFAULT;
        if (stopped == SIGTRAP)
            return 1;
        if (!memcmp(memory + (rip - base), "\x0f\x01\xd7", 3))
            return 0;
        if (stopped != SIGSEGV)
            return -EINTR;
        stopped = handle_fault(pid, rip);
        if (stopped)
            return stopped;
    }
}

static int differs(const uint8_t *a, const uint8_t *b, const struct range *ranges, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (memcmp(a + ranges[i].offset, b + ranges[i].offset, ranges[i].size))
            return 1;
    return 0;
}

/*
 * Step until the memory is another one than `before` in one of the ranges, `most` steps
 * at most; *steps is counted up.  1, or 0 when the thread has gone out.
 */
int step_until_store(pid_t pid, uint64_t base, uint64_t size, const uint8_t *memory, const uint8_t *before,
                     const struct range *ranges, size_t count, uint64_t most, uint64_t *steps)
{
    for (; most; most--) {
        int inside = step(pid, base, memory, size);

        if (inside <= 0)
            return inside;
        ++*steps;
        if (count && differs(memory, before, ranges, count))
            return 1;
    }
    return 1;
}

/* Make `to` as `from`, writing only pages that differ; how many. */
int copy_pages(uint8_t *to, const uint8_t *from, uint64_t size)
{
    int copied = 0;

    for (uint64_t at = 0; at < size; at += PAGE) {
        size_t some = size - at < PAGE ? size - at : PAGE;

        if (!memcmp(to + at, from + at, some))
            continue;
        memcpy(to + at, from + at, some);
        copied++;
    }
    return copied;
}
