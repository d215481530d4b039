/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A client of the vault that has nothing but libc and libteemate: one line of standard input is one thing to do.
 *
 *   put KEY VALUE, get KEY      in the space that all clients share
 *   ioctl                       SGX's ioctls on the enclave's own descriptor, each by the 64-bit and by the 32-bit
 *                               system call: prints their errnos
 *
 * It attaches first, and prints "attached".
 */
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <teemate_client.h>

#define SHARED 1

static struct teemate_lease *slot;

static void fail(const struct teemate_error *error)
{
    printf("%s: %s\n", teemate_code_name(error->code), error->text);
}

/* struct vault_put and what follows it (native/enclaves/vault/vault.h) */
static void put(const char *key, const char *value)
{
    struct {
        uint8_t space, reserved;
        uint16_t key_length;
        uint32_t value_length;
        uint64_t ttl_ms, expected;
        char text[512];
    } request = {.space = SHARED};
    uint64_t version;
    struct teemate_error error;

    request.key_length = (uint16_t)strlen(key);
    request.value_length = (uint32_t)strlen(value);
    int length = snprintf(request.text, sizeof(request.text), "%s%s", key, value);
    if (teemate_call(slot, "put", &request, offsetof(typeof(request), text) + (size_t)length, &version,
                     sizeof(version), NULL, NULL, &error) != TEEMATE_OK)
        fail(&error);
    else
        puts("ok");
}

/* struct vault_name, struct vault_value */
static void get(const char *key)
{
    struct {
        uint8_t space, reserved;
        uint16_t key_length;
        uint32_t reserved2;
        char text[256];
    } request = {.space = SHARED};
    struct {
        uint64_t version, expires;
        char text[512];
    } value;
    size_t length;
    struct teemate_error error;

    request.key_length = (uint16_t)snprintf(request.text, sizeof(request.text), "%s", key);
    if (teemate_call(slot, "get", &request, offsetof(typeof(request), text) + request.key_length, &value,
                     sizeof(value), &length, NULL, &error) != TEEMATE_OK)
        fail(&error);
    else
        printf("%.*s\n", (int)(length - offsetof(typeof(value), text)), value.text);
}

/* ioctl(2) by the gate of 32-bit programs, which has other numbers and reaches the same driver. */
static int ioctl32(int fd, unsigned int request)
{
    int result;

    __asm__ volatile("int $0x80"
                     : "=a"(result)
                     : "a"(54), "b"(fd), "c"(request), "d"(0)
                     : "memory", "r8", "r9", "r10", "r11");
    return result;
}

/* The descriptor that libteemate holds of the enclave: a driver's file, or the sim's memory. */
static int enclave_fd(void)
{
    char path[64], target[256];

    for (int fd = 3; fd < 64; fd++) {
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        ssize_t length = readlink(path, target, sizeof(target) - 1);

        if (length <= 0)
            continue;
        target[length] = 0;
        if (strstr(target, "sgx_enclave") || strstr(target, "teemate-sim-enclave"))
            return fd;
    }
    return -1;
}

static void ioctls(void)
{
    /* asm/sgx.h, which cannot be included beside libteemate's headers */
    static const unsigned int requests[] = {
        _IOW(0xa4, 0, char[8]),   /* SGX_IOC_ENCLAVE_CREATE */
        _IOWR(0xa4, 1, char[48]), /* ADD_PAGES */
        _IOW(0xa4, 2, char[8]),   /* INIT */
        _IOW(0xa4, 3, char[8]),   /* PROVISION */
        _IOWR(0xa4, 5, char[40]), /* RESTRICT_PERMISSIONS */
        _IOWR(0xa4, 6, char[40]), /* MODIFY_TYPES */
        _IOWR(0xa4, 7, char[24]), /* REMOVE_PAGES */
        _IOWR(0xa4, 0xff, char[64]), /* one of some later kernel */
    };
    int fd = enclave_fd();

    for (size_t i = 0; i < sizeof(requests) / sizeof(*requests); i++) {
        int result = ioctl(fd, requests[i], 0) < 0 ? errno : 0;

        printf("%d %d ", result, -ioctl32(fd, requests[i]));
    }
    puts("");
}

int main(int argc, char **argv)
{
    struct teemate_broker *broker;
    struct teemate_grant *grant;
    struct teemate_error error;
    char line[1024];

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (teemate_connect(NULL, "container", &broker, &error) != TEEMATE_OK ||
        teemate_attach(broker, argc > 1 ? argv[1] : "vault", 1, 60000, &grant, &error) != TEEMATE_OK ||
        teemate_take(grant, 0, &slot, &error) != TEEMATE_OK) {
        fail(&error);
        return 1;
    }
    puts("attached");
    while (fgets(line, sizeof(line), stdin)) {
        char *verb = strtok(line, " \n"), *key = strtok(NULL, " \n"), *value = strtok(NULL, "\n");

        if (verb && !strcmp(verb, "put") && key && value)
            put(key, value);
        else if (verb && !strcmp(verb, "get") && key)
            get(key);
        else if (verb && !strcmp(verb, "ioctl"))
            ioctls();
        else
            puts("what?");
    }
    teemate_give(slot);
    teemate_disconnect(broker, NULL);
    return 0;
}
