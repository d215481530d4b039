"""What one client's connection can do to a worker: the server is hypercorn's, the functions are played."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from played_functions import Client
from running_gateway import DEADLINE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hypercorn") is None, reason="needs hypercorn: pip install 'teemate[gateway]'"
)


@asynccontextmanager
async def connected(client: Client) -> AsyncGenerator[trio.SocketStream, None]:
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
    with trio.fail_after(DEADLINE):
        async with ours, trio.open_nursery() as nursery:
            application = ASGIWrapper(client.gateway)
            server = Connection(
                client.log, application, Config(), WorkerContext(None), ConnectionState({}), theirs
            )
            nursery.start_soon(server.run)
            yield ours


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
