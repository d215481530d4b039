"""No slot key, MAC or token is in anything that people see or keep: looked for by their real values."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import proxy, running, teemate
from processes import wait_until
from raw_client import raw_client
from running_broker import RunningBroker

StartBroker = Callable[..., RunningBroker]
UNCONCEALED = """
import teemate.traffic.concealing
import teemate.traffic.description
teemate.traffic.concealing.Concealer.conceal = lambda self, message, data: data
teemate.traffic.description.is_secret = lambda name, value: False
"""
"""The negative control: nothing is replaced, and nothing is hidden."""
PART = 6
"""Bytes of a secret that are enough to have found it: its pseudonym's hash is shown by four."""


class Witness:
    """Knows the secrets that a client was given, and the ones that it made up."""

    def __init__(self) -> None:
        self.secrets: set[bytes] = set()

    def learn(self, value: Any, name: str = "") -> Any:
        """Take every byte string that is no measurement for a secret; returns `value`."""
        if isinstance(value, dict):
            for key, item in value.items():
                self.learn(item, key)
        elif isinstance(value, list):
            for item in value:
                self.learn(item, name)
        elif isinstance(value, bytes) and name not in ("mrenclave", "mrsigner"):
            self.secrets.add(value)
        return value

    def finds(self, data: bytes) -> bool:
        """Whether a secret, or a part that is enough, is in `data` in any shape that we know of."""
        lower = data.lower()
        return any(
            part in data or part.hex().encode() in lower or base64.b64encode(part)[:8] in data
            for secret in self.secrets
            for part in (secret[:PART], secret[-PART:], secret[8 : 8 + PART])
            if len(set(part)) > 3  # a MAC comes with numbers, which are mostly zeros
        )


def use(path: str, witness: Witness) -> None:
    """Do everything in which secrets go to and fro."""
    session = os.urandom(32)
    witness.learn(session)
    with raw_client(path, hello=False) as client:
        token = witness.learn(client.hello(session=session))["token"]
        grant = witness.learn(client.ok("attach", enclave="vault", slots=3))["grant"]
        more = witness.learn(client.ok("slots.acquire", grant=grant, count=2))["slots"]
        client.ok("slots.release", grant=grant, slots=[more[0]["slot"]], clean=True)
        client.fails("attach", "not-found", enclave="nowhere")
        client.ok("detach", grant=grant, clean=True)
    with raw_client(path, hello=False) as client:
        assert "resumed" not in witness.learn(client.hello(resume=token))
    with raw_client(path, hello=False) as client:  # in the wrong type
        client.send({"id": 1, "op": "hello", "args": {"version": 1, "resume": token.hex()}})
        assert client.receive() is not None
    with raw_client(path) as client:  # in a message that cannot be read
        client.sock.send(b"\xa2\x62id\x01\x62id\x58\x20" + token)
        client.breaks_protocol()


def surfaces(
    to: RunningBroker, folder: Path, witness: Witness, environment: dict[str, str]
) -> dict[str, bytes]:
    """Everything that people see or keep while clients work."""
    found: dict[str, str] = {}
    recording = folder / "session.pcapng"
    where = ("--socket", to.socket)
    with (
        running("monitor", *where, until="Watching", environment=environment) as monitor,
        running("monitor", "--json", *where, until="Watching", environment=environment) as monitor_json,
        proxy(to.socket, folder, "--record", str(recording), environment=environment) as (path, recorded),
    ):
        use(path, witness)
        # What came before is printed when what comes last is.
        with raw_client(to.socket) as client:

            def printed() -> bool:
                client.fails("the.end", "unsupported")
                return all("the.end" in viewer.so_far() for viewer in (monitor, monitor_json))

            wait_until(printed, "everything was shown")
    found["monitor"] = monitor.printed + monitor.said
    found["monitor --json"] = monitor_json.printed
    found["proxy"] = recorded.begin + recorded.printed + recorded.said
    found["decode"] = teemate("decode", str(recording), environment=environment)
    found["decode --json"] = teemate("decode", str(recording), "--json", environment=environment)
    token = next(secret for secret in witness.secrets if len(secret) == 32)
    args = ("send", "attach", "enclave=vault", f"x=h'{token.hex()}'", f"token=h'{token.hex()}'", *where)
    found["send"] = teemate(*args, environment=environment)
    found["send --json"] = teemate(*args, "--json", environment=environment)
    found["replay"] = teemate("replay", str(recording), *where, environment=environment, status=0)
    for command in ("status", "slots", "usage", "denials"):
        found[command] = teemate(command, "--json", *where)
    with raw_client(to.socket) as client:
        found["stats"] = repr(client.ok("stats"))
    found["log"] = to.log_file.read_text()
    return {name: text.encode() for name, text in found.items()} | {"recording": recording.read_bytes()}


SHOWING = {
    "monitor", "monitor --json", "proxy", "decode", "decode --json", "send", "send --json", "recording",
}  # fmt: skip


@pytest.mark.parametrize("concealed", [True, False])
def test_no_secret_is_in_any_output_log_or_recording(
    broker: StartBroker, policy: str, tmp_path: Path, concealed: bool
) -> None:
    environment = {}
    if not concealed:
        (tmp_path / "sitecustomize.py").write_text(UNCONCEALED)
        environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    witness = Witness()
    to = broker(policy, keeper=True, environment=environment)
    found = surfaces(to, tmp_path, witness, environment)
    assert len(witness.secrets) >= 3 + 2 * 5
    leaking = {name for name, data in found.items() if witness.finds(data)}
    assert leaking == (set() if concealed else SHOWING)
    assert all(found.values())
