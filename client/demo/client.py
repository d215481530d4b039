"""One program of the demonstration: ``python -m teemate.demo.client``.

It is told on its standard input when to start each phase and answers on its standard output, one
JSON object in a line.  With the other programs it shares nothing but the broker's socket.

    go      come inside (attach, or build an enclave of its own) and make the first call
    prepare put what the others will read, and tell about the enclave
    work    do the calls
    count   read the counter, when all are done
    quit    leave

The clock runs from "go": imports are over then, both ways.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from teemate import Error
from teemate._broker import connect
from teemate._enclave import Enclave
from teemate._native import ffi, lib
from teemate._private import create_enclave
from teemate.demo._vault import Work

__all__ = ["main"]


def main() -> int:
    """Run the phases; returns the exit status."""
    parser = argparse.ArgumentParser(prog="teemate.demo.client")
    parser.add_argument("way", choices=("shared", "private", "floor"))
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--calls", type=int, required=True)
    parser.add_argument("--socket")
    parser.add_argument("--enclave")
    parser.add_argument("--image")
    parser.add_argument("--sigstruct")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--pages", type=int, default=0)
    parser.add_argument("--hashed", type=int, default=0)
    options = parser.parse_args()
    _say(event="ready", pid=os.getpid())
    try:
        if not _told("go"):
            return 1
        if options.way == "floor":
            _say(event="inside", ms=_floor(options.image, options.pages, options.hashed))
            return 0
        if options.way == "shared":
            start = time.perf_counter_ns()
            broker = connect(options.socket, client=f"demo {options.index}")
            with broker, broker.attach(options.enclave, wait=30.0) as enclave:
                _inside(enclave, options, start)
            return 0
        start = time.perf_counter_ns()
        with create_enclave(options.image, options.sigstruct, options.backend) as enclave:
            _inside(enclave, options, start)
    except Error as error:
        _say(event="error", code=error.code, message=error.message)
        return 1
    return 0


def _inside(enclave: Enclave, options: argparse.Namespace, start: int) -> None:
    with enclave.slot() as slot:
        work = Work(slot, index=options.index, clients=options.clients, alone=options.way == "private")
        work.first()
        # Nothing else now: the others may still be on their way in.
        _say(event="inside", ms=(time.perf_counter_ns() - start) / 1e6)
        if not _told("prepare"):
            return
        work.prepare()
        status = os.fstat(lib.teemate_enclave_fd(enclave._handle()))
        _say(
            event="prepared",
            pages=enclave.pages(),
            fd=lib.teemate_enclave_fd(enclave._handle()),
            file=[status.st_dev, status.st_ino],
            backend=_backend(enclave),
            mrenclave=enclave.mrenclave.hex(),
            reported=work.measurement().hex(),
        )
        if not _told("work"):
            return
        for done in work.run(options.calls):
            _say(event="progress", calls=done)
        _say(
            event="done",
            calls=work.calls,
            failures=len(work.failures),
            errors=work.failures[:5],
            increments=work.increments,
            counter=work.counter(),
        )
        if not _told("count"):
            return
        _say(event="counted", counter=work.counter())
        _told("quit")


def _backend(enclave: Enclave) -> str:
    info = ffi.new("struct teemate_enclave_info *")
    lib.teemate_enclave_describe(enclave._handle(), info)
    return {lib.TEEMATE_SIM: "sim", lib.TEEMATE_SGX: "sgx"}[info.backend]


def _floor(image: str, pages: int, hashed: int) -> float:
    """Allocate and clear `pages` of shared memory and hash `hashed` bytes; returns milliseconds.

    fallocate() does it without a page fault for each, which is as fast as it can be done.
    """
    digest = ffi.new("uint8_t[32]")
    with open(image, "rb") as file:
        data = file.read(hashed)
    start = time.perf_counter_ns()
    lib.teemate_sha256(data, len(data), digest)
    fd = os.memfd_create("teemate-floor")
    os.posix_fallocate(fd, 0, pages * 4096)
    elapsed = (time.perf_counter_ns() - start) / 1e6
    os.close(fd)
    return elapsed


def _say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _told(word: str) -> bool:
    """Wait for the next word; False when it is another one, or whoever leads is gone."""
    return sys.stdin.readline().strip() == word


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:
        os._exit(1)  # whoever leads is gone; an exit would write what is buffered
