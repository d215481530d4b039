"""Write the C source of ``teemate.broker._door``: the cffi binding of the headers.

Usage: build_door.py HEADER... OUTPUT_C
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cffi import FFI


def main() -> None:
    *headers, output = (Path(arg) for arg in sys.argv[1:])
    builder = FFI()
    for header in headers:
        found = re.search(r"/\* cffi: begin \*/(.*?)/\* cffi: end \*/", header.read_text(), re.DOTALL)
        if found is None:
            raise SystemExit(f"{header}: no cffi marks")
        builder.cdef(found.group(1))
    includes = "".join(f'#include "{header.name}"\n' for header in headers)
    builder.set_source("teemate.broker._door", includes, py_limited_api=True)
    builder.emit_c_code(str(output))


if __name__ == "__main__":
    main()
