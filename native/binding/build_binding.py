"""Write the C source of ``teemate._native``: the cffi binding of native/include/teemate.h.

Usage: build_binding.py SGX_ARCH_H TEEMATE_H OUTPUT_C

The declarations are those between the cffi marks of teemate.h, so there is one
source of truth; functions that are declared but not there yet fail at link time.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cffi import FFI


def declarations(header: str) -> str:
    """Return what stands between the cffi marks of `header`."""
    return "\n".join(re.findall(r"/\* cffi: begin \*/(.*?)/\* cffi: end \*/", header, re.DOTALL))


def struct_run(arch: str) -> str:
    """Return the declaration of struct sgx_enclave_run in sgx_arch.h."""
    found = re.search(r"^struct sgx_enclave_run \{.*?^\};", arch, re.DOTALL | re.MULTILINE)
    if found is None:
        raise SystemExit("sgx_arch.h: no struct sgx_enclave_run")
    return found.group(0)


def main() -> None:
    arch, header, output = (Path(arg) for arg in sys.argv[1:4])
    builder = FFI()
    builder.cdef(struct_run(arch.read_text()) + declarations(header.read_text()))
    builder.set_source("teemate._native", '#include "teemate.h"', py_limited_api=True)
    builder.emit_c_code(str(output))


if __name__ == "__main__":
    main()
