"""Lead broker and programs through the demonstration and return what was measured."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import trio

from teemate._backend import choose_backend
from teemate._trio import open_broker
from teemate.demo._figures import Figures, quantiles
from teemate.demo._memory import Mapped, children, distinct, pss_outside
from teemate.demo._prepare import ENCLAVE, DemoImage, prepare_image, run_broker
from teemate.demo._program import Program
from teemate.errors import InternalError

__all__ = ["Listener", "run_demo"]

READY_TIMEOUT = 120.0
INSIDE_TIMEOUT = 300.0
END_TIMEOUT = 30.0
MIB = 1 << 20


class Listener(Protocol):
    """Hears how far the demonstration is."""

    def phase(self, text: str, total: int = 0) -> None:
        """Begin a phase of `total` calls; 0: not countable."""

    def progress(self, done: int) -> None:
        """Hear that `done` calls of the phase are done, all programs together."""


class _Side(NamedTuple):
    """One way of doing the work."""

    times: list[float]
    """Milliseconds until the first reply."""
    inside: list[dict[str, Any]]
    done: list[dict[str, Any]]
    counters: list[int]
    pss: int
    """Bytes outside the enclaves, plus every enclave once."""
    pages: int


def run_demo(*, clients: int, calls: int, heap: int, backend: str, listener: Listener) -> Figures:
    """Run both ways and return the figures.

    Everything that is started is ended again, also on Ctrl-C.  Raises what went wrong; failures
    inside the enclave are counted in the result.
    """
    choose_backend(backend)  # what cannot work is said before anything is started
    return trio.run(lambda: _run(clients, calls, heap, backend, listener))


async def _run(clients: int, calls: int, heap: int, backend: str, listener: Listener) -> Figures:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="teemate-demo-") as name:
        folder = Path(name)
        listener.phase("laying out and signing the vault")
        image = await trio.to_thread.run_sync(lambda: prepare_image(folder, heap=heap, clients=clients))
        listener.phase("the broker builds the shared enclave")
        async with run_broker(folder, image, backend=backend, clients=clients) as broker:
            async with open_broker(broker.path, client="teemate demo") as connection:
                (info,) = await connection.enclaves()
            arguments = ["shared", "--socket", broker.path, "--enclave", ENCLAVE]
            shared = await _side(
                "shared", arguments, clients, calls, listener, [broker.pid, *children(broker.pid)]
            )
        arguments = ["private", "--image", str(image.sgxs), "--sigstruct", str(image.sigstruct)]
        arguments += ["--backend", info.backend]
        private = await _side("conventional", arguments, clients, calls, listener, [])
        arguments = ["floor", "--image", str(image.sgxs), "--hashed", str(image.measured)]
        arguments += ["--pages", str(private.pages // clients)]
        floor = await _floor(arguments, clients, listener)
    _check_measurements(image, info.mrenclave, [*shared.inside, *private.inside])
    attach = quantiles(shared.times)
    conventional = quantiles(private.times)
    done = [*shared.done, *private.done]
    return Figures(
        backend=info.backend,
        image=ENCLAVE,
        mrenclave=image.mrenclave.hex(),
        clients=clients,
        calls=calls,
        calls_total=sum(message["calls"] for message in done),
        failures=sum(message["failures"] for message in done),
        counter_expected=sum(message["increments"] for message in shared.done),
        counter=shared.counters[0],
        attach_ms=attach,
        conventional_ms=conventional,
        floor_ms=quantiles(floor),
        latency_ratio=round(conventional.p50 / attach.p50, 2),
        epc_pages_shared=shared.pages,
        epc_pages_conventional=private.pages,
        memory_ratio=round(private.pages / shared.pages, 2),
        pss_mib_shared=round(shared.pss / MIB, 1),
        pss_mib_conventional=round(private.pss / MIB, 1),
        heap_bytes=heap,
        errors=tuple(error for message in done for error in message["errors"])[:5],
        private_counters_match=all(
            message["increments"] == counter
            for message, counter in zip(private.done, private.counters, strict=True)
        ),
        seconds=round(time.monotonic() - start, 1),
    )


@asynccontextmanager
async def _programs(
    way: str, arguments: Sequence[str], count: int, calls: int
) -> AsyncGenerator[list[Program], None]:
    """Start `count` programs that are ready to go; they are ended in any case."""
    programs: list[Program] = []
    try:
        for index in range(count):
            own = ["--index", str(index), "--clients", str(count), "--calls", str(calls)]
            programs.append(await Program.start(f"program {index} ({way})", [*arguments, *own]))
        for program in programs:
            await program.hear("ready", READY_TIMEOUT)
        yield programs
    finally:
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for program in programs:
                    nursery.start_soon(program.end)


async def _side(
    way: str,
    arguments: Sequence[str],
    clients: int,
    calls: int,
    listener: Listener,
    service: Sequence[int],
) -> _Side:
    listener.phase(f"{way}: {clients} programs start")
    async with _programs(way, arguments, clients, calls) as programs:
        listener.phase(f"{way}: one after the other comes inside, and stays")
        times = [await _come_inside(program) for program in programs]
        for program in programs:
            await program.tell("prepare")
        inside = [await program.hear("prepared", INSIDE_TIMEOUT) for program in programs]
        # All are attached now: that is when memory counts.
        enclaves = [
            Mapped(
                pid=program.pid,
                fd=message["fd"],
                file=(message["file"][0], message["file"][1]),
                device=message["backend"] == "sgx",
                pages=message["pages"],
            )
            for program, message in zip(programs, inside, strict=True)
        ]
        files = {enclave.file for enclave in enclaves}
        pss = sum(pss_outside(pid, files) for pid in [*(program.pid for program in programs), *service])
        pages = sum(enclave.pages for enclave in distinct(enclaves))
        listener.phase(f"{way}: {clients} x {calls} calls", clients * calls)
        done = await _work(programs, calls, listener)
        counters = []
        for program in programs:
            await program.tell("count")
            counters.append((await program.hear("counted", END_TIMEOUT))["counter"])
        for program in programs:
            await program.tell("quit")
        for program in programs:
            await program.finish(END_TIMEOUT)
    return _Side(times, inside, done, counters, pss + pages * 4096, pages)


async def _come_inside(program: Program) -> float:
    await program.tell("go")
    milliseconds: float = (await program.hear("inside", INSIDE_TIMEOUT))["ms"]
    return milliseconds


async def _work(programs: Sequence[Program], calls: int, listener: Listener) -> list[dict[str, Any]]:
    reached = [0] * len(programs)
    done: list[dict[str, Any]] = [{}] * len(programs)

    async def follow(index: int) -> None:
        def progress(count: int) -> None:
            reached[index] = count
            listener.progress(sum(reached))

        timeout = INSIDE_TIMEOUT + calls * 0.1
        done[index] = await programs[index].hear("done", timeout, progress)
        progress(calls)

    for program in programs:
        await program.tell("work")
    try:
        async with trio.open_nursery() as nursery:
            for index in range(len(programs)):
                nursery.start_soon(follow, index)
    except BaseExceptionGroup as group:
        # One program's trouble ends the others; Ctrl-C counts for more than what it caused.
        raise _first(group) from None
    return done


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    interrupts, rest = group.split(KeyboardInterrupt)
    one = (interrupts or rest or group).exceptions[0]
    return _first(one) if isinstance(one, BaseExceptionGroup) else one


async def _floor(arguments: Sequence[str], clients: int, listener: Listener) -> list[float]:
    listener.phase("the floor: the same memory and hashing, without an enclave")
    async with _programs("floor", arguments, clients, 0) as programs:
        times = [await _come_inside(program) for program in programs]
        for program in programs:
            await program.finish(END_TIMEOUT)
    return times


def _check_measurements(image: DemoImage, broker: bytes, inside: Sequence[dict[str, Any]]) -> None:
    """Measured from the file, told by the broker, and reported by EREPORT inside: all the same."""
    wanted = image.mrenclave.hex()
    told = {broker.hex(), *(message["mrenclave"] for message in inside), *(m["reported"] for m in inside)}
    if told != {wanted}:
        raise InternalError(f"the image measures {wanted}, but broker and enclaves say {sorted(told)}")
