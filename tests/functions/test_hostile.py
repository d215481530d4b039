"""Whatever a module does, its invocation ends in a typed error, and the next one finds all as it was."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import modules as wasm
import pytest
from backends import BACKEND
from function_enclaves import functions_image

import teemate
from teemate.functions import (
    BadArgument,
    FunctionExists,
    FunctionFailed,
    FunctionLimit,
    FunctionLimits,
    Functions,
    FunctionTrapped,
    ModuleInvalid,
)

GROW_FOR_EVER = wasm.LOOP + wasm.i32(16) + wasm.GROW + wasm.i32(-1) + b"\x47\x0d\x00" + wasm.END


@pytest.fixture(scope="module")
def functions() -> Iterator[Functions]:
    image = functions_image()
    with teemate.create_enclave(image, image.with_suffix(".sig"), backend=BACKEND) as enclave:
        yield Functions.of(enclave)


@pytest.fixture(autouse=True)
def nothing_is_left(functions: Functions) -> Iterator[None]:
    """After each test its functions are removed, and the heap is as it was but for what is kept ready."""
    yield
    for info in functions.list():
        functions.remove(info.name)
    functions.deploy("well", wasm.printing(b"well"))
    assert functions.invoke("well") == b"well"
    functions.remove("well")
    usage = functions.usage()
    assert (usage.functions, usage.size) == (0, 0)
    assert usage.heap_used < 12 << 20


def deploy(functions: Functions, code: bytes, **options: object) -> None:
    limits = options.pop("limits", None)
    assert limits is None or isinstance(limits, FunctionLimits)
    functions.deploy("hostile", wasm.command(code, **options), limits=limits)  # type: ignore[arg-type]


def test_an_infinite_loop_ends_at_its_limit_of_fuel(functions: Functions) -> None:
    deploy(functions, wasm.ENDLESS, limits=FunctionLimits(fuel=9_000_000))
    with pytest.raises(FunctionLimit) as caught:
        functions.invoke("hostile")
    assert (caught.value.limit, caught.value.maximum) == ("fuel", 9_000_000)
    assert 9_000_000 - 10 < functions.describe("hostile").fuel <= 9_000_000  # but for what a turn costs
    (log,) = functions.logs("hostile")
    assert (log.outcome, log.limit) == ("limit", "fuel")


def test_recursion_without_end_ends_at_the_stack(functions: Functions) -> None:
    deploy(functions, wasm.call(wasm.START))
    with pytest.raises(FunctionLimit) as caught:
        functions.invoke("hostile")
    assert caught.value.limit == "stack"


def test_memory_that_grows_meets_its_limit(functions: Functions) -> None:
    deploy(functions, GROW_FOR_EVER + wasm.UNREACHABLE, limits=FunctionLimits(memory=4 << 20))
    with pytest.raises(FunctionLimit) as caught:
        functions.invoke("hostile")
    assert (caught.value.limit, caught.value.maximum) == ("memory", 4 << 20)


def test_who_copes_with_a_refusal_of_memory_goes_on(functions: Functions) -> None:
    pages = wasm.i32(0) + wasm.SIZE + wasm.I32_STORE
    deploy(functions, GROW_FOR_EVER + pages + wasm.write(1, 0, 4), limits=FunctionLimits(memory=4 << 20))
    assert functions.invoke("hostile") == (49).to_bytes(4, "little")  # 1 + 3 * 16 of 64


@pytest.mark.parametrize("step", [1, 5, 64])
def test_a_memory_grows_in_steps_to_the_largest_limit_there_is(functions: Functions, step: int) -> None:
    # Until it is refused; then its size, and whether what was written at its beginning and end is there.
    grow = wasm.LOOP + wasm.i32(step) + wasm.GROW + wasm.i32(-1) + b"\x47\x0d\x00" + wasm.END
    last = wasm.SIZE + wasm.i32(16) + b"\x74" + wasm.i32(4) + b"\x6b"
    code = wasm.i32(8) + wasm.i32(77) + wasm.I32_STORE + grow + last + wasm.i32(88) + wasm.I32_STORE
    code += wasm.i32(0) + wasm.SIZE + wasm.I32_STORE + wasm.i32(4) + last + wasm.I32_LOAD + wasm.I32_STORE
    deploy(functions, code + wasm.write(1, 0, 12))
    heap = functions.usage().heap
    largest = heap // 4
    functions.limits("hostile", FunctionLimits(memory=largest))
    pages, end, begin = struct.unpack("<3I", functions.invoke("hostile"))
    assert largest - (step << 16) < pages << 16 <= largest
    assert (begin, end) == (77, 88)


def test_who_may_have_the_memory_and_cannot_is_told_that_the_heap_is_full(functions: Functions) -> None:
    # The request and the memory are more together than one owner may have: half the heap.
    heap = functions.usage().heap
    deploy(functions, GROW_FOR_EVER + wasm.UNREACHABLE, limits=FunctionLimits(memory=heap // 4))
    with pytest.raises(FunctionLimit) as caught:
        functions.invoke("hostile", bytes(16 << 20))
    assert caught.value.limit == "heap"


def test_a_module_that_begins_with_more_than_its_limit_does_not_begin(functions: Functions) -> None:
    deploy(functions, wasm.write(1, 0, 1), pages=65, limits=FunctionLimits(memory=4 << 20))
    with pytest.raises(FunctionLimit) as caught:
        functions.invoke("hostile")
    assert caught.value.limit == "memory"


def test_output_without_end_meets_its_limit(functions: Functions) -> None:
    endless = wasm.LOOP + wasm.write(1, 0, 50_000) + wasm.BRANCH + wasm.END
    deploy(functions, endless, limits=FunctionLimits(output=123_456))
    with pytest.raises(FunctionLimit) as caught:
        functions.invoke("hostile")
    assert (caught.value.limit, caught.value.maximum) == ("output", 123_456)


def test_of_stderr_without_end_the_last_is_kept(functions: Functions) -> None:
    some = b"".join(wasm.write(2, 0, 50_000) for _ in range(7)) + wasm.write(2, 50_000, 3)
    functions.deploy("hostile", wasm.command(some, data=bytes(50_000) + b"end"))
    assert functions.invoke("hostile") == b""
    (log,) = functions.logs("hostile")
    assert len(log.text) == 16_384
    assert log.text.endswith(b"\0end")
    assert log.dropped + len(log.text) == 350_003


OUT_OF_BOUNDS = {
    "load behind the end": wasm.i32(65_533) + wasm.I32_LOAD + wasm.DROP,
    "load at the last address": wasm.i32(-1) + wasm.I32_LOAD8 + wasm.DROP,
    "load whose offset wraps": wasm.i32(-8) + b"\x28\x02" + wasm.leb(0xFFFF_FFFF) + wasm.DROP,
    "store behind the end": wasm.i32(65_530) + wasm.i64(-1) + wasm.I64_STORE,
    "store at the last address": wasm.i32(-1) + wasm.i32(1) + wasm.I32_STORE8,
    "memory.fill": wasm.i32(65_000) + wasm.i32(0) + wasm.i32(1_000) + b"\xfc\x0b\x00",
    "memory.fill of all": wasm.i32(0) + wasm.i32(0) + wasm.i32(-1) + b"\xfc\x0b\x00",
    "memory.copy": wasm.i32(0) + wasm.i32(65_000) + wasm.i32(1_000) + b"\xfc\x0a\x00\x00",
    "memory.copy to the end": wasm.i32(65_000) + wasm.i32(0) + wasm.i32(1_000) + b"\xfc\x0a\x00\x00",
    "table.get": wasm.i32(1_000) + b"\x25\x00" + wasm.DROP,
    "table.set": wasm.i32(-1) + b"\xd0\x70\x26\x00",
    "table.fill": wasm.i32(3) + b"\xd0\x70" + wasm.i32(100) + b"\xfc\x11\x00",
    "call of a table's element that is not there": wasm.i32(4) + b"\x11" + wasm.leb(wasm.START) + b"\x00",
    "call of an element that is null": wasm.i32(1) + b"\x11" + wasm.leb(wasm.START) + b"\x00",
    "call of an element of another type": wasm.i32(1) + wasm.i32(0) + b"\x11\x02\x00",
    "division by zero": wasm.i32(1) + wasm.i32(0) + b"\x6d" + wasm.DROP,
    "division that overflows": wasm.i32(-(1 << 31)) + wasm.i32(-1) + b"\x6d" + wasm.DROP,
    "a float that is no number": wasm.f64(float("nan")) + b"\xaa" + wasm.DROP,
    "a float that is too large": wasm.f64(1e30) + b"\xaa" + wasm.DROP,
    "unreachable": wasm.UNREACHABLE,
}


@pytest.mark.parametrize("code", OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS)
def test_traps_end_the_invocation_alone(functions: Functions, code: bytes) -> None:
    deploy(functions, code, table=4)
    for _ in range(2):
        with pytest.raises(FunctionTrapped):
            functions.invoke("hostile")
    assert functions.describe("hostile").failures == 2


def test_wasi_believes_no_address(functions: Functions) -> None:
    code = b""
    bad: list[bytes] = [wasm.i32(65_535), wasm.i32(-1), wasm.i32(-4)]
    for at in bad:
        code += wasm.i32(1) + at + wasm.i32(1) + wasm.i32(0) + wasm.call("fd_write") + wasm.DROP
        code += wasm.i32(1) + wasm.i32(0) + wasm.i32(-1) + at + wasm.call("fd_write") + wasm.DROP
        code += wasm.i32(0) + at + wasm.i32(5) + wasm.i32(0) + wasm.call("fd_read") + wasm.DROP
        code += at + wasm.i32(64) + wasm.call("random_get") + wasm.DROP
        code += wasm.i32(0) + wasm.i32(-1) + wasm.call("random_get") + wasm.DROP
        code += (
            at + at + wasm.call("args_sizes_get") + wasm.DROP + at + at + wasm.call("args_get") + wasm.DROP
        )
        code += (
            at
            + at
            + wasm.call("environ_sizes_get")
            + wasm.DROP
            + at
            + at
            + wasm.call("environ_get")
            + wasm.DROP
        )
        code += wasm.i32(0) + wasm.i64(0) + at + wasm.call("clock_time_get") + wasm.DROP
    # A buffer of a list that lies outside.
    code += wasm.i32(16) + wasm.i32(-9) + wasm.I32_STORE + wasm.i32(20) + wasm.i32(64) + wasm.I32_STORE
    code += wasm.i32(100) + wasm.i32(1) + wasm.i32(16) + wasm.i32(1) + wasm.i32(0) + wasm.call("fd_write")
    code += wasm.I32_STORE + wasm.write(1, 100, 4)
    functions.deploy("hostile", wasm.command(code))
    assert functions.invoke("hostile", b"payload") == (21).to_bytes(4, "little")  # EFAULT


def test_there_are_no_files_and_no_sockets(functions: Functions) -> None:
    zeros = wasm.i32(0) * 5 + wasm.i64(0) * 2 + wasm.i32(0) * 2
    code = wasm.i32(0) + zeros + wasm.call("path_open") + wasm.I32_STORE
    code += wasm.i32(4) + wasm.i32(3) + wasm.i32(0) * 2 + wasm.call("sock_accept") + wasm.I32_STORE
    code += wasm.i32(8) + wasm.i32(3) + wasm.i32(100) + wasm.call("fd_prestat_get") + wasm.I32_STORE
    functions.deploy("hostile", wasm.command(code + wasm.write(1, 0, 12)))
    errors = functions.invoke("hostile")
    assert [int.from_bytes(errors[at : at + 4], "little") for at in (0, 4, 8)] == [76, 8, 8]


def test_a_start_function_without_end_ends_too(functions: Functions) -> None:
    deploy(functions, wasm.ENDLESS, start=True, limits=FunctionLimits(fuel=50_000_000))
    with pytest.raises(FunctionLimit) as caught:
        functions.invoke("hostile")
    assert caught.value.limit == "fuel"


# A body that takes more fuel to compile than there is between two looks at the clock.
LARGE = (wasm.i32(0) + wasm.DROP) * 210_000


@pytest.mark.parametrize("way", ["as the first", "through a table"])
def test_a_large_function_is_called_as_any_other(functions: Functions, way: str) -> None:
    said = wasm.write(1, 0, 1)
    if way == "as the first":
        module = wasm.command(LARGE + said)
    else:
        indirect = wasm.i32(1) + b"\x11" + wasm.leb(wasm.START) + b"\x00"
        module = wasm.command(indirect + said, functions=[LARGE], table=2)
    functions.deploy("hostile", module)
    for _ in range(2):
        assert functions.invoke("hostile") == b"\0"


def test_a_function_whose_code_is_large_when_it_is_compiled_runs(functions: Functions) -> None:
    # It grows several times to more than a small piece of memory while it is made.
    code = b"".join(wasm.i32(8) + wasm.i32(number) + wasm.I32_STORE for number in range(10_000))
    deploy(functions, code + wasm.write(1, 8, 4))
    assert functions.invoke("hostile") == (9_999).to_bytes(4, "little")


# More than is burnt between two looks at the clock: what comes next in the block begins with nothing left.
BURN = (wasm.i32(0) + wasm.i32(60_000) + wasm.call("random_get") + wasm.DROP) * 9


def test_who_grows_where_a_slice_of_fuel_ends_was_not_refused_memory(functions: Functions) -> None:
    grow = wasm.i32(10) + wasm.GROW + wasm.DROP
    deploy(functions, BURN + grow + wasm.i32(3) + wasm.call("proc_exit"))
    with pytest.raises(FunctionFailed, match="exit code 3"):
        functions.invoke("hostile")


def test_a_table_that_grows_where_a_slice_of_fuel_ends_is_counted_once(functions: Functions) -> None:
    grow = wasm.i32(0) + b"\xd0\x70" + wasm.i32(60_000) + b"\xfc\x0f\x00" + wasm.I32_STORE
    deploy(functions, BURN + grow + wasm.write(1, 0, 4), table=4)
    assert functions.invoke("hostile") == (4).to_bytes(4, "little")


def vectors(pairs: list[tuple[int, int]]) -> bytes:
    return b"".join(struct.pack("<II", at, length) for at, length in pairs)


def write_list(count: int) -> bytes:
    """Write the list of buffers at 0 to stderr, and the errno to stdout."""
    code = wasm.i32(50_000) + wasm.i32(2) + wasm.i32(0) + wasm.i32(count) + wasm.i32(50_008)
    return code + wasm.call("fd_write") + wasm.I32_STORE + wasm.write(1, 50_000, 4)


FREE = {
    "environ_sizes_get": (wasm.i32(0) * 2 + wasm.call("environ_sizes_get") + wasm.DROP, b"", 10_000),
    "environ_get": (wasm.i32(0) * 2 + wasm.call("environ_get") + wasm.DROP, b"", 60_000),
    "empty buffers": (write_list(1024), b"", 1024),
    "a bad buffer behind good ones": (write_list(1024), vectors([(0, 0)] * 1023 + [(0, 1 << 31)]), 1024),
}


@pytest.mark.parametrize(("code", "data", "least"), FREE.values(), ids=FREE)
def test_what_the_host_does_costs_fuel_whatever_comes_of_it(
    functions: Functions, code: bytes, data: bytes, least: int
) -> None:
    functions.deploy("hostile", wasm.command(code, data=data))
    functions.invoke("hostile", env={"SOME": "x" * 60_000})
    assert functions.describe("hostile").fuel >= least


def test_buffers_that_are_more_than_an_answer_can_tell_are_refused(functions: Functions) -> None:
    pages = 65  # 1024 times over: more than 4 GiB
    data = vectors([(0, pages << 16)] * 1024)
    functions.deploy("hostile", wasm.command(write_list(1024), data=data, pages=pages))
    assert functions.invoke("hostile") == (28).to_bytes(4, "little")  # EINVAL


def test_tables_are_bounded(functions: Functions) -> None:
    deploy(functions, wasm.write(1, 0, 1), table=10_000_000)
    with pytest.raises(FunctionLimit) as caught:
        functions.invoke("hostile")
    assert caught.value.limit == "memory"


HELLO = wasm.printing(b"hello")
INVALID = {
    "empty": (b"", "0 bytes"),
    "text": (b"(module)", "no WebAssembly module"),
    "another version": (b"\0asm\x02\0\0\0" + HELLO[8:], ""),
    "a component": (b"\0asm\x0d\0\x01\0" + HELLO[8:], ""),
    "cut": (HELLO[:-3], "end"),
    "cut in the head": (HELLO[:6], ""),
    "an unknown section": (HELLO + wasm.section(99, b"x"), ""),
    "sections in another order": (HELLO[:8] + wasm.section(10, b"\0") + HELLO[8:], ""),
    "a section twice": (HELLO + wasm.section(5, wasm.vector([b"\0\x01"])), ""),
    "a type that is wrong": (wasm.command(wasm.i64(1) + wasm.I32_LOAD + wasm.DROP), ""),
    "an empty stack": (wasm.command(wasm.DROP), ""),
    "a local that is not there": (wasm.command(b"\x20\x05" + wasm.DROP), "local"),
    "a function that is not there": (wasm.command(wasm.call(99)), ""),
    "a label that is not there": (wasm.command(b"\x0c\x09"), ""),
    "SIMD": (wasm.command(b"\xfd\x0c" + bytes(16) + wasm.DROP), ""),
    "threads": (wasm.command(wasm.i32(0) + b"\xfe\x10\x02\x00" + wasm.DROP), ""),
    "a huge count": (b"\0asm\1\0\0\0" + wasm.section(1, b"\xff\xff\xff\xff\x0f"), ""),
    "huge locals": (wasm.command(b"", locals_=0xFFFF_FFFF), "locals"),
    "another import": (wasm.command(b"").replace(b"fd_write", b"fd_wrong"), "fd_wrong"),
    "another module's import": (
        wasm.command(b"").replace(b"wasi_snapshot_preview1", b"wasi_snapshot_previewX"),
        "X",
    ),
    "no _start": (wasm.command(b"").replace(b"_start", b"_begin"), "_start"),
}


@pytest.mark.parametrize(("module", "why"), INVALID.values(), ids=INVALID)
def test_what_is_no_module_is_refused_with_the_reason(functions: Functions, module: bytes, why: str) -> None:
    with pytest.raises(ModuleInvalid) as caught:
        functions.deploy("hostile", module)
    assert why in str(caught.value)
    assert functions.list() == []


def test_floats_are_computed_as_everywhere_else(functions: Functions) -> None:
    def store(at: int, expression: bytes) -> bytes:
        return wasm.i32(at) + expression + wasm.F64_STORE

    code = store(0, wasm.f64(0.1) + wasm.f64(0.2) + b"\xa0")
    code += store(8, wasm.f64(2.0) + b"\x9f")  # sqrt
    code += store(16, wasm.f64(-2.5) + b"\x9e")  # nearest
    code += store(24, wasm.f64(-0.5) + b"\x9b")  # ceil
    code += store(32, wasm.f64(5e-324) + wasm.f64(0.5) + b"\xa2")  # a denormal is not flushed early
    code += store(40, wasm.f64(1e-310) + wasm.f64(1e-310) + b"\xa0")
    functions.deploy("floats", wasm.command(code + wasm.write(1, 0, 48)))
    expected = struct.pack("<6d", 0.1 + 0.2, 2.0**0.5, -2.0, -0.0, 0.0, 2e-310)
    assert functions.invoke("floats") == expected


@pytest.mark.parametrize(
    "operation", [0x9B, 0x9C, 0x9D, 0x9E, 0x9F], ids=["ceil", "floor", "trunc", "nearest", "sqrt"]
)
def test_a_signalling_nan_comes_out_quiet(functions: Functions, operation: int) -> None:
    signalling = b"\x42" + wasm.sleb(0x7FF4_0000_0000_0001) + b"\xbf"
    code = wasm.i32(0) + signalling + bytes([operation]) + wasm.F64_STORE
    functions.deploy("floats", wasm.command(code + wasm.write(1, 0, 8)))
    (bits,) = struct.unpack("<Q", functions.invoke("floats"))
    assert bits & 0x7FF8_0000_0000_0000 == 0x7FF8_0000_0000_0000


def test_an_exit_code_is_told_with_the_end_of_stderr(functions: Functions) -> None:
    functions.deploy("exits", wasm.printing(b"lost", errors=b"first line\nwhat was wrong\n", code=3))
    with pytest.raises(FunctionFailed, match="exit code 3: what was wrong") as caught:
        functions.invoke("exits")
    assert (caught.value.exit_code, caught.value.stderr) == (3, b"first line\nwhat was wrong\n")
    functions.deploy("exits", wasm.printing(b"kept", code=0), replace=True)
    assert functions.invoke("exits") == b"kept"


def test_every_invocation_starts_anew(functions: Functions) -> None:
    count = wasm.i32(8) + wasm.i32(8) + wasm.I32_LOAD + wasm.i32(1) + b"\x6a" + wasm.I32_STORE
    functions.deploy("counts", wasm.command(count + wasm.write(1, 8, 4)))
    assert [functions.invoke("counts") for _ in range(3)] == [(1).to_bytes(4, "little")] * 3


def test_names_strings_and_limits_are_checked_where_they_are_given(functions: Functions) -> None:
    for name in ("", "a" * 64, ".hidden", "a/b", "ä", "a b"):
        with pytest.raises(BadArgument):
            functions.deploy(name, HELLO)
    with pytest.raises(BadArgument):
        functions.deploy("a", HELLO, env={"A=B": "c"})
    with pytest.raises(BadArgument):
        functions.deploy("a", HELLO, limits=FunctionLimits(memory=0))
    with pytest.raises(BadArgument):
        functions.invoke("a", args=["zero\0byte"])
    functions.deploy("a", HELLO)
    with pytest.raises(FunctionExists):
        functions.deploy("a", HELLO)
