"""WebAssembly modules for the tests, put together byte by byte: no compiler is needed.

``command(code)`` is a WASI command whose ``_start`` is `code`; the functions of this module that return
bytes are instructions, to be joined with ``+``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

I32, I64, F32, F64, FUNCREF = 0x7F, 0x7E, 0x7D, 0x7C, 0x70
WASI = "wasi_snapshot_preview1"

# The imports of every command, in this order: function indices are their places.
IMPORTS: dict[str, tuple[bytes, bytes]] = {
    "fd_write": (bytes([I32] * 4), bytes([I32])),
    "fd_read": (bytes([I32] * 4), bytes([I32])),
    "proc_exit": (bytes([I32]), b""),
    "random_get": (bytes([I32] * 2), bytes([I32])),
    "clock_time_get": (bytes([I32, I64, I32]), bytes([I32])),
    "args_sizes_get": (bytes([I32] * 2), bytes([I32])),
    "args_get": (bytes([I32] * 2), bytes([I32])),
    "environ_sizes_get": (bytes([I32] * 2), bytes([I32])),
    "environ_get": (bytes([I32] * 2), bytes([I32])),
    "path_open": (bytes([I32] * 5 + [I64, I64, I32, I32]), bytes([I32])),
    "sock_accept": (bytes([I32] * 3), bytes([I32])),
    "fd_prestat_get": (bytes([I32] * 2), bytes([I32])),
}
START = len(IMPORTS)
"""Index of ``_start`` among the functions of a command; those of `functions` follow."""


def leb(value: int) -> bytes:
    """Encode an unsigned number."""
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)


def sleb(value: int) -> bytes:
    """Encode a signed number."""
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        done = value == (-1 if byte & 0x40 else 0)
        out.append(byte | (0 if done else 0x80))
        if done:
            return bytes(out)


def vector(items: Sequence[bytes]) -> bytes:
    """Encode a vector."""
    return leb(len(items)) + b"".join(items)


def name(text: str) -> bytes:
    """Encode a name."""
    return leb(len(text.encode())) + text.encode()


def section(number: int, content: bytes) -> bytes:
    """Encode a section."""
    return bytes([number]) + leb(len(content)) + content


def i32(value: int) -> bytes:
    """``i32.const``."""
    return b"\x41" + sleb(value - (1 << 32) if value >= 1 << 31 else value)


def i64(value: int) -> bytes:
    """``i64.const``."""
    return b"\x42" + sleb(value)


def f64(value: float) -> bytes:
    """``f64.const``."""
    return b"\x44" + struct.pack("<d", value)


def call(function: str | int) -> bytes:
    """``call`` of an import by name, or of a function by index."""
    index = list(IMPORTS).index(function) if isinstance(function, str) else function
    return b"\x10" + leb(index)


DROP, UNREACHABLE, END = b"\x1a", b"\x00", b"\x0b"
I32_LOAD, I64_LOAD, I32_LOAD8 = b"\x28\x02\x00", b"\x29\x03\x00", b"\x2d\x00\x00"
I32_STORE, I64_STORE, F64_STORE, I32_STORE8 = (
    b"\x36\x02\x00",
    b"\x37\x03\x00",
    b"\x39\x03\x00",
    b"\x3a\x00\x00",
)
LOOP, BRANCH, GROW, SIZE = b"\x03\x40", b"\x0c\x00", b"\x40\x00", b"\x3f\x00"


def command(
    code: bytes,
    *,
    data: bytes = b"",
    pages: int = 1,
    functions: Sequence[bytes] = (),
    table: int = 0,
    start: bool = False,
    locals_: int = 0,
) -> bytes:
    """A WASI command: `data` lies at 0 of its memory of `pages`; `functions` take and return nothing.

    With `table`, a table of so many elements whose first are ``_start`` and `functions`; with `start`, the
    code is the module's start function too.  `locals_` are i64.
    """
    types = [
        b"\x60" + vector([bytes([p]) for p in a]) + vector([bytes([r]) for r in b])
        for a, b in IMPORTS.values()
    ]
    types.append(b"\x60\x00\x00")
    nothing = leb(len(types) - 1)
    imports = [name(WASI) + name(n) + b"\x00" + leb(i) for i, n in enumerate(IMPORTS)]
    bodies = []
    for body in (code, *functions):
        text = (leb(1) + leb(locals_) + bytes([I64]) if locals_ else leb(0)) + body + END
        bodies.append(leb(len(text)) + text)
    out = b"\0asm\1\0\0\0" + section(1, vector(types)) + section(2, vector(imports))
    out += section(3, vector([nothing] * len(bodies)))
    if table:
        out += section(4, vector([bytes([FUNCREF, 0]) + leb(table)]))
    out += section(5, vector([b"\x00" + leb(pages)]))
    out += section(7, vector([name("memory") + b"\x02\x00", name("_start") + b"\x00" + leb(START)]))
    if start:
        out += section(8, leb(START))
    if table:
        elements = [leb(START + number) for number in range(1 + len(functions))]
        out += section(9, vector([b"\x00" + i32(0) + END + vector(elements)]))
    out += section(10, vector(bodies))
    if data:
        out += section(11, vector([b"\x00" + i32(0) + END + leb(len(data)) + data]))
    return out


def write(descriptor: int, at: int, length: int, *, scratch: int = 60000) -> bytes:
    """Write `length` bytes at `at` to a descriptor."""
    head = i32(scratch) + i32(at) + I32_STORE + i32(scratch + 4) + i32(length) + I32_STORE
    return head + i32(descriptor) + i32(scratch) + i32(1) + i32(scratch + 8) + call("fd_write") + DROP


def printing(text: bytes, *, errors: bytes = b"", code: int | None = None) -> bytes:
    """A command that writes `text` to stdout and `errors` to stderr, and perhaps exits with `code`."""
    body = write(1, 0, len(text)) + (write(2, len(text), len(errors)) if errors else b"")
    return command(body + (i32(code) + call("proc_exit") if code is not None else b""), data=text + errors)


def echo(room: int = 50000) -> bytes:
    """A command that writes what it reads, up to `room` bytes."""
    read = i32(60000) + i32(0) + I32_STORE + i32(60004) + i32(room) + I32_STORE
    read += i32(0) + i32(60000) + i32(1) + i32(60008) + call("fd_read") + DROP
    copied = i32(60004) + i32(60008) + I32_LOAD + I32_STORE
    return command(read + copied + i32(1) + i32(60000) + i32(1) + i32(60012) + call("fd_write") + DROP)


ENDLESS = LOOP + BRANCH + END
