/* SPDX-License-Identifier: Apache-2.0 */
/* __vdso_sgx_enter_enclave in the vDSO that the kernel mapped: an ELF file in memory. */
#include <elf.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/auxv.h>

#include "sgx.h"

static void *find(const char *vdso, const char *name)
{
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)vdso;
    const Elf64_Phdr *segments;
    const Elf64_Dyn *dynamic = NULL;
    const Elf64_Sym *symbols = NULL;
    const char *strings = NULL;
    uint64_t load = UINT64_MAX;
    size_t count = 0;

    if (!vdso)
        return NULL;
    segments = (const Elf64_Phdr *)(vdso + header->e_phoff);
    for (size_t i = 0; i < header->e_phnum; i++) {
        if (segments[i].p_type == PT_DYNAMIC)
            dynamic = (const Elf64_Dyn *)(vdso + segments[i].p_offset);
        if (segments[i].p_type == PT_LOAD && load == UINT64_MAX)
            load = segments[i].p_vaddr - segments[i].p_offset;
    }
    for (; dynamic && dynamic->d_tag != DT_NULL; dynamic++) {
        const char *at = vdso + (dynamic->d_un.d_ptr - load);

        if (dynamic->d_tag == DT_SYMTAB)
            symbols = (const Elf64_Sym *)at;
        else if (dynamic->d_tag == DT_STRTAB)
            strings = at;
        else if (dynamic->d_tag == DT_HASH)
            count = ((const Elf64_Word *)at)[1];
    }
    for (size_t i = 0; symbols && strings && i < count; i++)
        if (symbols[i].st_shndx != SHN_UNDEF && strcmp(strings + symbols[i].st_name, name) == 0)
            return (void *)(uintptr_t)(vdso + (symbols[i].st_value - load));
    return NULL;
}

void *sgx_vdso_function(void)
{
    static _Atomic(void *) found;
    void *function = atomic_load_explicit(&found, memory_order_relaxed);

    if (!function) {
        function = find((const char *)getauxval(AT_SYSINFO_EHDR), "__vdso_sgx_enter_enclave");
        atomic_store_explicit(&found, function, memory_order_relaxed);
    }
    return function;
}
