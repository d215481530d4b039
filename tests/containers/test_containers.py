"""Programs in real containers that have nothing but the broker's socket share one enclave."""

from __future__ import annotations

import errno
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from backends import BACKEND
from images import Images
from runc import HOST_UID, SECCOMP, Container, Root, start
from running_broker import RunningBroker

import teemate
from teemate.broker.connections.cgroups import find_tree

Broker = Callable[..., RunningBroker]

PYTHON = """
import os, sys, teemate
from teemate.vault import Vault
broker = teemate.connect()
enclave = broker.attach("vault")
slot = enclave.slot().__enter__()
vault = Vault(slot)
print("attached", flush=True)
for line in sys.stdin:
    verb, *words = line.split()
    if verb == "put":
        vault.put(words[0].encode(), words[1].encode())
        print("ok", flush=True)
    elif verb == "get":
        print(vault.get(words[0].encode()).value.decode(), flush=True)
"""
LOOK = """
import json, os, socket, teemate
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
found = {"capabilities": [status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]}
found |= {"pid": os.getpid(), "links": [name for _, name in socket.if_nameindex()]}
found["devices"] = sorted(os.listdir("/dev"))
try:
    open("/new", "w")
    found["written"] = True
except OSError as error:
    found["written"] = error.strerror
with teemate.connect() as broker, broker.attach("vault") as enclave, enclave.slot() as slot:
    found["reply"] = slot.call("echo", b"from a container").decode()
print(json.dumps(found))
"""


def policy(images: Images, *, attach: str = "", extra: str = "", slots: int | None = None) -> str:
    vault = images.vault if slots is None else images.build("vault", slots=slots, heap="4M")
    return f"""
[broker]
trust_pid = true
warden_deadline = 60.0
[administrators]
uids = [0]
[[enclave]]
name = "vault"
image = "{vault.sgxs}"
sigstruct = "{vault.sigstruct}"
owner = {HOST_UID}
{extra}
[[enclave.attach]]
uid = {HOST_UID}
{attach}
"""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def ask(container: Container, text: str) -> str:
    assert container.process.stdin is not None
    container.process.stdin.write(text + "\n")
    container.process.stdin.flush()
    return container.output.readline().strip()


def attached(container: Container) -> Container:
    line = container.output.readline()
    if line != "attached\n":
        raise AssertionError(line + container.output.read())
    return container


def test_a_container_has_nothing_but_the_socket_and_calls_into_the_enclave(
    broker: Broker, images: Images, python: Root
) -> None:
    running = broker(policy(images))
    with start(python, ["python", "-c", LOOK], running.socket) as container:
        told = container.output.read()
    found = json.loads(told.splitlines()[-1])
    assert found["reply"] == "from a container"
    assert set(found["capabilities"]) == {"0" * 16}
    assert found["pid"] == 1
    assert found["links"] == ["lo"]
    assert found["written"] == "Read-only file system"
    assert not [name for name in found["devices"] if "sgx" in name]


def test_two_containers_of_different_kinds_share_one_vault_and_one_outlives_the_other(
    broker: Broker,
    images: Images,
    python: Root,
    bare: Root,
    stack: ExitStack,
    capsys: pytest.CaptureFixture[str],
) -> None:
    running = broker(policy(images))
    first = attached(stack.enter_context(start(python, ["python", "-c", PYTHON], running.socket)))
    second = attached(stack.enter_context(start(bare, ["/program"], running.socket)))
    assert ask(first, "put name Ada") == "ok"
    assert ask(second, "get name") == "Ada"
    assert ask(second, "put town London") == "ok"
    assert ask(first, "get town") == "London"

    administrator = stack.enter_context(teemate.connect(running.socket))
    (before,) = administrator.enclaves()
    free = before.slots.free
    pidfd = os.pidfd_open(second.init())
    second.kill()
    select.select([pidfd], [], [])  # its process has ended
    ended = time.monotonic()
    while administrator.enclaves()[0].slots.free != free + 1:
        administrator.ping()
    milliseconds = (time.monotonic() - ended) * 1000
    os.close(pidfd)
    assert ask(first, "get town") == "London"
    with capsys.disabled():
        print(f"\nthe slot of a killed container was free again after {milliseconds:.1f} ms")


def test_containers_of_one_user_are_told_apart_by_their_control_groups(
    broker: Broker, images: Images, bare: Root
) -> None:
    running = broker(policy(images, attach='cgroup = "/teemate-test/payments-*"'))
    with start(bare, ["/program"], running.socket, group="/teemate-test/payments-1") as container:
        attached(container)
    with start(bare, ["/program"], running.socket, group="/teemate-test/other-1") as container:
        assert container.output.readline().startswith("denied:")
    (denial,) = running.audit("denial")
    assert denial["cgroup"] == "/teemate-test/other-1"
    assert "no [[enclave.attach]] matches" in str(denial["missing_rule"])
    (grant,) = running.audit("grant")
    assert grant["cgroup"] == "/teemate-test/payments-1"


def test_what_lies_below_a_delegated_group_does_not_count(broker: Broker, images: Images, bare: Root) -> None:
    """Whoever may write a group can make groups below it, with any name, and put processes into them."""
    running = broker(policy(images, attach='cgroup = "/teemate-test/delegated/payments"'))
    parent = Path(find_tree().mount) / "teemate-test/delegated"
    parent.mkdir(parents=True)
    try:
        group = "/teemate-test/delegated/payments"
        with start(bare, ["/program"], running.socket, group=group) as container:
            attached(container)  # as long as only root may write it
        os.chown(parent, 12345, -1)
        with start(bare, ["/program"], running.socket, group=group) as container:
            assert container.output.readline().startswith("denied:")
    finally:
        for folder in (parent / "payments", parent):
            if folder.exists():
                folder.rmdir()


def test_values_of_containers_are_apart_when_the_policy_says_so(
    broker: Broker, images: Images, python: Root, stack: ExitStack
) -> None:
    running = broker(policy(images, extra='identity = "uid+cgroup"'))
    script = """
import sys, teemate
from teemate.vault import PRIVATE, Vault
with teemate.connect() as broker, broker.attach("vault") as enclave, enclave.slot() as slot:
    vault = Vault(slot, PRIVATE)
    found = vault.get(b"secret")
    vault.put(b"secret", b"mine")
    print(found.value.decode() if found else "nothing")
"""
    told = []
    for group in ("a", "b", "a"):
        arguments = ["python", "-c", script]
        with start(python, arguments, running.socket, group=f"/teemate-test/{group}") as container:
            told.append(container.output.read().strip())
    assert told == ["nothing", "nothing", "mine"]


def sgx_ioctls(container: Container) -> set[int]:
    assert ask(attached(container), "put name Ada") == "ok"
    return {int(word) for word in ask(container, "ioctl").split()}


def test_the_seccomp_profile_lets_a_client_work_and_keeps_every_sgx_ioctl_from_it(
    broker: Broker, images: Images, bare: Root
) -> None:
    """Those of SGX2 change pages of an enclave that others are in."""
    running = broker(policy(images))
    with start(bare, ["/program"], running.socket, seccomp=SECCOMP) as container:
        assert sgx_ioctls(container) == {errno.EPERM}
    with start(bare, ["/program"], running.socket) as container:
        without = sgx_ioctls(container)
    assert errno.EPERM not in without
    if BACKEND == "sgx":  # the driver has looked at them
        assert {errno.EFAULT, errno.EINVAL} & without


def test_64_containers_that_are_started_at_once_work_in_one_enclave(
    broker: Broker,
    images: Images,
    bare: Root,
    stack: ExitStack,
    capsys: pytest.CaptureFixture[str],
) -> None:
    count = 64 if "TEEMATE_IN_MACHINE" not in os.environ else 4
    running = broker(policy(images, slots=count))
    before = _memory(running.pid)
    containers = [stack.enter_context(start(bare, ["/program"], running.socket)) for _ in range(count)]
    for number, container in enumerate(containers):
        assert ask(attached(container), f"put key{number} value{number}") == "ok"
    for number, container in enumerate(containers):
        other = (number + 1) % count
        assert ask(container, f"get key{other}") == f"value{other}"
    with teemate.connect(running.socket) as administrator:
        (vault,) = administrator.enclaves()
        assert (vault.clients, vault.slots.free) == (count, 0)
    with capsys.disabled():
        grown = (_memory(running.pid) - before) / count / 1024
        print(f"\n{count} containers in one enclave; the broker grew by {grown:.0f} KiB for each")


def _memory(pid: int) -> int:
    """Private bytes of a process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
    return sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")) * 1024
