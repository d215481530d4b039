"""``teemate doctor`` on the host that the tests run on, as a person or a script runs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from images import Images
from running_broker import RunningBroker

from teemate import EnclaveLost, Unsupported, create_enclave
from teemate.doctor import Check, diagnose, this_host
from teemate.doctor._host import ProbeResult
from teemate.doctor._machine import ThisMachine
from teemate.doctor._service import ask, check_socket

IDS = {
    "processor", "firmware", "launch-control", "sgx2", "kernel-driver", "device", "device-exec", "vdso",
    "epc", "provision", "sgx-works", "xsave", "memory", "sim-works", "fsgsbase", "address-window",
    "container", "socket", "unit", "holders",
}  # fmt: skip

needs_no_sgx = pytest.mark.skipif(os.path.exists("/dev/sgx_enclave"), reason="this host has SGX")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from teemate.cli.main import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def socket_check(path: str) -> Check:
    """That check alone."""
    host = this_host()
    return check_socket(host, path, ask(host, path))


def test_the_json_has_the_documented_shape_and_says_which_backends_work(tmp_path: Path) -> None:
    done = run("doctor", "--json", "--socket", str(tmp_path / "none"))
    told = json.loads(done.stdout)
    assert set(told) == {"schema", "backends", "auto", "auto_reason", "checks"}
    assert told["schema"] == 1
    assert told["backends"]["sim"] is True
    assert done.returncode == 0
    assert {check["id"] for check in told["checks"]} >= IDS
    for check in told["checks"]:
        assert set(check) == {"id", "title", "group", "status", "found", "advice"}
        assert check["group"] in ("sgx", "sim", "host", "broker")
        assert check["status"] in ("ok", "warning", "problem", "unknown", "not-applicable")
        assert check["advice"] or check["status"] != "problem"
    assert told["auto"] == ("sgx" if told["backends"]["sgx"] else "sim")
    assert bool(told["auto_reason"]) == (told["auto"] != "sgx")


def test_the_text_fits_80_columns_without_colours_and_ends_with_the_verdict(tmp_path: Path) -> None:
    done = run("doctor", "--socket", str(tmp_path / "none"), env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.stdout
    assert lines[-1].startswith("Works: ")
    assert "an enclave was created, mapped, entered and left" in " ".join(done.stdout.split())
    assert done.stderr == ""


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen(0)
        yield sock


def test_a_listener_that_never_answers_does_not_hold_the_doctor_up(
    listener: socket.socket, tmp_path: Path
) -> None:
    check = socket_check(str(tmp_path / "s"))
    assert "says nothing" in check.found


def test_a_listener_whose_queue_is_full_does_not_hold_the_doctor_up(
    listener: socket.socket, tmp_path: Path
) -> None:
    waiting = []
    try:
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            waiting.append(sock)
            sock.setblocking(False)
            sock.connect(str(tmp_path / "s"))
    except BlockingIOError:
        assert "accepts nobody" in socket_check(str(tmp_path / "s")).found
    finally:
        for sock in waiting:
            sock.close()


@pytest.mark.parametrize("reply", [b"", b"\xff", b"\xa0", b"\xa2bid\x00bok\xa0"])
def test_a_listener_that_is_no_broker_is_told_as_such(
    listener: socket.socket, tmp_path: Path, reply: bytes
) -> None:
    def serve() -> None:
        accepted, _ = listener.accept()
        with accepted:
            accepted.recv(65536)
            if reply:
                accepted.send(reply)
                accepted.recv(65536)

    thread = threading.Thread(target=serve)
    thread.start()
    check = socket_check(str(tmp_path / "s"))
    thread.join()
    assert check.status.value == "problem"
    assert "broker" in check.found or "broke" in check.found or "says nothing" in check.found


def test_what_lies_in_the_socket_s_place_is_told(tmp_path: Path, listener: socket.socket) -> None:
    (tmp_path / "file").write_text("")
    assert "this is no socket" in socket_check(str(tmp_path / "file")).found
    listener.close()
    assert "nobody listens" in socket_check(str(tmp_path / "s")).found


def test_a_running_broker_is_found_with_its_backend(broker: Callable[..., RunningBroker]) -> None:
    running = broker("", arguments=("--backend", "sim"))
    found = socket_check(running.socket).found
    assert "answers, protocol 1, backend sim, 0 enclaves for you" in found


def test_doctor_shows_the_broker_s_socket_as_forbidden_to_who_may_not_connect(
    broker: Callable[..., RunningBroker],
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    running = broker('[broker]\nsocket_mode = "0600"\n')
    try:
        done = run("doctor", "--json", "--socket", running.socket, user=65534, group=65534, extra_groups=[])
    except PermissionError:
        pytest.skip("another user cannot run this Python")
    told = json.loads(done.stdout)
    (check,) = [check for check in told["checks"] if check["id"] == "socket"]
    assert "not permitted (mode 0600" in check["found"]
    assert "uid 65534" in check["found"]
    assert told["backends"]["sim"] is True


def probe_with(monkeypatch: pytest.MonkeyPatch, run_enclave: Callable[[str], str]) -> ProbeResult:
    monkeypatch.setattr("teemate.doctor._probe.run_enclave", run_enclave)
    return ThisMachine().probe(["sim"])["sim"]


def test_a_probe_that_dies_inside_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    result = probe_with(monkeypatch, lambda _: os.kill(os.getpid(), signal.SIGUSR1) or "")
    assert not result.works
    assert "signal 10 (User defined signal 1)" in result.text


def test_a_probe_that_fails_gives_the_error_s_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(backend: str) -> str:
        raise EnclaveLost(f"{backend} is gone")

    assert probe_with(monkeypatch, fail) == ProbeResult(works=False, text="sim is gone")


def test_a_probe_that_does_not_come_back_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teemate.doctor._machine.PROBE_TIMEOUT", 0.2)
    children: list[int] = []
    fork = os.fork
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    result = probe_with(monkeypatch, lambda _: signal.pause() or "")
    assert result == ProbeResult(works=False, text="the enclave was not created, entered and left in 0.2 s")
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


@needs_no_sgx
def test_who_demands_sgx_hears_the_doctor_s_reason(images: Images) -> None:
    reason = diagnose().auto_reason
    with pytest.raises(Unsupported) as caught:
        create_enclave(images.bare.sgxs, images.bare.sigstruct, backend="sgx")
    assert reason in str(caught.value)
    assert caught.value.detail["reason"]
    done = run("demo", "--backend", "sgx", "--clients", "1")
    assert done.returncode == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
