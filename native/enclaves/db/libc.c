/* SPDX-License-Identifier: Apache-2.0 */
/* What SQLite calls of libc beyond what the SDK has. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

int strncmp(const char *a, const char *b, size_t length);
char *strchr(const char *text, int character);
char *strrchr(const char *text, int character);
size_t strspn(const char *text, const char *accept);
size_t strcspn(const char *text, const char *reject);
void *memchr(const void *data, int byte, size_t length);

int strncmp(const char *a, const char *b, size_t length)
{
    while (length && *a && *a == *b)
        a++, b++, length--;
    return length ? (uint8_t)*a - (uint8_t)*b : 0;
}

char *strchr(const char *text, int character)
{
    while (*text != (char)character)
        if (!*text++)
            return NULL;
    return (char *)text;
}

char *strrchr(const char *text, int character)
{
    const char *found = NULL;

    do
        if (*text == (char)character)
            found = text;
    while (*text++);
    return (char *)found;
}

static size_t span(const char *text, const char *set, bool in)
{
    size_t length = 0;

    while (text[length] && (strchr(set, text[length]) != NULL) == in)
        length++;
    return length;
}

size_t strspn(const char *text, const char *accept)
{
    return span(text, accept, true);
}

size_t strcspn(const char *text, const char *reject)
{
    return span(text, reject, false);
}

void *memchr(const void *data, int byte, size_t length)
{
    const uint8_t *bytes = data;

    for (size_t i = 0; i < length; i++)
        if (bytes[i] == (uint8_t)byte)
            return (void *)(bytes + i);
    return NULL;
}
