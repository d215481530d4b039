"""Create, map, enter and leave the smallest enclave, in a child: whatever happens to it is an answer.

A fork, not another program: starting Python anew takes most of the time that a person waits for.
The child does nothing but this and ends without cleaning up what is its parent's.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from importlib import resources
from pathlib import Path
from typing import final

from teemate._private import create_enclave
from teemate.doctor._host import ProbeResult
from teemate.errors import Error

__all__ = ["Probe", "run_enclave"]

_EEXIT = 4
_MOST_TEXT = 4096


def run_enclave(backend: str) -> str:
    """Run the enclave that only leaves, and say how long it took.

    Raises :class:`~teemate.errors.Error` with what failed.
    """
    folder = resources.files("teemate") / "images"
    image, sigstruct = folder / "bare.sgxs", folder / "bare.sig"
    if not (isinstance(image, Path) and isinstance(sigstruct, Path) and image.is_file()):
        raise Error("TeeMate was installed without its image bare.sgxs: install it again")
    start = time.perf_counter()
    with create_enclave(image, sigstruct, backend=backend) as enclave:
        with enclave.slot() as slot:
            function = slot.enter().function
    elapsed = time.perf_counter() - start
    if function != _EEXIT:
        raise Error(f"the enclave was left by leaf {function} instead of EEXIT")
    return f"an enclave was created, mapped, entered and left in {elapsed * 1e3:.1f} ms"


@final
class Probe:
    """One trial under way in a child of this process; :meth:`result` ends it in any case."""

    def __init__(self, backend: str) -> None:
        self._out, end = os.pipe2(os.O_CLOEXEC)
        self._pid = os.fork()
        if self._pid == 0:
            _child(backend, end)
        os.close(end)

    def result(self, deadline: float, patience: float) -> ProbeResult:
        """Return how it went; who is not done at `deadline` (time.monotonic) is killed."""
        said = b""
        late = False
        try:
            poll = select.poll()
            poll.register(self._out, select.POLLIN)
            while not late:
                late = not poll.poll(max(deadline - time.monotonic(), 0) * 1000)
                part = b"" if late else os.read(self._out, _MOST_TEXT)
                if not part:
                    break
                said += part
        finally:
            os.close(self._out)
            os.kill(self._pid, signal.SIGKILL)  # it has said all, or nothing in time
            _, status = os.waitpid(self._pid, 0)
        text = said[1:].decode(errors="replace")
        if said:
            return ProbeResult(works=said[:1] == b"+", text=text)
        if late:
            return ProbeResult(
                works=False, text=f"the enclave was not created, entered and left in {patience:g} s"
            )
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        how = f"by signal {number} ({signal.strsignal(number)})" if number else "without a word"
        return ProbeResult(works=False, text=f"the process that tried was ended {how}")


def _child(backend: str, end: int) -> None:
    """Write + or - and the text, and end."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an answer, not something to keep
        try:
            said = "+" + run_enclave(backend)
        except Error as error:
            said = f"-{error.message}"
        except Exception as error:
            said = f"-{type(error).__name__}: {error}"
        os.write(end, said.encode()[:_MOST_TEXT])
    finally:
        os._exit(0)
