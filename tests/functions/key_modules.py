"""WebAssembly modules that use `teemate_keys`, put together byte by byte."""

from __future__ import annotations

from collections.abc import Sequence

from modules import (
    BRANCH,
    DROP,
    END,
    I32,
    I32_LOAD,
    I32_STORE,
    LOOP,
    WASI,
    call,
    i32,
    leb,
    name,
    section,
    vector,
)

PARAMETERS = {"put": 4, "get": 5, "delete": 2, "list": 6}
PAGES = 8
INPUT, KEY, VALUE = 0, 8, 520
ANSWER, LENGTH, DATA, ROOM = 260_000, 260_004, 260_008, 131_072
VECTOR, COUNT, CURSOR = 400_000, 400_016, 400_032
FD_WRITE, FD_READ = 0, 1


def _command(code: bytes, imports: Sequence[tuple[str, int]], data: bytes = b"") -> bytes:
    """A WASI command that imports fd_write, fd_read and `imports`, which take so many i32 and return one."""
    functions = [(WASI, "fd_write", 4), (WASI, "fd_read", 4), *(("teemate_keys", *one) for one in imports)]
    types = [b"\x60" + vector([bytes([I32])] * count) + vector([bytes([I32])]) for _, _, count in functions]
    types.append(b"\x60\x00\x00")
    named = [name(source) + name(what) + b"\x00" + leb(n) for n, (source, what, _) in enumerate(functions)]
    body = leb(0) + code + END
    out = b"\0asm\1\0\0\0" + section(1, vector(types)) + section(2, vector(named))
    out += section(3, vector([leb(len(functions))])) + section(5, vector([b"\x00" + leb(PAGES)]))
    exports = [name("memory") + b"\x02\x00", name("_start") + b"\x00" + leb(len(functions))]
    out += section(7, vector(exports)) + section(10, vector([leb(len(body)) + body]))
    if data:
        out += section(11, vector([b"\x00" + i32(0) + END + leb(len(data)) + data]))
    return out


def _load(at: int) -> bytes:
    return i32(at) + I32_LOAD


def _transfer(function: int, descriptor: int, at: int, length: bytes) -> bytes:
    head = i32(VECTOR) + i32(at) + I32_STORE + i32(VECTOR + 4) + length + I32_STORE
    return head + i32(descriptor) + i32(VECTOR) + i32(1) + i32(COUNT) + call(function) + DROP


def module(what: str) -> bytes:
    """One call of `what`.

    stdin: the lengths of key and value, 512 bytes for the key, the value; stdout: errno, length, data.
    """
    arguments = {
        "put": i32(KEY) + _load(INPUT) + i32(VALUE) + _load(INPUT + 4),
        "get": i32(KEY) + _load(INPUT) + i32(DATA) + i32(65536) + i32(LENGTH),
        "delete": i32(KEY) + _load(INPUT),
        "list": i32(KEY) + _load(INPUT) + i32(DATA) + i32(ROOM) + i32(CURSOR) + i32(LENGTH),
    }[what]
    code = _transfer(FD_READ, 0, INPUT, i32(VALUE + 65537))
    code += i32(ANSWER) + arguments + call(2) + I32_STORE
    code += _transfer(FD_WRITE, 1, ANSWER, _load(LENGTH) + i32(8) + b"\x6a")
    return _command(code, [(what, PARAMETERS[what])])


def calling(what: str, arguments: Sequence[int], *, repeat: bool = False) -> bytes:
    """Call with these numbers and write the errno; with `repeat` again and again."""
    once = b"".join(map(i32, arguments)) + call(2)
    if repeat:
        code = LOOP + once + DROP + BRANCH + END
    else:
        code = i32(ANSWER) + once + I32_STORE + _transfer(FD_WRITE, 1, ANSWER, i32(4))
    return _command(code, [(what, len(arguments))])


def churning() -> bytes:
    """Put, put again and delete the keys a to p, without end; values are their key, up to 64 times."""
    letters = b"abcdefghijklmnop"
    data = b"".join(bytes([letter]) * 64 for letter in letters)
    code = b""
    for number in range(len(letters)):
        at = 64 * number
        for length in (number, 64 - number):
            code += i32(at) + i32(1) + i32(at) + i32(length) + call(2) + DROP
        if number % 3 == 0:
            code += i32(at) + i32(1) + call(3) + DROP
    return _command(LOOP + code + BRANCH + END, [("put", 4), ("delete", 2)], data)
