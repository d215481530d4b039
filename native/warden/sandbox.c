/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sandbox of a warden.
 *
 * A control ECALL runs the image author's code, and on the sim that code runs
 * with this process's rights and clients can write its memory.  So the process
 * has no rights: whoever takes it over can call what is listed here, on the
 * descriptors that it already holds, and nothing else.
 */
#include "sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "protocol.h"

/* ---- system calls ---------------------------------------------------------------- */

struct rule {
    long number;
    int argument; /* -1, or the argument that must have one of the values; */
    int error;    /* 0: allowed; else the call fails with this errno */
    uint64_t values[3];
};

/* Stands for the number of the process that installs the list. */
#define OWN_PROCESS UINT64_MAX

#define ANY(name) {SYS_##name, -1, 0, {0, 0, 0}}
#define ONLY(name, argument, ...) {SYS_##name, argument, 0, {__VA_ARGS__}}
#define FAIL(name, error) {SYS_##name, -1, error, {0, 0, 0}}

/* glibc 2.36: pthread_create and fork, both by clone(2) since clone3 says ENOSYS. */
#define CLONE_PTHREAD                                                                           \
    (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SYSVSEM | CLONE_SIGHAND | CLONE_THREAD |         \
     CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID)
#define CLONE_FORK (CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD)

static const struct rule warden_rules[] = {
    /* the socketpair */
    ANY(recvmsg),
    ANY(sendto),
    ANY(poll),
    ANY(ppoll),
    ANY(close),
    /* mapping the enclave and its TCSs; prot goes to what the file's seals and pages allow */
    ANY(mmap),
    ANY(munmap),
    ANY(mprotect),
    ANY(madvise),
    ANY(mremap), /* realloc of glibc */
    ANY(brk),
    ONLY(personality, 0, 0xffffffffu, 0xffffffffu, 0xffffffffu), /* to ask: READ_IMPLIES_EXEC? */
    ANY(fstat), /* geometry of the fds that were handed over */
    ANY(newfstatat),
    ANY(pread64),
    ANY(lseek), /* SEEK_DATA: blocks that the sim's file holds */
    ONLY(fcntl, 1, F_GET_SEALS, F_DUPFD_CLOEXEC, F_GETFL),
    /* entering: handlers, alternate stack, FS and GS base, the ticker thread */
    ANY(rt_sigaction),
    ANY(rt_sigprocmask),
    ANY(rt_sigpending),
    ANY(rt_sigreturn),
    ANY(sigaltstack),
    ANY(arch_prctl),
    ANY(rseq),
    ANY(set_robust_list),
    ANY(set_tid_address),
    ANY(futex),
    ANY(clock_gettime),
    ANY(clock_nanosleep),
    ANY(gettid),
    ANY(getpid),
    ANY(getppid),
    ANY(getuid), /* the sender in a tick's siginfo */
    /*
     * Ticks.  Not bound to our own process, since the child lives under this list
     * too and has another number: a warden that was taken over can signal
     * processes of its own user, which is why it deserves a user of its own.
     */
    ANY(rt_tgsigqueueinfo),
    ONLY(tgkill, 0, OWN_PROCESS, OWN_PROCESS, OWN_PROCESS), /* abort() */
    ONLY(kill, 1, 0, 0, 0), /* is the last holder of a TCS still there? */
    ANY(sched_yield),
    ANY(sched_getaffinity), /* pthread_getattr_np and friends of glibc */
    ONLY(prlimit64, 0, 0, 0, 0),
    ANY(getrandom), /* malloc's tcache key */
    ANY(membarrier),
    ONLY(clone, 0, CLONE_PTHREAD, CLONE_FORK, CLONE_PTHREAD),
    FAIL(clone3, ENOSYS), /* its flags lie in memory, out of a filter's sight */
    /* Nothing can be opened.  Refused without a kill, since libteemate looks into
     * /proc/self/maps to name a mapping that is in the way of the enclave. */
    FAIL(openat, EACCES),
    ANY(wait4),
    ANY(close_range), /* the disposable child */
    ONLY(prctl, 0, PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_SECCOMP),
    ANY(seccomp), /* the child's shorter list; a filter can only be narrowed */
    ANY(restart_syscall),
    ANY(write), /* stderr: what libteemate has to say before it aborts */
    ANY(exit),
    ANY(exit_group),
};

/*
 * Files in the one folder, in addition, when the enclave has storage.  openat2 and unlinkat want a folder's
 * descriptor, and this is the only one; a path that begins at the root they would take all the
 * same, which a filter cannot see and Landlock refuses.
 */
static const struct rule storage_rules[] = {
    ONLY(openat2, 0, STORAGE_DIRECTORY, STORAGE_DIRECTORY, STORAGE_DIRECTORY),
    ONLY(unlinkat, 0, STORAGE_DIRECTORY, STORAGE_DIRECTORY, STORAGE_DIRECTORY),
    ONLY(getdents64, 0, STORAGE_DIRECTORY, STORAGE_DIRECTORY, STORAGE_DIRECTORY), /* what counts for the limit */
    ONLY(flock, 0, STORAGE_DIRECTORY, STORAGE_DIRECTORY, STORAGE_DIRECTORY),
    ONLY(fsync, 0, STORAGE_DIRECTORY, STORAGE_DIRECTORY, STORAGE_DIRECTORY), /* names */
    ANY(pwrite64),
    ANY(ftruncate),
    ANY(fdatasync),
};

/* After the child has mapped the TCS it only enters, takes ticks, and ends. */
static const struct rule child_rules[] = {
    /* entering, as above */
    ANY(rt_sigaction),
    ANY(rt_sigprocmask),
    ANY(rt_sigpending),
    ANY(rt_sigreturn),
    ANY(sigaltstack),
    ANY(arch_prctl),
    ANY(mprotect), /* page tables that follow the EPCM */
    ANY(madvise),
    ANY(mmap), /* the stack of the ticker, and malloc */
    ANY(munmap),
    ANY(brk),
    ANY(rseq),
    ANY(set_robust_list),
    ANY(futex),
    ANY(clock_gettime),
    ANY(clock_nanosleep),
    ANY(sched_yield),
    ANY(gettid),
    ANY(getpid),
    ANY(getuid),
    ANY(getrandom),
    ANY(rt_tgsigqueueinfo),
    ONLY(tgkill, 0, OWN_PROCESS, OWN_PROCESS, OWN_PROCESS),
    ONLY(clone, 0, CLONE_PTHREAD, CLONE_PTHREAD, CLONE_PTHREAD),
    FAIL(clone3, ENOSYS),
    ONLY(prctl, 0, PR_SET_NAME, PR_SET_NAME, PR_SET_NAME), /* of the ticker */
    ANY(restart_syscall),
    ANY(exit),
    ANY(exit_group),
};

static size_t emit(struct sock_filter *code, size_t at, uint16_t op, uint32_t k, uint8_t yes, uint8_t no)
{
    code[at] = (struct sock_filter){.code = op, .jt = yes, .jf = no, .k = k};
    return at + 1;
}

/*
 * One rule is a comparison and what follows when it is equal:
 *   no condition    return
 *   an argument     both halves of each value, then kill
 * so that no jump is longer than a rule.
 */
static size_t emit_rule(struct sock_filter *code, size_t at, const struct rule *rule)
{
    uint32_t values[3];
    uint32_t offset;

    if (rule->argument < 0) {
        uint32_t answer = rule->error != 0 ? SECCOMP_RET_ERRNO | (uint32_t)rule->error : SECCOMP_RET_ALLOW;

        at = emit(code, at, BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)rule->number, 0, 1);
        return emit(code, at, BPF_RET | BPF_K, answer, 0, 0);
    }
    for (size_t i = 0; i < 3; i++)
        values[i] = rule->values[i] == OWN_PROCESS ? (uint32_t)getpid() : (uint32_t)rule->values[i];
    offset = (uint32_t)(offsetof(struct seccomp_data, args) + 8u * (uint32_t)rule->argument);
    at = emit(code, at, BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)rule->number, 0, 8);
    at = emit(code, at, BPF_LD | BPF_W | BPF_ABS, offset + 4, 0, 0); /* high half */
    at = emit(code, at, BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 5);
    at = emit(code, at, BPF_LD | BPF_W | BPF_ABS, offset, 0, 0);
    at = emit(code, at, BPF_JMP | BPF_JEQ | BPF_K, values[0], 2, 0);
    at = emit(code, at, BPF_JMP | BPF_JEQ | BPF_K, values[1], 1, 0);
    at = emit(code, at, BPF_JMP | BPF_JEQ | BPF_K, values[2], 0, 1);
    at = emit(code, at, BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
    return emit(code, at, BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS, 0, 0);
}

struct rules {
    const struct rule *first;
    size_t count;
};
#define RULES(list) ((struct rules){list, sizeof(list) / sizeof((list)[0])})

static int install(struct rules rules, struct rules more)
{
    struct sock_filter *code = calloc((rules.count + more.count) * 9 + 8, sizeof(*code));
    struct sock_fprog program;
    size_t at = 0;
    int result = 0;

    if (code == NULL)
        return -ENOMEM;
    at = emit(code, at, BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch), 0, 0);
    at = emit(code, at, BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
    at = emit(code, at, BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS, 0, 0);
    at = emit(code, at, BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr), 0, 0);
    for (size_t i = 0; i < rules.count; i++)
        at = emit_rule(code, at, &rules.first[i]);
    for (size_t i = 0; i < more.count; i++)
        at = emit_rule(code, at, &more.first[i]);
    at = emit(code, at, BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS, 0, 0);
    program.len = (unsigned short)at;
    program.filter = code;
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) != 0)
        result = -errno;
    free(code);
    return result;
}

int sandbox_filter(bool storage)
{
    return install(RULES(warden_rules), storage ? RULES(storage_rules) : (struct rules){0});
}

int sandbox_filter_child(void)
{
    return install(RULES(child_rules), (struct rules){0});
}

/* ---- the rest ---------------------------------------------------------------------- */

static int drop_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    struct __user_cap_data_struct none[2] = {{0}};

    /* Ambient ones first: they could come back with an exec, which the filter forbids anyway. */
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) != 0)
        return -errno;
    for (unsigned long cap = 0; cap <= CAP_LAST_CAP; cap++) {
        /* EINVAL: older kernel; EPERM: not ours to drop, and none to drop. */
        if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) != 0 && errno != EINVAL && errno != EPERM)
            return -errno;
    }
    if (syscall(SYS_capset, &header, none) != 0)
        return -errno;
    return 0;
}

static int drop_descriptors(bool storage)
{
    unsigned kept = storage ? STORAGE_DIRECTORY : WARDEN_SOCKET;
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);

    if (null < 0)
        return -errno;
    if (dup2(null, STDIN_FILENO) < 0 || dup2(null, STDOUT_FILENO) < 0)
        return -errno;
    if (fcntl(STDERR_FILENO, F_GETFD) < 0 && dup2(null, STDERR_FILENO) < 0)
        return -errno;
    if (close_range(kept + 1, ~0u, 0) != 0)
        return -errno;
    if (null >= WARDEN_SOCKET && (unsigned)null <= kept)
        return -EBADF; /* there was no socketpair, or no folder */
    return 0;
}

/* The folder by a description of our own: locks belong to those, and the broker's may live on in others. */
static int own_directory(void)
{
    int fd = openat(STORAGE_DIRECTORY, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int result = 0;

    if (fd < 0)
        return -errno;
    if (dup3(fd, STORAGE_DIRECTORY, O_CLOEXEC) < 0)
        result = -errno;
    close(fd);
    return result;
}

/*
 * Nothing outside of the folder can be opened or unlinked any more, by whatever path.  A kernel without
 * Landlock, and a container that does not let us, leave that to openat2's own flags.
 */
static int confine_to_directory(void)
{
    const uint64_t allowed = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE | LANDLOCK_ACCESS_FS_READ_DIR |
                             LANDLOCK_ACCESS_FS_MAKE_REG | LANDLOCK_ACCESS_FS_REMOVE_FILE;
    long version = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
    /* Bits are added at the upper end: 13 at first, then REFER and TRUNCATE. */
    struct landlock_ruleset_attr handled = {
        .handled_access_fs = (1ull << (13 + (version < 3 ? version - 1 : 2))) - 1,
    };
    struct landlock_path_beneath_attr beneath = {.parent_fd = STORAGE_DIRECTORY};
    int result = 0;
    long rules;

    if (version < 1)
        return 0;
    beneath.allowed_access = allowed | (version >= 3 ? 1ull << 14 : 0);
    rules = syscall(SYS_landlock_create_ruleset, &handled, sizeof(handled), 0);
    if (rules < 0)
        return -errno;
    if (syscall(SYS_landlock_add_rule, rules, LANDLOCK_RULE_PATH_BENEATH, &beneath, 0) != 0 ||
        syscall(SYS_landlock_restrict_self, rules, 0) != 0)
        result = -errno;
    close((int)rules);
    return result;
}

static int set_limits(bool storage)
{
    const struct rlimit none = {0, 0};
    const struct rlimit files = {storage ? 128 : 32, storage ? 128 : 32};

    if (setrlimit(RLIMIT_CORE, &none) != 0 || setrlimit(RLIMIT_NOFILE, &files) != 0 ||
        setrlimit(RLIMIT_MSGQUEUE, &none) != 0)
        return -errno;
    return 0;
}

int sandbox_enter(bool storage, const char **step)
{
    int result;

    *step = "prctl";
    if (prctl(PR_SET_NAME, "teemate-warden", 0, 0, 0) != 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return -errno;
    *step = "descriptors";
    result = drop_descriptors(storage);
    if (result < 0)
        return result;
    *step = "capabilities";
    result = drop_capabilities();
    if (result < 0)
        return result;
    *step = "the enclave's folder, descriptor 4";
    result = storage ? own_directory() : 0;
    if (result < 0)
        return result;
    *step = "Landlock";
    result = storage ? confine_to_directory() : 0;
    if (result < 0)
        return result;
    *step = "limits";
    return set_limits(storage);
}
