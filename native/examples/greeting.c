/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Put a value into a vault that many programs share, and get it again.
 *
 *     cc greeting.c $(pkg-config --cflags --libs teemate) -o greeting
 *     ./greeting vault name Ada
 *
 * What the vault's ECALLs `put` and `get` take and give is told in native/enclaves/vault/vault.h; an
 * application of your own includes the header of its own enclave.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <teemate_client.h>

#define VALUE_MAX 65536u
#define SHARED 1 /* a value for all clients of the enclave; 0: for this identity alone */
#define NOT_FOUND 1

struct name {
    uint8_t space, reserved;
    uint16_t key_length;
    uint32_t reserved2;
};

struct put {
    uint8_t space, reserved;
    uint16_t key_length;
    uint32_t value_length;
    uint64_t ttl_ms, expected;
};

struct value {
    uint64_t version, expires;
    char content[VALUE_MAX];
};

static int put(struct teemate_lease *slot, const char *key, const char *value, struct teemate_error *error)
{
    struct put head = {.space = SHARED, .key_length = (uint16_t)strlen(key), .value_length = (uint32_t)strlen(value)};
    char request[sizeof(head) + 256 + VALUE_MAX];
    uint64_t version;

    memcpy(request, &head, sizeof(head));
    memcpy(request + sizeof(head), key, head.key_length);
    memcpy(request + sizeof(head) + head.key_length, value, head.value_length);
    return teemate_call(slot, "put", request, sizeof(head) + head.key_length + head.value_length, &version,
                        sizeof(version), NULL, NULL, error);
}

/* Print what `key` holds. */
static int get(struct teemate_lease *slot, const char *key, struct teemate_error *error)
{
    struct name head = {.space = SHARED, .key_length = (uint16_t)strlen(key)};
    char request[sizeof(head) + 256];
    static struct value value;
    size_t length;
    int code;

    memcpy(request, &head, sizeof(head));
    memcpy(request + sizeof(head), key, head.key_length);
    code = teemate_call(slot, "get", request, sizeof(head) + head.key_length, &value, sizeof(value), &length, NULL, error);
    if (code == TEEMATE_CALL_FAILED && error->status == NOT_FOUND)
        printf("%s is not there\n", key);
    else if (code == TEEMATE_OK)
        printf("%s = %.*s (version %llu)\n", key, (int)(length - 16), value.content, (unsigned long long)value.version);
    return code;
}

int main(int argc, char **argv)
{
    struct teemate_broker *broker = NULL;
    struct teemate_grant *grant = NULL;
    struct teemate_lease *slot = NULL;
    struct teemate_error error = {0};
    int code;

    if (argc < 3 || argc > 4 || strlen(argv[2]) > 256 || (argc == 4 && strlen(argv[3]) > VALUE_MAX)) {
        fprintf(stderr, "usage: greeting ENCLAVE KEY [VALUE]\n");
        return 2;
    }
    code = teemate_connect(NULL, "greeting", &broker, &error); /* TEEMATE_SOCKET, or the usual place */
    if (code == TEEMATE_OK)
        code = teemate_attach(broker, argv[1], 1, 10000, &grant, &error);
    if (code == TEEMATE_OK)
        code = teemate_take(grant, 0, &slot, &error);
    if (code == TEEMATE_OK && argc == 4)
        code = put(slot, argv[2], argv[3], &error);
    if (code == TEEMATE_OK)
        code = get(slot, argv[2], &error);
    if (code != TEEMATE_OK)
        fprintf(stderr, "greeting: %s: %s\n", teemate_code_name(error.code), error.text);
    teemate_give(slot);
    teemate_disconnect(broker, NULL); /* detaches */
    return code == TEEMATE_OK ? 0 : 1;
}
