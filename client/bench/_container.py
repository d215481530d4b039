"""``container``: from the start of a container to its first reply from inside an enclave.

The same container each time, by runc, with everything on the disk already: one attaches to the broker's
enclave, the other builds its own as a container does today.  What the container itself costs, with a program
that does nothing, is told beside them: no enclave can be there sooner.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time
from pathlib import Path
from typing import final

from teemate.bench._broker import BenchBroker
from teemate.bench._measured import Side, by_turns
from teemate.bench._oci import SOCKET_FOLDER, Rights, Root, config, program_root, python_root, runc_program
from teemate.bench._rows import Result, Row, compared, measured, plain
from teemate.bench._setting import C_SUBJECT, Setting
from teemate.demo._prepare import DemoImage
from teemate.errors import InternalError

__all__ = ["bench_container"]

_DEVICE = Path("/dev/sgx_enclave")
_CLOCK = "import time; print(time.monotonic_ns())"


@final
class _Cold:
    """One kind of container, started anew for each measurement."""

    _numbers = itertools.count()

    def __init__(
        self,
        setting: Setting,
        root: Root,
        arguments: list[str],
        *,
        socket: str | None = None,
        device: Path | None = None,
    ) -> None:
        self._runc = runc_program()
        self._bundle = setting.new_folder("bundle")
        self._state = setting.new_folder("runc")
        content = config(root, arguments, socket=socket, rights=Rights(uid=os.getuid(), device=device))
        (self._bundle / "config.json").write_text(json.dumps(content))

    def __call__(self) -> list[float]:
        """Return the nanoseconds until the program in it has said what the clock was."""
        name = f"teemate-bench-{os.getpid()}-{next(self._numbers)}"
        command = [self._runc, "--root", str(self._state), "run", "--bundle", str(self._bundle), name]
        start = time.monotonic_ns()
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - runc
        if done.returncode or not done.stdout.strip().isdecimal():
            raise InternalError(
                f"a container ended with status {done.returncode}: {done.stdout}{done.stderr}"
            )
        return [int(done.stdout) - start]  # the monotonic clock is the same in there


def bench_container(setting: Setting) -> Result:
    """Start containers by turns; needs root and runc."""
    runc_program()
    image = setting.image()
    root = python_root(setting.new_folder("root") / "python", image.sgxs.parent)
    with setting.broker(image) as broker:
        sides: dict[str, Side] = {
            "empty": _Cold(setting, root, ["python", "-c", _CLOCK]),
            "shared": _Cold(setting, root, _attaching(broker), socket=broker.socket),
            "private": _building(setting, root, image),
        }
        in_c = setting.c_attaching(broker)
        if in_c is not None:
            bare = program_root(setting.new_folder("root") / "bare", C_SUBJECT)
            arguments = ["/program", _inside(broker), *in_c[2:], "--first"]
            sides["shared, C"] = _Cold(setting, bare, arguments, socket=broker.socket)
        found = by_turns(sides, setting.times(20, 5), setting.listener, "containers that start")
    conventional, shared = found["private"], found["shared"]
    rows: list[Row] = [
        measured("container_empty", found["empty"], unit="ms"),
        measured("container_conventional", conventional, unit="ms"),
        compared("container_attach", shared, conventional, "container_conventional", unit="ms"),
        plain(
            "container_ratio", conventional.p50 / shared.p50, "times",
            n=shared.n, relative_to="container_attach",
        ),
        plain(
            "container_enclave_ratio",
            (conventional.p50 - found["empty"].p50) / max(1.0, shared.p50 - found["empty"].p50), "times",
            n=shared.n, relative_to="container_attach",
        ),
    ]  # fmt: skip
    if "shared, C" in found:
        rows += [
            compared(
                "container_attach_c", found["shared, C"], conventional, "container_conventional", unit="ms"
            ),
            plain(
                "container_ratio_c", conventional.p50 / found["shared, C"].p50, "times",
                n=shared.n, relative_to="container_attach_c",
            ),
        ]  # fmt: skip
    return Result(tuple(rows))


def _attaching(broker: BenchBroker) -> list[str]:
    return ["python", *Setting.attaching(broker)[1:], "--socket", _inside(broker), "--first", "cold"]


def _inside(broker: BenchBroker) -> str:
    """Where the socket is for a container."""
    return str(SOCKET_FOLDER / Path(broker.socket).name)


def _building(setting: Setting, root: Root, image: DemoImage) -> Side:
    device = _DEVICE if setting.backend == "sgx" else None
    return _Cold(setting, root, ["python", *setting.building(image)[1:], "--first", "private"], device=device)
