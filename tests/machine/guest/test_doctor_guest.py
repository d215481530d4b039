"""``teemate doctor`` on Linux's driver, in every state that root can put this machine into.

Each state is made in a child, in a mount namespace of its own, and the doctor runs right there.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running_broker import run_broker

import teemate
from teemate.doctor import diagnose, this_host, why_not_sgx
from teemate.image import shipped

_CLONE_NEWNS = 0x00020000
_READ_IMPLIES_EXEC = 0x0400000
_libc = ctypes.CDLL(None, use_errno=True)

this_host()  # imports what a child that has become another user may not read

pytestmark = [
    pytest.mark.skipif(
        not os.path.exists("/dev/sgx_enclave"),
        reason="needs /dev/sgx_enclave; run with: tests/machine/run pytest tests/machine/guest",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can put the machine into these states"),
]


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def own_mounts() -> None:
    """What this process mounts from now on is its own."""
    assert _libc.unshare(_CLONE_NEWNS) == 0
    mount("--make-rprivate", "/")


def told(prepare: Callable[[], None], socket: str = "/nonexistent/broker.sock") -> dict[str, Any]:
    """What the doctor says in a child that has been prepared, and what a refusal would say."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            prepare()
            diagnosis = diagnose(socket=socket)
            answer = {**diagnosis.as_json(), "refusal": why_not_sgx()}
            with os.fdopen(writing, "w") as file:
                json.dump(answer, file)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    assert text, "the child ended without an answer: see its traceback"
    answer: dict[str, Any] = json.loads(text)
    answer["by"] = {check["id"]: check for check in answer["checks"]}
    return answer


def refused(answer: dict[str, Any], identifier: str) -> str:
    """Sgx does not work, the sim does, and that check is the reason; returns what it found."""
    assert answer["backends"]["sgx"] is False
    assert answer["auto"] == "sim"
    check = answer["by"][identifier]
    assert check["status"] == "problem", check
    assert answer["auto_reason"].startswith(f"{check['title']}: {check['found']}; {check['advice']}")
    assert answer["refusal"].startswith(answer["auto_reason"])
    found: str = check["found"]
    return found


def test_on_a_machine_with_sgx_both_backends_run_an_enclave_and_nothing_is_a_problem() -> None:
    answer = told(lambda: None)
    assert answer["backends"] == {"sgx": True, "sim": True}
    assert (answer["auto"], answer["auto_reason"]) == ("sgx", "")
    assert [check for check in answer["checks"] if check["status"] == "problem"] == []
    ids = ("processor", "firmware", "launch-control", "kernel-driver", "device", "device-exec", "vdso")
    assert {answer["by"][name]["status"] for name in ids} == {"ok"}
    epc = Path("/sys/devices/system/node/node0/x86/sgx_total_bytes").read_text()
    assert answer["by"]["epc"]["found"].startswith(f"node 0: {int(epc) >> 20} MiB")


def test_a_noexec_dev_is_found_by_mapping_the_device() -> None:
    def noexec() -> None:
        own_mounts()
        mount("-o", "remount,bind,noexec", "/dev")

    assert refused(told(noexec), "device-exec").endswith("/dev is mounted noexec")


def test_a_missing_node_is_told_from_a_missing_driver() -> None:
    def empty_dev() -> None:
        own_mounts()
        mount("-t", "tmpfs", "tmpfs", "/dev")

    answer = told(empty_dev)
    assert answer["by"]["kernel-driver"]["status"] == "ok"
    assert refused(answer, "device").startswith("the kernel has the driver")


def test_a_node_with_a_number_that_no_driver_has_is_found() -> None:
    def wrong_node() -> None:
        own_mounts()
        mount("-t", "tmpfs", "tmpfs", "/dev")
        os.mknod("/dev/sgx_enclave", 0o20666, os.makedev(10, 254))

    assert "no driver stands behind it" in refused(told(wrong_node), "device")


def test_a_user_who_may_not_open_the_device_hears_its_mode_and_own_groups() -> None:
    def become_user() -> None:
        os.setgroups([])
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)

    found = refused(told(become_user), "device")
    assert "not permitted: mode 0600" in found
    assert "this process has uid 1000 and groups" in found


def test_a_user_in_the_device_s_group_can_run_an_enclave() -> None:
    def in_the_group() -> None:
        own_mounts()
        mount("-t", "tmpfs", "tmpfs", "/dev")
        minor = next(
            line.split()[0] for line in Path("/proc/misc").read_text().splitlines() if "sgx_enclave" in line
        )
        os.mknod("/dev/sgx_enclave", 0o20000, os.makedev(10, int(minor)))
        os.chmod("/dev/sgx_enclave", 0o660)
        os.chown("/dev/sgx_enclave", 0, 777)
        os.setgroups([777])
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)

    answer = told(in_the_group)
    assert answer["by"]["device"]["status"] == "ok"
    assert answer["by"]["device-exec"]["status"] == "ok"
    assert answer["auto"] == "sgx"
    image = shipped("bare").sgxs.resolve()
    if all(folder.stat().st_mode & 0o001 for folder in image.parents):  # others may read it
        assert answer["backends"]["sgx"] is True


@pytest.fixture
def device_group(tmp_path: Path) -> Iterator[Path]:
    """A device control group in which nothing may be opened."""
    top = tmp_path / "devices"
    top.mkdir()
    mount("-t", "cgroup", "-o", "devices", "cgroup", str(top))
    group = top / "closed"
    group.mkdir()
    (group / "devices.deny").write_text("a")
    yield group
    group.rmdir()
    subprocess.run(["umount", str(top)], check=True)


def test_a_device_control_group_is_told_from_the_node_s_mode(device_group: Path) -> None:
    def enter_group() -> None:
        (device_group / "cgroup.procs").write_text(str(os.getpid()))

    found = refused(told(enter_group), "device")
    assert "opening it is not permitted whatever the mode" in found


def test_read_implies_exec_is_found() -> None:
    def personality() -> None:
        assert _libc.personality(_READ_IMPLIES_EXEC) >= 0

    answer = told(personality)
    assert answer["backends"]["sgx"] is False
    assert "READ_IMPLIES_EXEC" in answer["by"]["device-exec"]["found"]


def test_a_limit_on_the_address_space_is_found() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))

    assert "RLIMIT_AS" in told(limit)["by"]["address-window"]["found"]


def test_the_provision_device_is_no_reason() -> None:
    def without_provision() -> None:
        own_mounts()
        mount("--bind", "/proc/version", "/dev/sgx_provision")
        os.setgroups([])

    answer = told(without_provision)
    assert answer["backends"]["sgx"] is True


def test_a_private_enclave_of_somebody_is_seen() -> None:
    image = shipped("bare")
    with teemate.create_enclave(image.sgxs, image.sigstruct, backend="sgx"):
        check = told(lambda: None)["by"]["holders"]
    assert check["status"] == "warning"
    assert f"{os.getpid()} (" in check["found"]
    assert told(lambda: None)["by"]["holders"]["status"] == "ok"


@pytest.mark.parametrize("backend", ["sgx", "sim"])
def test_an_enclave_that_outlives_its_broker_is_seen_with_who_holds_it(backend: str) -> None:
    image = shipped("bare")
    policy = (
        f'[broker]\nbackend = "{backend}"\n[[enclave]]\nname = "bare"\nimage = "{image.sgxs}"\n'
        "require_sdk = false\n[[enclave.attach]]\nuid = 0\n"
    )
    with run_broker(policy, expect_errors=True, arguments=("--backend", backend)) as running:
        with teemate.connect(running.socket) as broker:
            with broker.attach("bare"):
                me = f"{os.getpid()} ("
                governed = told(lambda: None, running.socket)["by"]
                assert me not in governed["holders"]["found"]
                assert f"backend {backend}" in governed["socket"]["found"]
                os.kill(running.pid, 9)
                os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)
                left = told(lambda: None, running.socket)["by"]
                assert "nobody listens" in left["socket"]["found"]
                assert left["holders"]["status"] == "warning"
                assert me in left["holders"]["found"]
