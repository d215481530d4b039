"""How the broker is started: sockets, policies, images, backends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from images import Images
from processes import wait_for_end
from raw_client import RawClient, raw_client
from running_broker import RunningBroker

from teemate import Unsupported
from teemate import connect as connect_to
from teemate.doctor import diagnose

Broker = Callable[..., RunningBroker]
Connect = Callable[..., RawClient]

ACTIVATE = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.bind(sys.argv[1])
sock.listen()
os.dup2(sock.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_socket_that_the_service_manager_passes_is_used(broker: Broker, tmp_path: Path) -> None:
    path = tmp_path / "activated.sock"
    running = broker("", folder=tmp_path, launcher=(sys.executable, "-c", ACTIVATE, str(path)))
    assert not Path(running.socket).exists()
    with raw_client(str(path)) as client:
        client.ok("ping")
    assert path.exists()


def test_the_socket_has_the_mode_and_group_of_the_policy_and_goes_with_the_broker(
    broker: Broker, tmp_path: Path
) -> None:
    running = broker('[broker]\nsocket_mode = "0620"\n', folder=tmp_path)
    assert os.stat(running.socket).st_mode & 0o777 == 0o620
    os.kill(running.pid, 15)
    wait_for_end([running.pid])
    assert not Path(running.socket).exists()


def start_and_fail(tmp_path: Path, policy: str, *arguments: str) -> str:
    (tmp_path / "broker.toml").write_text(policy)
    command = [sys.executable, "-m", "teemate.broker.main", "--config", str(tmp_path / "broker.toml")]
    command += ["--socket", str(tmp_path / "s"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_bad_policy_ends_the_start_with_line_and_key(tmp_path: Path) -> None:
    message = start_and_fail(tmp_path, "[limits]\nslots = true\n")
    assert f"{tmp_path / 'broker.toml'}:2: limits.slots: expected a whole number" in message


def test_a_file_in_the_socket_s_place_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("mine")
    assert "file lies there" in start_and_fail(tmp_path, "")
    assert (tmp_path / "s").read_text() == "mine"


needs_no_sgx = pytest.mark.skipif(os.path.exists("/dev/sgx_enclave"), reason="this host has SGX")


@needs_no_sgx
def test_where_sgx_is_demanded_the_broker_refuses_to_start_with_the_doctor_s_reason(tmp_path: Path) -> None:
    reason = diagnose().auto_reason
    assert reason in start_and_fail(tmp_path, '[broker]\nbackend = "sgx"\n')
    assert reason in start_and_fail(tmp_path, "", "--backend", "sgx")
    message = start_and_fail(tmp_path, '[[enclave]]\nname = "v"\nimage = "v.sgxs"\nbackend = "sgx"\n')
    assert "enclave v: " in message
    assert reason in message


@needs_no_sgx
def test_auto_says_in_the_log_what_it_took_and_why_not_sgx(broker: Broker, connect: Connect) -> None:
    running = broker("", arguments=("--backend", "auto"))
    (record,) = [record for record in running.log() if record["event"] == "backend chosen by auto"]
    assert record["backend"] == "sim"
    assert diagnose().auto_reason in str(record["why_not_sgx"])
    ok = connect(running).ok("enclaves")
    assert (ok["backend"], ok["wanted"]) == ("sim", "auto")


@needs_no_sgx
def test_a_create_that_demands_sgx_is_refused_with_the_reason_and_builds_nothing(
    broker: Broker, images: Images
) -> None:
    running = broker(f"[[create]]\nuid = {os.geteuid()}\n")
    with connect_to(running.socket) as client:
        with pytest.raises(Unsupported, match="does not work here"):
            client.create("v", images.vault.sgxs, images.vault.sigstruct, backend="sgx")
        assert client.enclaves() == []
        assert client.create("v", images.vault.sgxs, images.vault.sigstruct).backend == "sim"


def test_the_sim_says_loudly_that_it_protects_nothing(broker: Broker) -> None:
    running = broker("", arguments=("--backend", "sim"))
    (record,) = [record for record in running.log() if "protects nothing" in str(record["event"])]
    assert record["level"] == "warning"


def test_an_image_that_is_bad_costs_its_enclave_only(
    broker: Broker, connect: Connect, images: Images, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.sgxs"
    bad.write_bytes(images.vault.sgxs.read_bytes()[:-100])
    entries = [("bad", bad), ("missing", tmp_path / "nothing.sgxs"), ("good", images.vault.sgxs)]
    policy = "".join(
        f'[[enclave]]\nname = "{name}"\nimage = "{path}"\nsigstruct = "{images.vault.sigstruct}"\n'
        f"[[enclave.attach]]\nuid = {os.geteuid()}\n"
        for name, path in entries
    )
    running = broker(policy)
    client = connect(running)
    client.ok("attach", enclave="good")
    for name in ("bad", "missing"):
        assert "could not be built" in client.fails("attach", "not-found", enclave=name)["message"]
    reasons = {r["enclave"]: str(r["reason"]) for r in running.log() if r["event"] == "enclave not built"}
    assert set(reasons) == {"bad", "missing"}
    assert "No such file" in reasons["missing"]


def test_an_image_without_the_sdk_needs_the_policy_s_word_and_its_slots_are_used_once(
    broker: Broker, connect: Connect, images: Images
) -> None:
    entry = (
        f'[[enclave]]\nname = "{{name}}"\nimage = "{images.bare.sgxs}"\n'
        f'sigstruct = "{images.bare.sigstruct}"\n'
        f"{{extra}}\n[[enclave.attach]]\nuid = {os.geteuid()}\n"
    )
    policy = entry.format(name="refused", extra="") + entry.format(name="bare", extra="require_sdk = false")
    running = broker(policy)
    client = connect(running)
    client.fails("attach", "not-found", enclave="refused")
    ok = client.ok("attach", enclave="bare", slots=1)
    assert ok["enclave"]["isolation"] == "none"
    assert not ok["enclave"]["sdk"]
    client.ok("detach", grant=ok["grant"], clean=True)
    while (info := client.ok("enclaves")["enclaves"][0])["slots"]["quarantined"] == 0:
        client.ok("ping")  # the slot is put aside after the reply
    assert info["slots"]["free"] == info["slots"]["total"] - 1
    (reason,) = [r["reason"] for r in running.log() if r["event"] == "slot quarantined"]
    assert "without the SDK" in str(reason)
