"""What one client's connection can do to a worker: the server is hypercorn's, the functions are played."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import math
import os
import socket
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trio
import trio.testing
from played_functions import Client
from running_gateway import DEADLINE

from teemate.functions import FunctionLimit

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hypercorn") is None, reason="needs hypercorn: pip install 'teemate[gateway]'"
)


@contextlib.asynccontextmanager
async def connected(client: Client, **options: Any) -> AsyncGenerator[trio.SocketStream, None]:
    """Connect to `client`'s gateway; when the block ends, the server has to be done with the connection."""
    from hypercorn.app_wrappers import ASGIWrapper
    from hypercorn.config import Config
    from hypercorn.trio.worker_context import WorkerContext
    from hypercorn.typing import ConnectionState

    from teemate.gateway.connection import Connection

    ours, theirs = (
        trio.SocketStream(trio.socket.from_stdlib_socket(end))
        for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    )
    config = Config()
    for name, value in options.items():
        setattr(config, name, value)

    async def hang_up() -> None:
        try:
            await trio.sleep_forever()
        finally:  # when time is over, the server may wait where it cannot be cancelled
            await trio.aclose_forcefully(ours)

    with trio.fail_after(DEADLINE):
        async with ours, trio.open_nursery() as around:
            around.start_soon(hang_up)
            application = ASGIWrapper(client.gateway)
            server = Connection(
                client.log,
                client.gateway.admission,
                application,
                config,
                WorkerContext(None),
                ConnectionState({}),
                theirs,
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.run)
                yield ours
            around.cancel_scope.cancel()


async def read_all(stream: trio.SocketStream) -> bytes:
    return b"".join([piece async for piece in stream])


CHUNKS = b"GET /healthz HTTP/1.1\r\nHost: here\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("end", [b"0\r\n\r\n", b""], ids=["whole", "unfinished"])
async def test_a_body_where_none_belongs_is_answered_and_its_connection_ends(end: bytes) -> None:
    client = Client()
    client.broker_waits = trio.Event()
    async with connected(client) as stream:
        await stream.send_all(CHUNKS + 20 * b"1\r\nx\r\n" + end)  # more than the server keeps for us
        await trio.testing.wait_all_tasks_blocked()
        client.broker_waits.set()
        assert (await read_all(stream)).startswith(b"HTTP/1.1 200")


async def test_a_client_that_leaves_before_its_answer_leaves_nothing_behind() -> None:
    client = Client()
    client.broker_waits = trio.Event()
    async with connected(client) as stream:
        await stream.send_all(CHUNKS + 20 * b"1\r\nx\r\n")
        await trio.testing.wait_all_tasks_blocked()
        await stream.aclose()
        client.broker_waits.set()


async def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from teemate.gateway import connection

    monkeypatch.setattr(connection, "SEND_SECONDS", 0.1)
    client = Client()
    size = 4 << 20  # more than the kernel keeps for us
    head = "POST /fn/echo HTTP/1.1", "Host: here", "Connection: close", f"Content-Length: {size}", "", ""
    async with connected(client) as stream:
        await stream.send_all("\r\n".join(head).encode())
        await stream.send_all(bytes(size))
    assert client.functions.calls


async def test_a_connection_that_the_server_cannot_serve_ends_alone() -> None:
    from h2.config import H2Configuration
    from h2.connection import H2Connection

    client = Client()
    peer = H2Connection(H2Configuration(client_side=True, validate_outbound_headers=False))
    peer.initiate_connection()
    head = [(":method", "GET"), (":scheme", "http"), (":authority", "here"), (":path", b"/\xff")]
    peer.send_headers(1, head, end_stream=True)
    async with connected(client) as stream:
        await stream.send_all(peer.data_to_send())
        await read_all(stream)
    assert [record.kwargs["event"] for record in client.records.calls] == ["connection failed"]


LARGE = 4 << 20
"""More than the server and the kernel keep for us."""
LAST_CHUNK = b"0\r\n\r\n"


def streaming(name: str, length: int, *headers: str, timeout: str = "999999") -> bytes:
    lines = f"POST /fn/{name} HTTP/1.1", "Host: here", "TeeMate-Stream: 1", f"TeeMate-Timeout: {timeout}"
    return "\r\n".join((*lines, f"Content-Length: {length}", *headers, "", "")).encode()


async def ask_for_more_than_is_read(client: Client, name: str) -> bytes:
    """Return the answer of a function that ends when all has come of a large body that comes to it."""
    answer = b""

    async def send(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(bytes(LARGE))

    async def read(stream: trio.SocketStream) -> None:
        nonlocal answer
        answer = await read_all(stream)

    async with connected(client) as stream, trio.open_nursery() as nursery:
        await stream.send_all(streaming(name, LARGE, "Connection: close"))
        nursery.start_soon(send, stream)
        nursery.start_soon(read, stream)
        await trio.testing.wait_all_tasks_blocked()
        client.functions.end.set()
    return answer


def records(client: Client, event: str) -> list[dict[str, Any]]:
    return [record.kwargs for record in client.records.calls if record.kwargs["event"] == event]


@pytest.mark.parametrize("error", [FunctionLimit("it met one", "output", 1, {}), ZeroDivisionError("a bug")])
async def test_a_stream_that_fails_before_its_body_is_read_ends_in_the_middle(error: Exception) -> None:
    client = Client(max_timeout=1e6)
    client.functions.error = error
    answer = await ask_for_more_than_is_read(client, "breaks")
    assert answer.startswith(b"HTTP/1.1 200")
    assert not answer.endswith(LAST_CHUNK)
    assert not records(client, "request")


async def test_a_stream_that_ends_well_before_its_body_is_read_is_whole() -> None:
    client = Client(max_timeout=1e6)
    answer = await ask_for_more_than_is_read(client, "first")
    assert answer.endswith(LAST_CHUNK)
    assert [record["status"] for record in records(client, "request")] == [200]


async def test_a_connection_is_idle_again_after_a_stream() -> None:
    client = Client()
    async with connected(client, keep_alive_timeout=0.1) as stream:
        await stream.send_all(streaming("echo", 6) + b"a word")
        answer = await read_all(stream)
    assert answer.endswith(b"a word\r\n" + LAST_CHUNK)
    assert [record["status"] for record in records(client, "request")] == [200]


async def test_a_client_that_leaves_is_noticed_though_its_body_is_not_read() -> None:
    client = Client(max_timeout=1e6)
    async with connected(client) as stream:
        await stream.send_all(streaming("wait", LARGE))
        await stream.send_all(bytes(LARGE - 1))
        await trio.testing.wait_all_tasks_blocked()
        assert client.functions.inside == 1
        await stream.aclose()
    assert client.functions.inside == 0
    assert [record["outcome"] for record in records(client, "request")] == ["client left"]


async def test_a_client_that_leaves_while_its_stream_waits_for_a_slot_waits_no_longer() -> None:
    client = Client(slots=1, max_timeout=1e6)
    async with connected(client) as first:
        await first.send_all(streaming("wait", 0))
        await trio.testing.wait_all_tasks_blocked()
        async with connected(client) as second:
            await second.send_all(streaming("wait", 0))
            await trio.testing.wait_all_tasks_blocked()
            assert client.gateway.admission.statistics().waiting == 1
            await second.aclose()
        assert client.gateway.admission.statistics().waiting == 0
        await first.aclose()


async def test_a_client_that_takes_nothing_of_its_stream_keeps_no_slot_beyond_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from teemate.gateway import connection
    from teemate.gateway import streaming as streams

    monkeypatch.setattr(connection, "SEND_SECONDS", math.inf)
    monkeypatch.setattr(streams, "LATE_SECONDS", 0.1)
    client = Client()
    async with connected(client) as stream:
        await stream.send_all(streaming("floods", 0, timeout="0.1"))
    assert client.gateway.admission.statistics().running == 0
    assert records(client, "stream broken off")


class Failing(socket.socket):
    """A listening socket whose accept() fails first as often as it is told to."""

    errors: ClassVar[list[int]] = []

    def accept(self) -> tuple[socket.socket, Any]:
        if self.errors:
            number = self.errors.pop()
            raise OSError(number, os.strerror(number))
        return super().accept()


@contextlib.contextmanager
def listening(path: Path, *errors: int) -> Iterator[Failing]:
    with Failing(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as one:
        sock.bind(str(path))
        sock.listen()
        sock.errors = list(errors)
        one.connect(str(path))
        yield sock


@pytest.mark.parametrize(
    "number", [errno.EAGAIN, errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETDOWN, errno.ECONNRESET]
)
async def test_a_connection_that_failed_before_it_was_accepted_ends_nothing(
    tmp_path: Path, number: int
) -> None:
    from teemate.gateway.serving import Listener

    with listening(tmp_path / "socket", number) as sock, trio.fail_after(DEADLINE):
        stream = await Listener(sock, Client().gateway.admission).accept()
        await stream.aclose()
        assert not sock.errors


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EINVAL])
async def test_want_of_descriptors_or_memory_is_told(tmp_path: Path, number: int) -> None:
    from teemate.gateway.serving import Listener

    with listening(tmp_path / "socket", number) as sock, trio.fail_after(DEADLINE):
        with pytest.raises(OSError, match=os.strerror(number)):
            await Listener(sock, Client().gateway.admission).accept()
