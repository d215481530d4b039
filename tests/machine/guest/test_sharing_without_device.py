"""Clients without any device: no node, no permission, no exec on /dev; the broker's descriptor is enough.

Everything here happens in mount namespaces of their own, so the machine's /dev stays as it is.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from backends import sgx_only
from images import BuiltImage, Images
from running_broker import RunningBroker, run_broker
from sharing import DEVICE, PROT_EXEC, PROT_READ, Operation, Raw, Stranger, map_bare

pytestmark = [
    sgx_only("how a descriptor of the driver is shared (TEEMATE_TEST_BACKEND=sgx)"),
    pytest.mark.skipif(
        not DEVICE.exists(), reason=f"no {DEVICE} here: tests/machine/run boots a machine that has it"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="mount namespaces are root's to make"),
]

NOBODY = 65534

BARE_DEV = "mount -t tmpfs -o noexec,mode=755 tmpfs /dev && mknod -m 666 /dev/null c 1 3"
"""As a container's: no node of SGX's, and nothing in it could be executed."""
NOEXEC_DEV = "mount -o remount,bind,noexec /dev"


@pytest.fixture
def image(images: Images) -> BuiltImage:
    return images.build("raw", heap="64K")


def in_namespace(setup: str) -> tuple[str, ...]:
    """What to put before a command so that it runs in a mount namespace that `setup` has changed."""
    script = f'mount --make-rprivate / && mount --bind /dev /dev && {setup} && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", script, "sh")


TRY = """
import importlib, os, sys
from pathlib import Path
import teemate, teemate._private, teemate._slot, teemate.doctor
teemate.doctor.why_not_sgx()  # so that all of it is loaded
sgxs, sigstruct, uid = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]).read_bytes(), int(sys.argv[3])
if uid:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
try:
    os.close(os.open("/dev/sgx_enclave", os.O_RDWR))
    print("device: opened")
except OSError as error:
    print("device:", error.strerror)
try:
    with teemate.create_enclave(sgxs, sigstruct, "sgx") as enclave, enclave.slot() as slot:
        print("called", slot.enter(rdi=9).rdi)
except teemate.Error as error:
    print(type(error).__name__ + ":", error.message)
"""


def try_alone(image: BuiltImage, launcher: tuple[str, ...] = (), uid: int = 0) -> tuple[str, str]:
    """Try to open the device, then to make an enclave of one's own; what came of it."""
    done = subprocess.run(
        [*launcher, sys.executable, "-c", TRY, str(image.sgxs), str(image.sigstruct), str(uid)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    device, created = done.stdout.splitlines()
    return device, created


def test_where_dev_is_noexec_an_enclave_can_be_opened_but_not_mapped_and_the_error_says_so(
    image: BuiltImage,
) -> None:
    assert try_alone(image, in_namespace("true")) == ("device: opened", "called 1")
    device, created = try_alone(image, in_namespace(NOEXEC_DEV))
    assert device == "device: opened"
    assert created.split(":")[0] in ("Denied", "Unsupported"), created
    assert "noexec" in created
    assert "exec" in created.replace("noexec", "")  # what to do


def test_a_descriptor_from_where_dev_may_execute_can_be_mapped_where_it_may_not(image: BuiltImage) -> None:
    with Raw.create(image) as raw, Stranger(launcher=in_namespace(NOEXEC_DEV)) as stranger:
        stranger.give(raw)
        assert stranger.call(Operation.COUNT) == 1
        assert raw.map().call(Operation.COUNT, tcs=1) == 2


def test_it_is_the_mount_of_who_opened_the_device_that_counts() -> None:
    """The control: a descriptor from where /dev is noexec can be mapped for execution nowhere."""
    for setup, error in (("true", 0), (NOEXEC_DEV, errno.EPERM)):
        with Stranger(launcher=in_namespace(setup)) as stranger:
            fd = stranger.device()
            assert map_bare(fd, 0, 4096, PROT_READ) == 0
            assert map_bare(fd, 0, 4096, PROT_READ | PROT_EXEC) == error
            os.close(fd)


# ---- through a broker ----------------------------------------------------------------------------------

# The imports come first: the interpreter may lie where only root can read.
CLIENT = """
import importlib, os, sys
import teemate, teemate._broker, teemate._grant, teemate._slot
socket, uid = sys.argv[1], int(sys.argv[2])
if uid:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
try:
    os.close(os.open("/dev/sgx_enclave", os.O_RDWR))
    print("device: opened")
except OSError as error:
    print("device:", error.strerror)
with teemate.connect(socket) as broker, broker.attach("raw", slots=1) as enclave, enclave.slot() as slot:
    for line in open("/proc/self/maps"):
        if "sgx_enclave" in line and line.split()[1] == "r-xs":  # its path ends where this /dev begins
            print("code mapped")
    print("called", slot.enter(rdi=9).rdi)
"""


@pytest.fixture
def served(image: BuiltImage) -> Iterator[Callable[[int], RunningBroker]]:
    """A broker with the enclave for one owner: `served(uid)`."""
    from contextlib import ExitStack

    with ExitStack() as running:

        def start(owner: int) -> RunningBroker:
            return running.enter_context(
                run_broker(
                    f"""
[[enclave]]
name = "raw"
image = "{image.sgxs}"
sigstruct = "{image.sigstruct}"
require_sdk = false
owner = {owner}
[[enclave.attach]]
uid = {owner}
"""
                )
            )

        yield start


def attach(broker: RunningBroker, uid: int, launcher: tuple[str, ...] = ()) -> list[str]:
    done = subprocess.run(
        [*launcher, sys.executable, "-c", CLIENT, broker.socket, str(uid)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_client_without_any_node_and_with_dev_noexec_attaches_and_calls(
    served: Callable[[int], RunningBroker],
) -> None:
    said = attach(served(0), 0, in_namespace(BARE_DEV))
    assert said == [f"device: {os.strerror(errno.ENOENT)}", "code mapped", "called 1"]


def test_a_client_of_another_user_without_permission_and_group_attaches_and_calls(
    served: Callable[[int], RunningBroker],
) -> None:
    node = DEVICE.stat()
    assert node.st_mode & 0o007 == 0
    said = attach(served(NOBODY), NOBODY)
    assert said == [f"device: {os.strerror(errno.EACCES)}", "code mapped", "called 1"]


def test_all_of_it_at_once(served: Callable[[int], RunningBroker]) -> None:
    broker = served(NOBODY)
    said = attach(broker, NOBODY, in_namespace(BARE_DEV))
    assert said == [f"device: {os.strerror(errno.ENOENT)}", "code mapped", "called 1"]
    assert attach(broker, NOBODY)[1:] == ["code mapped", "called 2"]


def test_without_a_node_nothing_can_be_created_and_the_error_says_what_is_missing(image: BuiltImage) -> None:
    device, created = try_alone(image, in_namespace(BARE_DEV))
    assert device == f"device: {os.strerror(errno.ENOENT)}"
    assert created.startswith("Unsupported:")
    assert str(DEVICE) in created


def test_without_permission_nothing_can_be_created_and_the_error_says_what_is_missing(
    image: BuiltImage,
) -> None:
    device, created = try_alone(image, uid=NOBODY)
    assert device == f"device: {os.strerror(errno.EACCES)}"
    assert created.split(":")[0] in ("Unsupported", "Denied"), created
    assert str(DEVICE) in created
    assert "ermission" in created or "group" in created
