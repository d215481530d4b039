"""What a holder of a debug enclave's descriptor can read, the broker keeps from other owners."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from backends import sgx_only
from images import BuiltImage, Images
from running_broker import RunningBroker
from sharing import DEVICE

import teemate
from teemate.image import SigParams

pytestmark = [
    sgx_only("how a descriptor of the driver is shared (TEEMATE_TEST_BACKEND=sgx)"),
    pytest.mark.skipif(
        not DEVICE.exists(), reason=f"no {DEVICE} here: tests/machine/run boots a machine that has it"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="the test speaks as two users"),
]

NOBODY = 65534

# The imports come first: the interpreter may lie where only root can read.
CLIENT = """
import importlib, os, sys
import teemate, teemate._broker, teemate._grant, teemate._slot
uid = int(sys.argv[2])
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
try:
    with teemate.connect(sys.argv[1]) as broker, broker.attach("raw", slots=1) as enclave:
        with enclave.slot() as slot:
            print("called", slot.enter(rdi=9).rdi)
except teemate.Error as error:
    print(type(error).__name__)
"""


@pytest.fixture
def image(images: Images) -> BuiltImage:
    return images.build("raw", heap="64K", sign=SigParams(debug_allowed=True))


def policy(image: BuiltImage, *settings: str) -> str:
    lines = "\n".join(settings)
    return f"""
[[enclave]]
name = "raw"
image = "{image.sgxs}"
sigstruct = "{image.sigstruct}"
require_sdk = false
owner = 0
{lines}
[[enclave.attach]]
uid = 0
[[enclave.attach]]
uid = {NOBODY}
"""


def attach_as(broker: RunningBroker, uid: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, broker.socket, str(uid)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_debug_enclave_is_its_owners_alone(broker: Callable[..., RunningBroker], image: BuiltImage) -> None:
    running = broker(policy(image, "debug = true"))
    assert attach_as(running, NOBODY) == "Denied"
    assert attach_as(running, 0) == "called 1"
    (denial,) = running.audit("denial")
    assert "debug enclaves are never shared" in str(denial)


def test_a_release_enclave_can_be_shared_by_a_policy_that_says_so(
    broker: Callable[..., RunningBroker], image: BuiltImage
) -> None:
    running = broker(policy(image, 'share_between_owners = "unfenced"'))
    assert attach_as(running, NOBODY) == "called 1"
    assert attach_as(running, 0) == "called 2"


def test_a_policy_that_would_share_a_debug_enclave_is_refused(
    broker: Callable[..., RunningBroker], image: BuiltImage
) -> None:
    with pytest.raises(AssertionError, match="never shared between owners"):
        broker(policy(image, "debug = true", 'share_between_owners = "unfenced"'))


def test_the_brokers_clients_of_a_debug_enclave_can_read_it_and_those_of_another_cannot(
    broker: Callable[..., RunningBroker], image: BuiltImage
) -> None:
    """Why the policy is what it is: reading takes nothing but the mapping that every client has."""
    for settings, readable in (("debug = true",), True), ((), False):
        running = broker(policy(image, *settings))
        with teemate.connect(running.socket) as connection, connection.attach("raw", slots=1) as enclave:
            with enclave.slot() as slot:
                assert slot.enter(rdi=9).rdi == 1
                with open("/proc/self/mem", "rb", buffering=0) as memory:
                    memory.seek(enclave.base)
                    if readable:
                        assert memory.read(64) == image.sgxs.read_bytes()[192:256]
                    else:
                        with pytest.raises(OSError, match="Input/output error"):
                            memory.read(64)
