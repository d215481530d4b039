/* SPDX-License-Identifier: Apache-2.0 */
/*
 * __vdso_sgx_enter_enclave in the vDSO that the kernel mapped: an ELF file in memory.
 *
 * The kernel is trusted, and an emulator's or checkpoint's idea of a vDSO is not: what
 * lies outside of the loaded segment is no table of ours.
 */
#include <elf.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/auxv.h>

#include "sgx_enter.h"

#define NAME "__vdso_sgx_enter_enclave"
#define SIZE_MAX_CREDIBLE (1u << 20)
#define ENCLU "\x0f\x01\xd7"
#define ENCLU_SIZE 3u

struct vdso {
    const uint8_t *start;
    uint64_t size;    /* of what is loaded */
    uint64_t address; /* the file's idea of where `start` is */
    const Elf64_Sym *symbols;
    uint64_t symbol_count;
    const char *strings;
    uint64_t strings_size;
};

static struct {
    void *function;
    uint64_t enclu;
} found;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* [offset, offset + length) of the vDSO, or NULL. */
static const void *part(const struct vdso *vdso, uint64_t offset, uint64_t length)
{
    return offset <= vdso->size && length <= vdso->size - offset ? vdso->start + offset : NULL;
}

/* How many symbols there are, as DT_GNU_HASH has it: the last chain's end. */
static uint64_t count_by_gnu_hash(const struct vdso *vdso, uint64_t offset)
{
    const uint32_t *head = part(vdso, offset, 16), *buckets, *chain;
    uint64_t at, last = 0;

    if (!head)
        return 0;
    at = offset + 16 + 8ull * head[2];
    buckets = part(vdso, at, 4ull * head[0]);
    if (!buckets)
        return 0;
    for (uint32_t i = 0; i < head[0]; i++)
        if (buckets[i] > last)
            last = buckets[i];
    if (last < head[1])
        return 0;
    at += 4ull * head[0];
    do
        chain = part(vdso, at + 4 * (last++ - head[1]), 4);
    while (chain && !(*chain & 1));
    return chain ? last : 0;
}

static void read_dynamic(struct vdso *vdso, const Elf64_Dyn *dynamic, uint64_t count)
{
    uint64_t symbols = 0, strings = 0, hash = 0, gnu_hash = 0;
    const uint32_t *head;

    for (uint64_t i = 0; i < count && dynamic[i].d_tag != DT_NULL; i++) {
        uint64_t offset = dynamic[i].d_un.d_ptr - vdso->address;

        switch (dynamic[i].d_tag) {
        case DT_SYMTAB:
            symbols = offset;
            break;
        case DT_STRTAB:
            strings = offset;
            break;
        case DT_STRSZ:
            vdso->strings_size = dynamic[i].d_un.d_val;
            break;
        case DT_HASH:
            hash = offset;
            break;
        case DT_GNU_HASH:
            gnu_hash = offset;
            break;
        default:
            break;
        }
    }
    head = hash ? part(vdso, hash, 8) : NULL;
    vdso->symbol_count = head ? head[1] : gnu_hash ? count_by_gnu_hash(vdso, gnu_hash) : 0;
    if (vdso->symbol_count > SIZE_MAX_CREDIBLE)
        vdso->symbol_count = 0;
    vdso->symbols = part(vdso, symbols, vdso->symbol_count * sizeof(*vdso->symbols));
    vdso->strings = part(vdso, strings, vdso->strings_size);
}

static bool read_headers(struct vdso *vdso)
{
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)(const void *)vdso->start;
    const Elf64_Phdr *segments;
    const Elf64_Dyn *dynamic;
    bool loaded = false;

    if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 || header->e_ident[EI_CLASS] != ELFCLASS64 ||
        header->e_phentsize != sizeof(*segments))
        return false;
    /* The first page is there: AT_SYSINFO_EHDR points to it.  The segments tell of the rest. */
    if (header->e_phoff > SGX_PAGE || header->e_phnum * sizeof(*segments) > SGX_PAGE - header->e_phoff)
        return false;
    segments = (const Elf64_Phdr *)(const void *)(vdso->start + header->e_phoff);
    for (size_t i = 0; i < header->e_phnum; i++)
        if (segments[i].p_type == PT_LOAD && segments[i].p_offset == 0 && segments[i].p_filesz <= SIZE_MAX_CREDIBLE) {
            vdso->size = segments[i].p_filesz;
            vdso->address = segments[i].p_vaddr;
            loaded = true;
        }
    for (size_t i = 0; loaded && i < header->e_phnum; i++)
        if (segments[i].p_type == PT_DYNAMIC) {
            dynamic = part(vdso, segments[i].p_offset, segments[i].p_filesz);
            if (dynamic)
                read_dynamic(vdso, dynamic, segments[i].p_filesz / sizeof(*dynamic));
        }
    return vdso->symbols && vdso->strings;
}

static void find(void)
{
    struct vdso vdso = {.start = (const uint8_t *)getauxval(AT_SYSINFO_EHDR)};

    if (!vdso.start || !read_headers(&vdso))
        return;
    for (uint64_t i = 0; i < vdso.symbol_count; i++) {
        const Elf64_Sym *symbol = &vdso.symbols[i];
        const uint8_t *code;

        if (symbol->st_shndx == SHN_UNDEF || symbol->st_name > vdso.strings_size ||
            vdso.strings_size - symbol->st_name < sizeof(NAME) ||
            memcmp(vdso.strings + symbol->st_name, NAME, sizeof(NAME)) != 0)
            continue;
        code = part(&vdso, symbol->st_value - vdso.address, symbol->st_size);
        for (uint64_t at = 0; code && at + ENCLU_SIZE <= symbol->st_size; at++)
            if (memcmp(code + at, ENCLU, ENCLU_SIZE) == 0) {
                found.enclu = (uint64_t)(uintptr_t)(code + at);
                found.function = (void *)(uintptr_t)code;
                return;
            }
    }
}

void *sgx_vdso_function(void)
{
    pthread_once(&once, find);
    return found.function;
}

uint64_t sgx_vdso_enclu(void)
{
    return found.enclu; /* asked by signal handlers, after an entry has looked */
}
