"""What the metrics say of a broker, against what was done with it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import structlog
from images import Images
from policies import enclave_policy
from raw_client import RawClient, raw_client
from running_broker import RunningBroker

from teemate import wire
from teemate.broker.enclaves.enclave import Built, Enclave
from teemate.broker.policy.rules import EnclavePolicy, Policy
from teemate.broker.service import Service

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed: there are no metrics")

from scrape import OPENMETRICS, get, samples, value

Measured = Callable[..., tuple[RunningBroker, str]]
Connect = Callable[..., RawClient]


@pytest.fixture
def measured(broker: Callable[..., RunningBroker], images: Images, tmp_path: Path) -> Measured:
    """Start a broker with a vault and metrics; returns it and the metrics' socket when they are served."""

    def start(
        extra: str = "", vault: str = "slots_per_client = 64", **options: object
    ) -> tuple[RunningBroker, str]:
        path = tmp_path / "metrics.sock"
        policy = "\n".join(
            [
                f"[administrators]\nuids = [{os.geteuid()}]",
                f'[metrics]\nsocket = "{path}"\n{extra}',
                enclave_policy("vault", images.vault, vault),
            ]
        )
        running = broker(policy, **options)
        wait_served(running)
        return running, str(path)

    return start


def wait_served(running: RunningBroker) -> None:
    """Metrics are served a moment after the broker is ready."""
    with raw_client(running.socket) as admin:
        while not admin.ok("stats")["stats"]["metrics"]:
            pass


def test_what_clients_do_is_in_the_metrics(measured: Measured, connect: Connect) -> None:
    running, path = measured()
    one, other = connect(running), connect(running)
    info = one.ok("attach", enclave="vault", slots=2)["enclave"]
    other.ok("attach", enclave="vault", slots=1)
    found = samples(get(path).body)
    assert value(found, "teemate_clients") == 2
    assert value(found, "teemate_grants") == 2
    assert value(found, "teemate_attaches_total", enclave="vault") == 2
    assert value(found, "teemate_attach_duration_seconds_count") == 2
    assert value(found, "teemate_slots", enclave="vault", state="assigned") == 3
    assert value(found, "teemate_slots", enclave="vault", state="free") == info["slots"]["total"] - 3
    assert value(found, "teemate_enclaves", state="ready") == 1
    labels = {"enclave": "vault", "owner": str(os.geteuid()), "backend": info["backend"]}
    assert value(found, "teemate_epc_pages", **labels) == info["pages"]
    assert value(found, "teemate_wardens_total", enclave="vault", outcome="started") == 1
    assert value(found, "teemate_broker_starts_total") == 1
    assert value(found, "teemate_slot_held_seconds_total", enclave="vault") > 0


def test_refusals_and_revocations_are_counted_by_kind(measured: Measured, connect: Connect) -> None:
    running, path = measured(extra="[limits]\ngrants = 2\n")
    client, admin = connect(running), connect(running)
    client.ok("attach", enclave="vault", slots=0)
    grant = client.ok("attach", enclave="vault", slots=1)["grant"]
    client.fails("attach", "limit-reached", enclave="vault")
    number = admin.post("revoke", grant=grant, grace=30)
    slots = client.event()["slots"]
    client.ok("slots.release", grant=grant, slots=slots, clean=True)
    assert admin.reply(number)["ok"]["leaked"] == 0
    found = samples(get(path).body)
    assert value(found, "teemate_limit_refusals_total", limit="grants") == 1
    assert value(found, "teemate_limit_refusals_total", limit="slots") == 0
    assert value(found, "teemate_revocations_total", outcome="returned") == 1
    assert value(found, "teemate_revocations_total", outcome="leaked") == 0
    assert value(found, "teemate_revoked_slots_total", outcome="cleared") == 1
    assert value(found, "teemate_leaked_mappings") == 0


def test_a_mapping_is_leaked_until_its_holder_acknowledges(measured: Measured, connect: Connect) -> None:
    running, path = measured()
    client, admin = connect(running), connect(running)
    attached = client.ok("attach", enclave="vault", slots=1)
    assert admin.ok("revoke", grant=attached["grant"], grace=0)["leaked"] == 1
    found = samples(get(path).body)
    assert value(found, "teemate_leaked_mappings") == 1
    assert value(found, "teemate_revocations_total", outcome="leaked") == 1
    assert value(found, "teemate_slots", enclave="vault", state="withheld") == 1
    indices = [slot["slot"] for slot in attached["slots"]]
    client.ok("slots.release", grant=attached["grant"], slots=indices, clean=True)
    while admin.ok("enclaves")["enclaves"][0]["slots"]["withheld"]:
        pass
    while admin.ok("enclaves")["enclaves"][0]["slots"]["used"]:  # the warden works on it
        pass
    found = samples(get(path, accept="text/plain").body, older=True)  # not the text of just now
    assert value(found, "teemate_leaked_mappings") == 0
    assert value(found, "teemate_revoked_slots_total", outcome="leaked") == 1


def test_who_waits_for_slots_is_in_the_queue_and_then_in_the_histogram(
    measured: Measured, connect: Connect
) -> None:
    running, path = measured()
    one, other = connect(running), connect(running)
    total = one.ok("enclaves")["enclaves"][0]["slots"]["total"]
    attached = one.ok("attach", enclave="vault", slots=total)
    number = other.post("attach", enclave="vault", slots=1, wait=30)
    while not one.ok("enclaves")["enclaves"][0]["slots"]["waiting"]:
        pass
    found = samples(get(path).body)
    assert value(found, "teemate_slot_requests_waiting", enclave="vault") == 1
    assert value(found, "teemate_slot_wait_seconds_count", enclave="vault") == 0
    one.ok("slots.release", grant=attached["grant"], slots=[attached["slots"][0]["slot"]], clean=True)
    assert "ok" in other.reply(number)
    found = samples(get(path, accept="text/plain").body, older=True)
    assert value(found, "teemate_slot_requests_waiting", enclave="vault") == 0
    assert value(found, "teemate_slot_wait_seconds_count", enclave="vault") == 1
    assert value(found, "teemate_slot_wait_seconds_sum", enclave="vault") > 0


def test_denials_are_counted_by_operation_and_reason(measured: Measured, connect: Connect) -> None:
    running, path = measured(vault="owner = 12345")
    client = connect(running)
    for _ in range(3):
        client.fails("attach", "denied", enclave="vault")
    found = samples(get(path).body)
    assert value(found, "teemate_denials_total", operation="attach", reason="owner") == 3


def test_a_restart_is_counted_and_so_are_the_grants_that_went_on(measured: Measured) -> None:
    running, path = measured(keeper=True)
    with raw_client(running.socket) as client:
        client.ok("attach", enclave="vault", slots=1)
        running.kill_worker()
        # A reset if it had not taken the request from the socket yet, which it does after answering.
        with suppress(ConnectionResetError):
            assert client.receive() is None
        client.reconnect()
        wait_served(running)
        found = samples(get(path).body)
    assert value(found, "teemate_broker_starts_total") == 2
    assert value(found, "teemate_grants_resumed_total") == 1
    assert value(found, "teemate_clients_suspended_total", outcome="resumed") == 1


def test_no_key_and_no_token_is_in_metrics_answers_log_or_top(measured: Measured) -> None:
    """The real values, as they went over the socket, in every form that a text could have them in."""
    running, path = measured(keeper=True)
    secrets: set[bytes] = set()
    with raw_client(running.socket) as client:
        secrets.add(client.token)
        for slot in client.ok("attach", enclave="vault", slots=2)["slots"]:
            secrets |= {slot["key"], slot["bind"]}
        looks = [client.ok("stats"), client.ok("clients", activity=True)]
        looks.append(client.ok("holders", enclave="vault", calls=True))
        top = subprocess.run(
            [sys.executable, "-c", "from teemate.cli.main import main; main()", "top", "--interval", "0.1"],
            env={**os.environ, "TEEMATE_SOCKET": running.socket},
            capture_output=True,
            check=True,
        )
        text = get(path).body + get(path, accept="text/plain").body
    assert len(secrets) == 5, "a token, two slot keys and what binds them"
    told = text + running.log_file.read_bytes() + top.stdout + b"".join(map(wire.encode, looks))
    for secret in secrets:
        assert len(secret) >= 16
        for form in (secret, secret.hex().encode(), repr(secret).encode()):
            assert form not in told
    assert re.search(rb"teemate_slots\{", text), "that was the text"


@pytest.mark.parametrize(
    "accept", ["text/plain;version=x", "application/openmetrics-text;version=x", ";,;=", ""]
)
def test_a_strange_accept_is_answered_in_one_of_the_two_formats(measured: Measured, accept: str) -> None:
    _, path = measured()
    response = get(path, accept=accept)
    assert response.status == 200
    found = samples(response.body, older="openmetrics" not in accept)
    assert value(found, "teemate_broker_starts_total") == 1


def test_only_who_the_policy_says_may_read(measured: Measured) -> None:
    _, path = measured(extra='socket_mode = "0640"')
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640


def test_who_does_not_ask_for_metrics_does_not_even_load_what_makes_them(
    broker: Callable[..., RunningBroker], connect: Connect
) -> None:
    running = broker(f"[administrators]\nuids = [{os.geteuid()}]\n")
    assert connect(running).ok("stats")["stats"]["metrics"] == {}
    assert not any(str(record["event"]).startswith("metrics") for record in running.log())


def test_a_socket_that_cannot_be_had_keeps_no_client_out(
    broker: Callable[..., RunningBroker], connect: Connect
) -> None:
    running = broker('[metrics]\nsocket = "/nonexistent/metrics.sock"\n')
    connect(running).ok("ping")
    while not (told := [record for record in running.log() if record["event"] == "metrics not served"]):
        os.sched_yield()
    assert "[metrics] socket" in str(told[0]["where"])


def test_enclaves_that_the_policy_does_not_name_are_added_up_once_there_are_many() -> None:
    from teemate.broker.telemetry import metrics

    built = Built(
        fd=-1, arena=-1, base=0, size=1 << 20, pages=10, debug=False, sdk=True, isvprodid=0, isvsvn=0,
        mrenclave=bytes(32), mrsigner=bytes(32), segments=(), tcs=tuple(range(6)), io_slots=0, client_slots=4,
    )  # fmt: skip
    known = EnclavePolicy(name="zz-of-the-policy", owner=7, start="create")
    service = Service(Policy(enclaves=(known,)), structlog.wrap_logger(structlog.ReturnLogger()))
    made = [EnclavePolicy(name=f"made-{number}", owner=8) for number in range(metrics.NAMED_ENCLAVES + 49)]
    for policy in (*made, known):
        service.enclaves[policy.name] = Enclave(policy, "sim", built, None)
    found = samples(metrics.render(metrics.read(service), OPENMETRICS)[0])
    pages = {
        dict(labels)["enclave"]: number
        for (name, labels), number in found.items()
        if name == "teemate_epc_pages"
    }
    assert len(pages) == metrics.NAMED_ENCLAVES + 1
    assert pages["zz-of-the-policy"] == 10
    assert pages[metrics.OTHERS] == 500
    assert value(found, "teemate_slots", enclave=metrics.OTHERS, state="arming") == 200
    names = {dict(labels).get("enclave") for _, labels in found}
    assert len(names) <= metrics.NAMED_ENCLAVES + 2
