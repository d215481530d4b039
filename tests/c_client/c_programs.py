"""C programs against the installed library, compiled with pkg-config; one of them is talked to."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from processes import end

import teemate

PREFIX = Path(os.environ.get("TEEMATE_TEST_C_LIBRARY") or Path(teemate.__file__).parent / "native" / "client")
"""Libraries and, below, the pkg-config file: the package's, or what `meson install` has put somewhere."""

EXTRA_FLAGS = os.environ.get("TEEMATE_TEST_C_FLAGS", "").split()
"""What programs are compiled with besides: sanitizers, when the library was."""

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "native" / "examples"


def flags(*arguments: str) -> list[str]:
    """What pkg-config says, or why not: skipped where the package was built without libcbor."""
    if not (PREFIX / "libteemate.a").exists():
        pytest.skip("the C library was not built with the package: that takes libcbor (Debian: libcbor-dev)")
    command = ["pkg-config", f"--with-path={PREFIX}/pkgconfig", *arguments, "teemate"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def compile_program(source: Path, output: Path, *, static: bool = False) -> Path:
    """Compile one file as a program of somebody else's would be, against the shared or the static library."""
    libraries = flags("--static", "--libs") if static else [*flags("--libs"), f"-Wl,-rpath,{PREFIX}"]
    if static:
        libraries = [part.replace("-lteemate", "-l:libteemate.a") for part in libraries]
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    subprocess.run(
        [
            compiler, "-std=gnu17", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-pthread", *EXTRA_FLAGS,
            *flags("--cflags"), str(source), *libraries, "-o", str(output),
        ],
        check=True,
    )  # fmt: skip
    return output


class Refused(Exception):  # noqa: N818
    """An error of the C library, with what it tells."""

    def __init__(self, line: str) -> None:
        code, status, vector, needed, rest = line.split(" ", 4)
        self.code = code
        self.status, self.vector, self.needed = int(status), int(vector), int(needed)
        self.limit, self.setting, self.text = rest.split("|", 2)
        super().__init__(f"{code}: {self.text}")


class Program:
    """interpreter.c as a process; its errors are :class:`Refused` here."""

    def __init__(self, program: Path, environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let it end; sanitizers judge by its status."""
        status = end(self._process)
        if kind is None:
            assert status == 0

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()

    def say(self, *words: object) -> None:
        """Give a command whose answer is fetched later."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()

    def answer(self) -> list[str]:
        """Wait for the answer of the command before."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the program ended (status {self._process.poll()})"
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "error":
            raise Refused(rest)
        assert word == "ok"
        return rest.split()

    def do(self, *words: object) -> list[str]:
        """Give a command and wait for its answer."""
        self.say(*words)
        return self.answer()

    # ---- the same with less writing -----------------------------------------------------

    def connect(self, path: str, name: str = "c-program") -> None:
        self.do("connect", path, name)

    def attach(self, name: str, slots: int = 1, wait: int = 10000) -> int:
        """Return the number by which the program knows the grant."""
        return int(self.do("attach", name, slots, wait)[0])

    def take(self, grant: int = 0, wait: int = 10000) -> int:
        """Return the number by which the program knows the lease."""
        return int(self.do("take", grant, wait)[0])

    def call(
        self, lease: int, name: str, payload: bytes = b"", timeout: int = -1, room: int = 65536
    ) -> bytes:
        """Do an ECALL without OCALLs."""
        answer = self.do("call", lease, name, payload.hex() or "-", timeout, room)
        return bytes.fromhex(answer[0]) if answer else b""

    def number(self, *words: object) -> int:
        return int(self.do(*words)[0])
