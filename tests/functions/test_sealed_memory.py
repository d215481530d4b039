"""A sealed function is seen by nobody but who sealed it and the enclave, not even by who deploys it."""

from __future__ import annotations

import os
import random
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import modules as wasm
import pytest
from backends import BACKEND
from function_enclaves import functions_image
from plaintext import build_listener, memory
from running_broker import RunningBroker

from teemate.demo._memory import children
from teemate.functions import Offer, seal
from teemate.functions import _wire as wire

PART = 24
DEPLOYER = "deployer-of-functions"
PROGRAM = """
import sys, teemate
from teemate.functions import Offer
socket, client, sealed = sys.argv[1:]
def told(offer):
    for field in (offer.key, bytes.fromhex(offer.owner), offer.nonce, offer.report):
        sys.stdout.buffer.write(field)
    sys.stdout.buffer.flush()
    return read()
def read():
    return sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(4), "little"))
with teemate.connect(socket, client=client) as broker:
    functions = broker.functions
    if sealed == "sealed":
        info = functions.deploy_sealed("secret", told)
    else:
        functions._call("deploy", read(), "secret", None)
    assert functions.invoke("secret") == b"done"
    enclave = functions._enclave
    sys.stdout.buffer.write(enclave.base.to_bytes(8, "little") + enclave.size.to_bytes(8, "little"))
    sys.stdout.buffer.flush()
    sys.stdin.buffer.read(1)
"""

pytestmark = pytest.mark.skipif(BACKEND == "sgx", reason="reads all memory of processes: it takes long there")


class Secrets:
    """A module and an environment with texts that are nowhere else."""

    def __init__(self) -> None:
        dice = random.Random(8)
        self.texts = ["".join(dice.choices(string.ascii_letters, k=3 * PART)) for _ in range(2)]
        data, setting = self.texts
        self.module = wasm.command(wasm.write(1, 0, 4), data=b"done" + data.encode())
        self.env = {"SETTING": setting}

    def found(self, data: bytes) -> bool:
        """Whether a part of one is there."""
        parts = (text[at : at + PART] for text in self.texts for at in (0, PART, 2 * PART))
        return any(part.encode() in data for part in parts)


def upload(process: subprocess.Popen[bytes], secrets: Secrets, how: str) -> range:
    """Let the process deploy; returns where the enclave lies."""
    assert process.stdin is not None
    assert process.stdout is not None
    if how == "sealed":
        key, owner, nonce = (process.stdout.read(32) for _ in range(3))
        offer = Offer(key=key, owner=owner.hex(), nonce=nonce, report=process.stdout.read(432))
        request = seal(offer, "secret", secrets.module, env=secrets.env)
    else:
        request = wire.deploy("secret", secrets.module, None, secrets.env, replace=False)
    process.stdin.write(len(request).to_bytes(4, "little") + request)
    process.stdin.flush()
    base, size = (int.from_bytes(process.stdout.read(8), "little") for _ in range(2))
    assert size
    return range(base, base + size)


def places(
    running: RunningBroker, folder: Path, secrets: Secrets, how: str
) -> Iterator[tuple[str, bytes, str]]:
    """Where is looked, what is there, and what has to be found so that looking is worth something."""
    command = [sys.executable, "-c", PROGRAM, running.socket, DEPLOYER, how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            elrange = upload(process, secrets, how)
            yield "deployer", memory(process.pid, elrange), DEPLOYER
            arena = elrange.stop + 4096
            with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as file:
                file.seek(arena)
                yield "arena", file.read(4096), ""
            for pid in [running.pid, *children(running.pid)]:
                program = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].rpartition(b"/")[2].decode()
                )
                known = "" if program.startswith("teemate") else DEPLOYER
                yield program if not known else "broker", memory(pid, elrange), known
        finally:
            process.kill()
    yield "messages", (folder / "heard").read_bytes(), DEPLOYER
    yield "log", running.log_file.read_bytes(), "grant"
    kept = [path for path in (folder / "state").rglob("*") if path.is_file()]
    yield "files", b"".join(path.read_bytes() for path in kept), ""


def seen(running: RunningBroker, folder: Path, how: str) -> set[str]:
    """Where a part of the function was seen."""
    secrets = Secrets()
    looked, found = set(), set()
    for name, data, known in places(running, folder, secrets, how):
        assert known.encode() in data, f"{name}: not even {known!r} is found"
        looked.add(name)
        if secrets.found(data):
            found.add(name)
    assert looked >= {"deployer", "arena", "broker", "teemate-warden", "messages", "log", "files"}
    return found


@pytest.fixture
def running(broker: Callable[..., RunningBroker], tmp_path: Path) -> RunningBroker:
    attach = f"[[enclave.attach]]\nuid = {os.geteuid()}\n"
    policy = f'[broker]\nstate_directory = "{tmp_path / "state"}"\n'
    policy += f'[[enclave]]\nname = "functions"\nimage = "{functions_image()}"\n{attach}'
    environment = {"LD_PRELOAD": str(build_listener(tmp_path)), "HEARD": str(tmp_path / "heard")}
    return broker(policy, environment=environment)


def test_a_sealed_function_is_nowhere_outside_of_the_enclave(running: RunningBroker, tmp_path: Path) -> None:
    assert seen(running, tmp_path, "sealed") == set()


def test_what_is_not_sealed_is_with_who_deploys_it(running: RunningBroker, tmp_path: Path) -> None:
    assert seen(running, tmp_path, "plain") == {"deployer"}
