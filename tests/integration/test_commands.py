"""The commands against a real broker, as a person or a script runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from backends import BACKEND, PATIENCE
from other_client import OtherClient
from processes import wait_for_end
from running_broker import RunningBroker

StartBroker = Callable[..., RunningBroker]


def teemate(
    *arguments: str, status: int = 0, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(command(arguments), capture_output=True, timeout=250 * PATIENCE, input=stdin)
    assert done.returncode == status, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


def command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", "from teemate.cli.main import main; main()", *arguments]


def vault_free(told: dict[str, Any]) -> str:
    (slots,) = [enclave["slots"] for enclave in told["enclaves"] if enclave["name"] == "vault"]
    return f"{slots['free']}/{slots['total']}"


def test_status_shows_enclaves_clients_and_whether_they_are_protected(
    broker: StartBroker, policy: str
) -> None:
    running = broker(policy)
    with OtherClient(running.socket, "vault") as other:
        told = json.loads(teemate("status", "--socket", running.socket, "--json").stdout)
        text = teemate("status", "--socket", running.socket).stdout.decode()
        assert f"{vault_free(told)} free" in text
    (vault,) = [enclave for enclave in told["enclaves"] if enclave["name"] == "vault"]
    assert (vault["slots"]["used"], vault["clients"]) == (1, 1)
    assert ("protects nothing" in str(told.get("warning"))) == (BACKEND == "sim")
    assert other.pid in [client["pid"] for client in told["clients"]]
    assert "vault" in text
    assert ("protects nothing" in " ".join(text.split())) == (BACKEND == "sim")


def test_call_takes_text_a_file_standard_input_and_hexadecimal(
    broker: StartBroker, policy: str, tmp_path: Path
) -> None:
    running = broker(policy)
    where = ("--socket", running.socket)
    assert teemate("call", "vault", "echo", "hello", *where).stdout == b"hello"
    assert teemate("call", "vault", "echo", *where).stdout == b""
    assert teemate("call", "vault", "echo", "00ff", "--hex", *where).stdout == b"00ff\n"
    assert teemate("call", "vault", "echo", "-", *where, stdin=b"\x00\xff").stdout == b"\x00\xff"
    (tmp_path / "payload").write_bytes(b"from a file")
    file = str(tmp_path / "payload")
    assert teemate("call", "vault", "echo", "--file", file, *where).stdout == b"from a file"
    told = json.loads(teemate("call", "vault", "echo", "x", "--json", *where).stdout)
    assert told["answer_hex"] == "78"
    teemate("call", "vault", "echo", "zz", "--hex", *where, status=2)


def test_errors_are_one_line_without_a_traceback(broker: StartBroker, policy: str, tmp_path: Path) -> None:
    running = broker(policy)
    done = teemate("call", "vault", "no-such-call", "--socket", running.socket, status=1)
    assert b"no ECALL of that name" in done.stderr
    done = teemate("status", "--socket", str(tmp_path / "nobody"), status=5)
    assert b"no broker answers" in done.stderr
    done = teemate("status", "--json", "--socket", str(tmp_path / "nobody"), status=5)
    assert json.loads(done.stdout)["error"]["code"] == "connection-lost"
    done = teemate("call", "faults", "divide", "--socket", running.socket, status=1)
    assert b"#DE" in done.stderr


def test_revoke_takes_a_grant_back(broker: StartBroker, policy: str) -> None:
    running = broker(policy)
    with OtherClient(running.socket, "vault") as other:
        assert other.call("echo", b"before") == b"before"
        done = teemate("revoke", "--grant", str(other.grant), "--json", "--socket", running.socket)
        counts = {"grants": 1, "cleared": 1, "quarantined": 0, "leaked": 0, "busy": 0}
        assert json.loads(done.stdout) == counts
        with pytest.raises(Exception, match="took the grant back"):
            other.call("echo", b"after")
    teemate("revoke", "--socket", running.socket, status=2)


def test_the_demo_counts_right_and_reports_what_it_measured() -> None:
    done = teemate("demo", "--clients", "3", "--calls", "60", "--heap", "4M", "--backend", BACKEND, "--json")
    told = json.loads(done.stdout)
    assert (told["backend"], told["image"], told["clients"], told["calls"]) == (BACKEND, "vault", 3, 60)
    assert told["failures"] == 0
    assert told["counter"] == told["counter_expected"] > 0
    # The way each has its own enclave leaves the reads of others out.
    assert told["calls_total"] == 3 * 60 + 3 * 40
    assert told["epc_pages_conventional"] == 3 * told["epc_pages_shared"]
    assert told["epc_pages_shared"] > 1024
    assert told["memory_ratio"] == 3.0
    for key in ("attach_ms", "conventional_ms", "floor_ms"):
        assert 0 < told[key]["p50"] <= told[key]["p99"]
    assert told["latency_ratio"] == round(told["conventional_ms"]["p50"] / told["attach_ms"]["p50"], 2)
    assert told["pss_mib_shared"] < told["pss_mib_conventional"] + 64
    assert len(told["mrenclave"]) == 64


@pytest.mark.parametrize(("phase", "processes"), [("programs start", 2), ("calls", 4)])
def test_ctrl_c_ends_the_demo_and_everything_that_it_started(phase: str, processes: int) -> None:
    demo = subprocess.Popen(
        command(["demo", "--clients", "2", "--calls", "1000000", "--heap", "4M", "--backend", BACKEND]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert demo.stderr is not None
    assert demo.stdout is not None
    with demo, demo.stdout, demo.stderr:
        for line in demo.stderr:
            if phase in line:
                break
        started = descendants(demo.pid)
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does
        assert demo.wait(60 * PATIENCE) == 130
        said = demo.stderr.read()
        assert said.endswith("interrupted\n")
        assert "Traceback" not in said
    assert len(started) >= processes  # broker and warden, then two programs
    wait_for_end(started)  # a warden hears of it by the end of its socket


def descendants(pid: int) -> list[int]:
    from teemate.demo._memory import children

    return children(pid)
