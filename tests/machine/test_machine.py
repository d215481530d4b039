"""The machine itself: what a command sees in it, and what comes back."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import machine
import pytest
import tsc
from machine import Machine


def sh(script: str, **options: object) -> tuple[int, str, str]:
    done = machine.run(["sh", "-c", script], **options)  # type: ignore[arg-type]
    return done.returncode, done.stdout, done.stderr


def test_output_errors_and_exit_status_come_back() -> None:
    assert sh("echo out; echo err >&2; exit 7") == (7, "out\n", "err\n")


def test_the_command_gets_the_directory_and_the_environment_that_it_was_given(tmp_path: Path) -> None:
    status, output, _ = sh('pwd; echo "$GREETING"', directory=tmp_path, env={"GREETING": "it's $HOME"})
    assert (status, output) == (0, f"{tmp_path}\nit's $HOME\n")


def test_what_the_guest_writes_stays_there_unless_the_folder_is_shared(tmp_path: Path) -> None:
    kept, shared = tmp_path / "kept", tmp_path / "shared"
    kept.mkdir()
    shared.mkdir()
    (kept / "old").write_text("old")
    script = f"cat {kept}/old; echo new >{kept}/old; echo new >{shared}/new; cat {kept}/old"
    assert sh(script, shares=[shared])[:2] == (0, "oldnew\n")
    assert (kept / "old").read_text() == "old"
    assert (shared / "new").read_text() == "new\n"


def test_the_project_is_installed_in_there() -> None:
    code = "import teemate, sys; print(sys.prefix, teemate.__name__)"
    done = machine.run(["python", "-c", code])
    assert (done.returncode, done.stdout) == (0, f"{sys.prefix} teemate\n"), done.stderr


def test_a_command_that_takes_too_long_is_ended_with_124_and_what_was_going_on_is_told(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert sh("sleep 1000", timeout=15)[0] == machine.TIME_LIMIT
    told = capfd.readouterr().err
    assert "VM status: running" in told
    assert "RIP=" in told
    assert "console's last lines" in told


def test_processes_that_are_left_behind_do_not_keep_the_machine_running() -> None:
    assert sh("sleep 1000 & echo done")[:2] == (0, "done\n")


def test_a_user_without_privileges_can_be_had_in_there() -> None:
    script = "id -u; grep CapEff /proc/self/status; cd; pwd; : </dev/sgx_enclave"
    status, output, errors = sh(script, user="user")
    assert output == "1000\nCapEff:\t0000000000000000\n/home/user\n"
    assert status != 0
    assert "sgx_enclave" in errors


@pytest.mark.parametrize(
    ("processor", "flags", "devices"),
    [
        ((), {"sgx", "sgx_lc"}, True),
        (("sgx2=off",), {"sgx", "sgx_lc"}, True),
        # Linux's driver does not start without flexible launch control; the flag stays.
        (("sgxlc=off",), {"sgx"}, False),
        (("sgx=off",), set(), False),
    ],
)
def test_processors_with_less_of_sgx_can_be_had(
    processor: tuple[str, ...], flags: set[str], devices: bool
) -> None:
    script = "grep -m1 -ow -e sgx /proc/cpuinfo; grep -m1 -ow sgx_lc /proc/cpuinfo; ls /dev/sgx_enclave"
    _, output, _ = sh(script, machine=Machine(processor=processor))
    assert set(output.split()) == flags | ({"/dev/sgx_enclave"} if devices else set())


def test_the_epc_has_the_size_that_was_asked_for() -> None:
    script = "cat /sys/devices/system/node/node0/x86/sgx_total_bytes"
    assert sh(script, machine=Machine(epc="96M"))[1] == f"{96 << 20}\n"


def test_the_guest_knows_how_fast_its_clock_counts_whatever_else_this_host_does() -> None:
    megahertz = re.search(r"tsc: Detected (\S+) MHz", sh("dmesg")[1])
    assert megahertz is not None
    frequency = tsc.frequency()
    assert frequency is not None
    assert abs(float(megahertz[1]) * 1000 / frequency - 1) < 0.01


def test_namespaces_and_mounts_work_as_on_a_real_machine() -> None:
    script = (
        "unshare -m sh -c 'mount -t tmpfs none /mnt && mount -o remount,noexec /dev"
        " && grep -c /dev.*noexec /proc/mounts' && mount -t debugfs none /sys/kernel/debug"
        " && ls -d /sys/kernel/debug/x86 && setpriv --reuid=1000 id -u"
    )
    assert sh(script)[1].split() == ["1", "/sys/kernel/debug/x86", "1000"]
