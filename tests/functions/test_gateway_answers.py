"""What the gateway answers, request by request; the functions are played and trio's clock jumps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import structlog
import trio
import trio.testing
from played_functions import Client, Response

import teemate
from teemate.functions import FunctionLimit
from teemate.functions._wire import PAYLOAD_MAX
from teemate.gateway.app import BODY_RATE, LATE_SECONDS
from teemate.gateway.body import LEFTOVER_SECONDS
from teemate.gateway.log import configure_log
from teemate.gateway.settings import GatewayError, Settings, parse_listen


async def test_a_function_gets_the_body_and_the_arguments_and_its_result_is_the_answer() -> None:
    client = Client()
    payload = bytes(range(256)) * 2000
    response = await client.request(
        "POST", "/fn/echo", payload, query="arg=64&arg=a%20b%2B&arg=", pieces=1000
    )
    assert (response.status, response.body) == (200, payload)
    assert response.headers["content-length"] == str(len(payload))
    assert response.headers["content-type"] == "application/octet-stream"
    assert len(response.pieces) > 1  # never all of it at once
    ((name, got, arguments, timeout),) = client.functions.calls
    assert (name, got, arguments) == ("echo", payload, ["64", "a b+", ""])
    assert timeout is not None
    assert 9 < timeout <= 10


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/fn/unknown", 404),
        ("POST", "/fn/", 404),
        ("POST", "/fn/a/b", 404),
        ("POST", "/fn/..", 404),
        ("POST", "/fn/" + "n" * 64, 404),
        ("POST", "/fn/n\n", 404),
        ("GET", "/", 404),
        ("GET", "/fn/echo", 405),
        ("POST", "/healthz", 405),
        ("DELETE", "/openapi.json", 405),
    ],
)
async def test_what_is_not_there_is_told_from_what_is_asked_for_wrongly(
    method: str, path: str, status: int
) -> None:
    response = await Client().request(method, path)
    assert (response.status, response.problem()["status"]) == (status, status)
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    ("error", "status", "facts"),
    [
        (teemate.NotFound("no"), 404, {}),
        (teemate.Denied("rule 7 of user 1000"), 403, {}),
        (teemate.Busy("slot 0x1234 of uid 1000"), 503, {}),
        (teemate.Draining("no"), 503, {}),
        (teemate.Revoked("no"), 503, {}),
        (teemate.EnclaveLost("no"), 503, {}),
        (teemate.ConnectionLost("/run/secret/broker.sock"), 503, {}),
        (teemate.LimitReached("no"), 503, {}),
        (teemate.CallTimeout("slot 0x1234"), 504, {}),
        (
            FunctionLimit("the heap is full", "heap", 0, {}),
            503,
            {"limit": "heap", "detail": "the heap is full"},
        ),
        (teemate.EnclaveFault("at 0x1234"), 502, {}),
        (teemate.InternalError("at 0x1234"), 500, {}),
        (ZeroDivisionError("secret"), 500, {}),
    ],
)
async def test_each_error_has_the_status_that_says_whose_turn_it_is(
    error: Exception, status: int, facts: dict[str, Any]
) -> None:
    client = Client()
    client.functions.error = error
    response = await client.request("POST", "/fn/other")
    told = response.problem()
    assert response.status == status
    assert told.items() >= facts.items()
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert not any(secret in response.body for secret in (b"1000", b"0x1234", b"secret"))


async def test_a_body_that_is_too_large_is_refused_by_its_length_or_when_it_is() -> None:
    client = Client(max_body=1000)
    assert (await client.request("POST", "/fn/echo", b"x" * 1000)).status == 200
    by_length = await client.request("POST", "/fn/echo", b"x" * 1001, headers={"Content-Length": "1001"})
    without = await client.request("POST", "/fn/echo", b"x" * 1001, pieces=100)
    for response in (by_length, without):
        assert response.status == 413
        assert "1000" in response.problem()["detail"]
    assert len(client.functions.calls) == 1


async def test_a_body_larger_than_functions_take_is_too_large_whatever_the_gateway_takes() -> None:
    client = Client(max_body=PAYLOAD_MAX + 1000)
    headers = {"Content-Length": str(PAYLOAD_MAX + 1)}
    response = await client.request("POST", "/fn/echo", b"x", headers=headers)
    assert (response.status, client.functions.calls) == (413, [])
    assert str(PAYLOAD_MAX) in response.problem()["detail"]


@pytest.mark.parametrize("value", ["", "0", "0.0", "-1", "1e3", "nan", "inf", "1s", "1.", "1 2", "9" * 10])
async def test_a_deadline_that_is_none_is_refused(value: str) -> None:
    response = await Client().request("POST", "/fn/echo", headers={"TeeMate-Timeout": value})
    assert response.status == 400
    assert "TeeMate-Timeout" in response.problem()["detail"]


@pytest.mark.parametrize(
    "query",
    ["x=1", "arg", "arg=%ff", "arg=a%00b", "&".join(["arg=1"] * 65), "arg=" + "a" * 4097, "arg=1;arg=2&b"],
)
async def test_a_query_that_is_no_arguments_is_refused(query: str) -> None:
    response = await Client().request("POST", "/fn/echo", query=query)
    assert (response.status, response.problem()["code"]) == (400, "protocol-error")


async def test_a_function_that_is_not_done_by_the_deadline_is_ended(
    autojump_clock: trio.testing.MockClock,
) -> None:
    client = Client(timeout=5, max_timeout=20)
    for name, told, seconds in (
        ("wait", None, 5.0),
        ("wait", "2.5", 2.5),
        ("wait", "1000", 20.0),
        ("deaf", "2", 2 + LATE_SECONDS),
    ):
        began = trio.current_time()
        headers = {"TeeMate-Timeout": told} if told else {}
        response = await client.request("POST", f"/fn/{name}", headers=headers)
        assert response.status == 504
        assert trio.current_time() - began == pytest.approx(seconds)
        assert client.functions.inside == 0
    assert client.gateway.admission.statistics().running == 0


async def test_a_request_that_gets_no_slot_by_its_deadline_never_runs(
    autojump_clock: trio.testing.MockClock,
) -> None:
    client = Client(slots=1)
    late = Response()
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            await client.request("POST", "/fn/deaf", headers={"TeeMate-Timeout": "9"})

        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        await client.request("POST", "/fn/echo", headers={"TeeMate-Timeout": "3"}, response=late)
        assert (late.status, client.functions.inside) == (504, 1)
    assert [call[0] for call in client.functions.calls] == ["deaf"]


async def test_a_body_that_does_not_come_costs_its_sender_the_deadline_and_nobody_a_slot(
    autojump_clock: trio.testing.MockClock,
) -> None:
    client = Client(slots=1, timeout=5)
    slow = Response()
    async with trio.open_nursery() as nursery:

        async def stall() -> None:
            await client.request("POST", "/fn/echo", None, response=slow)

        nursery.start_soon(stall)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert client.gateway.admission.statistics().waiting == 1
        assert (await client.request("POST", "/fn/echo", b"quick")).body == b"quick"
        await client.request(
            "POST", "/fn/echo", None, headers={"TeeMate-Timeout": "2"}, response=(own := Response())
        )
    assert own.status == 504
    assert slow.status == 408
    assert slow.headers["connection"] == "close"


async def test_a_late_deadline_is_for_bodies_that_come(autojump_clock: trio.testing.MockClock) -> None:
    client = Client(timeout=5, max_timeout=60)
    body = bytes(20 * BODY_RATE)
    for pieces, status, seconds in ((BODY_RATE, 200, 20), (BODY_RATE // 4, 408, 6)):
        began = trio.current_time()
        response = await client.request(
            "POST", "/fn/echo", body, headers={"TeeMate-Timeout": "60"}, pieces=pieces, pause=1.0
        )
        assert response.status == status
        assert began + seconds <= trio.current_time() < began + seconds + 2 + LEFTOVER_SECONDS
    response = await client.request("POST", "/fn/echo", None, headers={"TeeMate-Timeout": "60"})
    assert response.status == 408
    assert str(BODY_RATE) in response.problem()["detail"]


async def test_a_client_that_leaves_ends_what_it_asked_for() -> None:
    client = Client(slots=1)
    leaves = trio.Event()
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            assert (await client.request("POST", "/fn/wait", leaves=leaves)).status == 0

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert client.functions.inside == 1
        leaves.set()
    assert client.functions.inside == 0
    assert (await client.request("POST", "/fn/echo", b"next")).body == b"next"


async def test_requests_beyond_slots_and_queue_are_told_when_to_ask_again() -> None:
    client = Client(slots=2, queue=1, concurrency=3)
    waiting = [Response() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for response in waiting:

            async def ask(response: Response = response) -> None:
                await client.request("POST", "/fn/wait", response=response)

            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        counts = client.gateway.admission.statistics()
        assert (counts.running, counts.waiting, client.functions.inside) == (2, 1, 2)
        full = await client.request("POST", "/fn/echo")
        assert (full.status, full.problem()["code"], full.headers["retry-after"]) == (503, "busy", "1")
        same = await client.request("POST", "/fn/wait")
        assert (same.status, same.problem()["code"], same.headers["retry-after"]) == (
            429,
            "limit-reached",
            "1",
        )
        client.functions.end.set()
    assert [response.status for response in waiting] == [200] * 3
    counts = client.gateway.admission.statistics()
    assert (counts.running, counts.waiting) == (0, 0)
    assert (await client.request("POST", "/fn/echo")).status == 200


async def test_health_tells_a_broker_that_is_away_and_a_gateway_that_stops() -> None:
    client = Client()
    well = await client.request("GET", "/healthz")
    assert (well.status, json.loads(well.body)["status"]) == (200, "ok")
    client.broker_answers = False
    assert (await client.request("GET", "/healthz")).status == 503
    client.broker_answers = True
    client.gateway.draining = True
    assert (await client.request("GET", "/healthz")).problem()["code"] == "draining"
    assert (await client.request("POST", "/fn/echo")).problem()["code"] == "draining"


async def test_web_pages_cannot_have_a_browser_ask_on_loopback() -> None:
    client = Client(loopback=True)
    for host in ("localhost", "127.0.0.1:8080", "[::1]:8080"):
        assert (await client.request("GET", "/healthz", headers={"Host": host})).status == 200
    for headers in ({"Host": "evil.example"}, {"Host": "localhost", "Origin": "null"}, {}):
        assert (await client.request("POST", "/fn/echo", headers=headers)).status == 403
    assert client.functions.calls == []


async def test_each_request_is_logged_once_without_what_it_carries() -> None:
    client = Client()
    response = await client.request("POST", "/fn/echo", b"payload of a customer", query="arg=private")
    (record,) = client.records.calls
    assert record.kwargs["request"] == response.headers["teemate-request"]
    assert (record.kwargs["status"], record.kwargs["received"], record.kwargs["sent"]) == (200, 21, 21)
    assert "customer" not in repr(record)
    assert "private" not in repr(record)


def test_what_a_terminal_obeys_is_escaped_in_a_log_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log("text").info("request", path="/fn/\x1b]0;owned\x07\x9b\\", method="GET")
    structlog.reset_defaults()
    told = capsys.readouterr().err
    assert "path=/fn/\\x1b]0;owned\\x07\\x9b\\\\" in told
    assert told.removesuffix("\n").isprintable()


async def test_the_document_names_every_status_that_is_given() -> None:
    document = json.loads((await Client().request("GET", "/openapi.json")).body)
    assert document["openapi"] == "3.1.0"
    told = set(document["paths"]["/fn/{name}"]["post"]["responses"])
    assert told == {
        "200",
        "400",
        "403",
        "404",
        "405",
        "408",
        "413",
        "422",
        "429",
        "500",
        "501",
        "502",
        "503",
        "504",
    }


@pytest.mark.parametrize(
    "place", ["0.0.0.0:80", "10.0.0.1:80", "example.com:80", "unix:", "127.0.0.1", "[::]:1"]
)
def test_it_listens_for_this_host_alone(place: str) -> None:
    with pytest.raises(GatewayError, match=r"unix:PATH|1 to 107 bytes"):
        parse_listen(place)


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in (
        {"slots": 0},
        {"concurrency": 0},
        {"queue": -1},
        {"timeout": 0},
        {"timeout": 61},
        {"grace": 0},
    ):
        with pytest.raises(GatewayError):
            Settings(**wrong)
    assert Settings.from_json(Settings(slots=7).to_json()) == Settings(slots=7)


async def test_a_stream_goes_through_in_pieces_and_by_http_1_1_alone() -> None:
    client = Client()
    streams = {"TeeMate-Stream": "1"}
    response = await client.request("POST", "/fn/echo", b"payload" * 100, pieces=50, headers=streams)
    assert (response.status, response.body) == (200, b"payload" * 100)
    assert "content-length" not in response.headers
    assert len(response.pieces) > 2
    client.functions.error = FunctionLimit("it met one", "fuel", 1, {})
    assert (await client.request("POST", "/fn/other", headers=streams)).status == 422
    for version in ("1.0", "2"):
        assert (await client.request("POST", "/fn/echo", headers=streams, version=version)).status == 501
