/* SPDX-License-Identifier: Apache-2.0 */
/* What SQLite uses of libc, so that an image does not depend on the host's headers. */
#ifndef DB_LIBC_STRING_H
#define DB_LIBC_STRING_H

#include <stddef.h>

void *memcpy(void *restrict to, const void *restrict from, size_t length);
void *memmove(void *to, const void *from, size_t length);
void *memset(void *to, int byte, size_t length);
int memcmp(const void *a, const void *b, size_t length);
size_t strlen(const char *text);
int strcmp(const char *a, const char *b);
int strncmp(const char *a, const char *b, size_t length);
char *strchr(const char *text, int character);
char *strrchr(const char *text, int character);
void *memchr(const void *data, int byte, size_t length);
size_t strspn(const char *text, const char *accept);
size_t strcspn(const char *text, const char *reject);

#endif
