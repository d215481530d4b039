"""``functions``: a function in the shared enclave, in an enclave for each process, and in none.

The same small C program (native/bench/function.c) starts all three sides and waits for the first byte: a
program that invokes the function in the enclave that is there, one that builds an enclave of the same image
for itself (the conventional confidential container), and the function's C source compiled for this processor.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple, final

from teemate._broker import connect
from teemate.bench._db_ways import enclave_files
from teemate.bench._measured import Measured, Side, by_turns
from teemate.bench._rows import Result, Row, Series, measured, plain
from teemate.bench._setting import MIB, Setting
from teemate.demo._memory import children, pss_outside
from teemate.demo._prepare import ENCLAVE
from teemate.errors import BuildFailed, InternalError, Unsupported
from teemate.wasm import build_module, find_compiler

__all__ = ["bench_functions", "functions_lack"]

PROGRAM = Path(__file__).resolve().parents[1] / "libexec" / "teemate-function"
"""There when the C library was built."""
_EXAMPLES = Path(__file__).resolve().parents[1] / "native" / "examples" / "functions"
_IMAGE = Path(__file__).resolve().parents[1] / "images" / "functions.sgxs"
_EXAMPLE = "sha256"
_PAYLOAD = b"what a function is given to start with"
_NOTHING = bytes.fromhex(
    "0061736d01000000010401600000030201000503010001071302066d656d6f72790200065f737461727400000a040102000b"
)
"""A command that does nothing."""
_HEAP = 64 * MIB
_AT = 16
"""Programs of the memory's figure."""
_COUNTS = (1, 2, 4, 8, 16, 32, 64)
_QUICK = (1, _AT)
_PAGE = 4096
SHARED, PRIVATE, NATIVE = "shared", "private", "native"
_NAMES = {SHARED: "one shared enclave", PRIVATE: "one enclave each", NATIVE: "no enclave"}


class _Function(NamedTuple):
    """What is invoked, and its twin without an enclave."""

    module: Path
    native: Path | None


def functions_lack() -> str:
    """Return what the benchmark needs that is not there, or nothing."""
    if not PROGRAM.is_file():
        return "the C program was not built, since libcbor is missing"
    if not _IMAGE.is_file():
        return "their enclave was not built, since there was no cargo"
    try:
        find_compiler()
    except BuildFailed:
        return "their compiler is missing: pip install 'teemate[fn]'"
    return ""


def bench_functions(setting: Setting) -> Result:
    """Start, invoke, and look at memory."""
    with ExitStack() as stack:
        sides = _Sides(stack, setting)
        rows = [*_cold(setting, sides), *_warm(setting, sides)]
        kept, memory = _memory(setting, sides)
    return Result((*rows, *kept), memory)


@final
class _Sides:
    """A broker with one enclave for all, the same image for an enclave each, and a program without one."""

    def __init__(self, stack: ExitStack, setting: Setting) -> None:
        if not PROGRAM.is_file():
            raise Unsupported("`bench functions` needs a C program that was not built: libcbor is missing")
        folder = setting.new_folder("functions")
        self._setting = setting
        self.slots = max(_QUICK if setting.quick else _COUNTS)
        self._image = setting.functions_image(heap=_HEAP, slots=self.slots)
        self.broker = stack.enter_context(setting.broker(self._image, clients=self.slots + 2))
        self._payload = folder / "payload"
        self._payload.write_bytes(_PAYLOAD)
        self._function = _build(setting, folder)
        nothing = folder / "nothing.wasm"
        nothing.write_bytes(_NOTHING)
        with connect(self.broker.socket, client="bench") as broker:
            functions = broker.functions_of(ENCLAVE)
            functions.deploy(_EXAMPLE, self._function.module.read_bytes())
            functions.deploy("nothing", _NOTHING)
            answer = functions.invoke(_EXAMPLE, _PAYLOAD)
        if hashlib.sha256(_PAYLOAD).hexdigest().encode() not in answer:
            raise InternalError(f"the function {_EXAMPLE} answers {answer!r}")
        self.names = (SHARED, PRIVATE, NATIVE) if self._function.native else (SHARED, PRIVATE)

    def _words(self, way: str, name: str = _EXAMPLE) -> list[str]:
        if way == SHARED:
            return [str(PROGRAM), way, self.broker.socket, ENCLAVE, name, str(self._payload)]
        if way == PRIVATE:
            image = [str(self._image.sgxs), str(self._image.sigstruct), self._setting.backend]
            return [str(PROGRAM), way, *image, str(self._function.module), str(self._payload)]
        return [str(self._function.native)]

    def launcher(self, way: str) -> Measured:
        """Return what starts the program of one side again and again, to be entered."""
        first = [] if way == NATIVE else ["--first"]
        command = [str(PROGRAM), "launch", str(self._payload), *self._words(way), *first]
        return Measured(f"launching: {_NAMES[way]}", command)

    def program(self, way: str, name: str = _EXAMPLE) -> Measured:
        """Return a program that stays, to be entered."""
        return Measured(f"{PROGRAM.name} {way}", self._words(way, name))

    def memory(self, way: str, programs: Sequence[Measured]) -> int:
        """Return the bytes that they take, with what serves them: as ``bench memory`` counts."""
        pids = [program.pid for program in programs]
        pages = self._image.pages * (1 if way == SHARED else len(pids))
        if way == SHARED:
            pids += [self.broker.keeper, *children(self.broker.keeper)]
        return pages * _PAGE + sum(pss_outside(pid, enclave_files(pid)) for pid in pids)


def _build(setting: Setting, folder: Path) -> _Function:
    source = _EXAMPLES / f"{_EXAMPLE}.c"
    setting.listener.phase(f"compiling the example {_EXAMPLE}")
    module = build_module([source], folder / f"{_EXAMPLE}.wasm").path
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler) is None:
        setting.listener.phase("the native program is left out: there is no C compiler")
        return _Function(module, None)
    native = folder / _EXAMPLE
    command = [compiler, "-O2", "-D_GNU_SOURCE", str(source), "-o", str(native), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a list, no shell
    if done.returncode:
        raise InternalError(f"{compiler} could not compile {source}: {done.stderr}")
    return _Function(module, native)


def _cold(setting: Setting, sides: _Sides) -> list[Row]:
    with ExitStack() as stack:
        launchers = {way: stack.enter_context(sides.launcher(way)) for way in sides.names}
        turns: dict[str, Side] = {way: partial(launcher.ask, "launch") for way, launcher in launchers.items()}
        for turn in turns.values():
            turn()
        found = by_turns(turns, setting.times(100, 25), setting.listener, "starting programs")
    rows = [measured(f"fn_cold_{way}", sample, unit="ms") for way, sample in found.items()]
    ours = found[SHARED]
    ratio = found[PRIVATE].p50 / ours.p50
    rows.append(
        plain("fn_cold_start_ratio", ratio, "times", n=ours.n, relative_to="fn_cold_shared", ratio=ratio)
    )
    if NATIVE in found:
        ratio = ours.p50 / found[NATIVE].p50
        rows.append(
            plain("fn_cold_vs_native", ratio, "times", n=ours.n, relative_to="fn_cold_native", ratio=ratio)
        )
    return rows


def _warm(setting: Setting, sides: _Sides) -> list[Row]:
    with ExitStack() as stack:
        trivial = stack.enter_context(sides.program(SHARED, "nothing"))
        example = stack.enter_context(sides.program(SHARED))
        for program in (trivial, example):
            program.ask("hold", 50)
        turns: dict[str, Side] = {
            "empty": lambda: trivial.ask("empty", 20),
            "nothing": lambda: trivial.ask("invoke", 20),
            "example": lambda: example.ask("invoke", 20),
        }
        found = by_turns(turns, setting.times(60, 25), setting.listener, "invocations of what is warm")
    empty, nothing = found["empty"], found["nothing"]
    ratio = nothing.p50 / empty.p50
    return [
        measured("fn_empty_call", empty),
        measured("fn_warm_nothing", nothing),
        measured(f"fn_warm_{_EXAMPLE}", found["example"]),
        plain("fn_warm_vs_empty_call", ratio, "times", n=nothing.n, relative_to="fn_empty_call", ratio=ratio),
    ]


def _memory(setting: Setting, sides: _Sides) -> tuple[list[Row], tuple[Series, ...]]:
    counts = _QUICK if setting.quick else _COUNTS
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for way in (SHARED, PRIVATE):
        setting.listener.phase(f"memory: {_NAMES[way]}", counts[-1])
        with ExitStack() as stack:
            programs: list[Measured] = []
            for number in range(1, counts[-1] + 1):
                program = stack.enter_context(sides.program(way))
                program.ask("hold")
                programs.append(program)
                setting.listener.progress(number)
                if number in counts:
                    found[way][number] = sides.memory(way, programs)
    rows = [
        plain(f"fn_memory_{way}_{count}", taken / MIB, "MiB")
        for way, each in found.items()
        for count, taken in each.items()
    ]
    ratio = found[PRIVATE][_AT] / found[SHARED][_AT]
    rows.append(plain("fn_memory_ratio", ratio, "times", relative_to=f"fn_memory_shared_{_AT}", ratio=ratio))
    return rows, tuple(
        Series(_NAMES[way], tuple((count, taken / MIB) for count, taken in each.items()))
        for way, each in reversed(found.items())
    )
