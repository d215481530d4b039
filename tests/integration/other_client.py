"""Another client: a process of its own that does what the test tells it, one step at a time.

One process can map an enclave once, so whoever is to be its neighbour is another process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self


class OtherClient:
    """Steps of the other process; an error there is raised here as its type."""

    def __init__(self, socket: str, enclave: str, slots: int = 1) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, socket, enclave, str(slots)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        attached = self._answer()
        self.grant: int = attached["grant"]
        self.slots: list[int] = attached["slots"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let it detach and end."""
        from processes import end  # this file is the other program too, which has not the path to that

        status = end(self._process)
        if kind is None:
            assert status == 0

    def call(self, name: str, payload: bytes = b"") -> bytes:
        """Do an ECALL in its slot."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, payload.hex()]) + "\n")
        self._process.stdin.flush()
        return bytes.fromhex(self._answer()["reply"])

    def _answer(self) -> dict[str, Any]:
        from teemate.errors import from_code

        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the other client ended"
        answer: dict[str, Any] = json.loads(line)
        if "code" in answer:
            raise from_code(answer["code"], answer["message"])
        return answer


def main() -> None:
    import teemate

    def say(**answer: object) -> None:
        print(json.dumps(answer), flush=True)

    socket, name, slots = sys.argv[1:]
    with ExitStack() as stack:
        try:
            connection = stack.enter_context(teemate.connect(socket, client="other"))
            enclave = stack.enter_context(connection.attach(name, slots=int(slots)))
            held = [slot.slot for slot in enclave._unopened]
            slot = stack.enter_context(enclave.slot())
        except teemate.Error as error:
            say(code=error.code, message=error.message)
            return
        say(grant=enclave.grant, slots=held)
        for line in sys.stdin:
            call, payload = json.loads(line)
            try:
                say(reply=slot.call(call, bytes.fromhex(payload), timeout=60).hex())
            except teemate.Error as error:
                say(code=error.code, message=error.message)


if __name__ == "__main__":
    main()
