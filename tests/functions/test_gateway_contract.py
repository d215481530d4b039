"""Requests of any kind, streams and deadlines of a moment among them, get what the OpenAPI document says.

schemathesis cannot judge a stream that its deadline breaks off (test_gateway_schema.py); this does: what has
come until then has to be the beginning of the result, and all else a whole answer that is documented.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import wait_until
from running_gateway import Connection, RunningGateway, run_gateway

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hypercorn") is None, reason="needs hypercorn: pip install 'teemate[gateway]'"
)
MOMENTS = ("0.000000001", "0.0005", "0.001", "0.002", "0.005", "0.01", "0.03")
WRONG = ("0", "-1", "1e3", "soon", "1_000", "nan", "01")
MAX_BODY = 1 << 20


@dataclass(frozen=True)
class Request:
    body: bytes
    pieces: int
    """Sent in chunks of so many bytes; 0: with its length."""
    timeout: str | None
    stream: str | None
    name: str
    query: str

    def headers(self) -> dict[str, str]:
        asked = {"TeeMate-Timeout": self.timeout, "TeeMate-Stream": self.stream}
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def may_break_off(self) -> bool:
        return self.stream is not None and self.timeout in MOMENTS


requests = st.builds(
    Request,
    body=st.one_of(
        st.binary(max_size=100),
        st.integers(0, MAX_BODY + 2).map(lambda size: bytes(range(251)) * (size // 251) + bytes(size % 251)),
    ),
    pieces=st.sampled_from([0, 0, 1000, 65_536]),
    timeout=st.one_of(st.none(), st.sampled_from((*MOMENTS, *MOMENTS, *WRONG, "30"))),
    stream=st.sampled_from([None, "1", "1", "1", "2", ""]),
    name=st.sampled_from(["echo", "echo", "echo", "echo", "-", "a" * 64, "%00", "x/y"]),
    query=st.sampled_from(["", "", "", "?arg=1&arg=2", "?other=1", "?arg=%00", "?" + "&arg=a" * 65]),
)


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    with run_gateway("--workers", "1", "--slots", "2", "--max-body", "1M") as running:
        yield running
        wait_until(lambda: _counts(running) == (0, 0), "all has ended")
        assert not running.log("internal error"), running.log("internal error")[0]
        assert not running.log("connection failed"), running.log("connection failed")[0]
        assert not running.log("worker ended")


@pytest.fixture(scope="module")
def responses(gateway: RunningGateway) -> dict[str, Any]:
    """What the document has for an invocation."""
    document = gateway.request("GET", "/openapi.json").json()
    found: dict[str, Any] = document["paths"]["/fn/{name}"]["post"]["responses"]
    return found


def _counts(gateway: RunningGateway) -> tuple[int, int]:
    told = gateway.request("GET", "/healthz").json()
    return told["running"], told["waiting"]


def ask(connection: Connection, request: Request) -> tuple[http.client.HTTPResponse | None, bytes, bool]:
    """Send it; returns the answer, its body as far as that came, and whether it was whole."""
    body: Any = request.body
    if request.pieces:
        body = (request.body[at : at + request.pieces] for at in range(0, len(request.body), request.pieces))
    with contextlib.suppress(ConnectionError):  # then it has its answer already
        connection.request(
            "POST", f"/fn/{request.name}{request.query}", body, request.headers(), encode_chunked=False
        )
    try:
        response = connection.getresponse()
    except (http.client.BadStatusLine, ConnectionError):
        return None, b"", False
    try:
        return response, response.read(), True
    except http.client.IncompleteRead as cut:
        return response, cut.partial, False
    except ConnectionError:
        return response, b"", False


def judge(
    request: Request, response: http.client.HTTPResponse, body: bytes, whole: bool, documented: Any
) -> str:
    """See that it is an answer of the document's; returns its kind."""
    status = response.status
    assert str(status) in documented, status
    kinds = documented[str(status)]["content"]
    assert (response.getheader("content-type") or "").partition(";")[0] in kinds
    assert response.getheader("teemate-request")
    if status == 200:
        assert request.timeout not in WRONG
        if whole:
            assert body == request.body
            return "whole"
        assert request.may_break_off
        assert request.body.startswith(body)
        return "broken off"
    assert whole
    told = json.loads(body)
    assert told["status"] == status
    schema = kinds["application/problem+json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/Problem"}
    assert {"title", "status", "code", "detail"} <= set(told)
    if status in (429, 503):
        assert int(response.getheader("retry-after") or "") >= 1
    if status in (408, 504):
        assert request.timeout in MOMENTS
    return str(status)


def seen(gateway: RunningGateway, responses: Any, examples: Sequence[Request]) -> Counter[str]:
    """Send them over one connection for as long as it is kept; what is kept answers the next."""
    kinds: Counter[str] = Counter()
    connection = gateway.connection()
    try:
        for request in examples:
            response, body, whole = ask(connection, request)
            if response is None:
                # Nothing at all: of a stream that was broken off before its head was on its way.
                assert request.may_break_off
                kinds["nothing"] += 1
            else:
                kinds[judge(request, response, body, whole, responses)] += 1
            if response is None or not whole or response.will_close:
                connection.close()
                connection = gateway.connection()
    finally:
        connection.close()
    return kinds


def test_every_request_gets_what_is_documented(
    gateway: RunningGateway, responses: Any, request: pytest.FixtureRequest
) -> None:
    kinds: Counter[str] = Counter()
    count = 400 if request.config.getoption("--full") else 40

    @settings(max_examples=count, deadline=None, suppress_health_check=[*HealthCheck], database=None)
    @given(examples=st.lists(requests, min_size=1, max_size=8))
    def run(examples: list[Request]) -> None:
        kinds.update(seen(gateway, responses, examples))

    run()
    assert kinds["whole"] > 0
    assert kinds["400"] > 0


def test_a_stream_of_a_moment_breaks_off_or_ends_well(gateway: RunningGateway, responses: Any) -> None:
    body = bytes(range(256)) * 4000
    examples = [
        Request(body, pieces, timeout, "1", "echo", "") for timeout in MOMENTS for pieces in (0, 1000, 65_536)
    ]
    kinds = seen(gateway, responses, examples)
    assert kinds.total() == len(examples)
    assert set(kinds) <= {"whole", "broken off", "504", "nothing"}
    assert kinds["504"] > 0  # a nanosecond is over before anything


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/healthz", 200),
        ("HEAD", "/openapi.json", 200),
        ("GET", "/fn/echo", 405),
        ("PUT", "/healthz", 405),
        ("DELETE", "/openapi.json", 405),
        ("GET", "/", 404),
        ("OPTIONS", "/fn/echo", 405),
    ],
)
def test_other_methods_and_paths_get_their_status(
    gateway: RunningGateway, method: str, path: str, status: int
) -> None:
    reply = gateway.request(method, path)
    assert reply.status == status
    if status == 405:
        assert reply.headers["allow"]
    if method == "HEAD":
        assert reply.body == b""
