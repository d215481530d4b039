"""The broker as a service of a real systemd, on Linux's driver: nothing loses what it has stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import machine
import pytest
from images import Images
from machine import Machine

SERVICE = machine.HERE / "guest" / "service"
LIFE = machine.HERE / "guest" / "service_life.py"


def build_wheel(folder: Path) -> Path:
    """Have pip make of the source what anybody would install."""
    # Where what builds it is installed, nothing is fetched for that.
    ours = [] if find_spec("mesonpy") is None else ["--no-build-isolation"]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            *ours,
            "--wheel-dir",
            folder,
            machine.PROJECT,
        ],
        env={**os.environ, "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"},
        check=True,
    )
    (wheel,) = folder.glob("teemate-*.whl")
    return wheel


def run(folder: Path, drop_in: str = "") -> subprocess.CompletedProcess[str]:
    vault = Images(folder).build("vault", slots=4, heap="1M")
    return machine.run(
        [SERVICE, LIFE, vault.sgxs],
        # Little of it is done at the same time, and a second processor costs the host half as much again.
        machine=Machine(systemd=True, epc="64M", memory="3G", cpus=1),
        env={"DROP_IN": drop_in, "WHEEL": str(build_wheel(folder))},
        timeout=900,
    )


def test_a_grant_outlives_restart_kill_reload_and_watchdog_of_the_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    survived = [finding["after"] for finding in findings if finding["finding"] == "nothing lost"]
    assert survived[:3] == ["systemctl restart", "kill -9", "watchdog"]
    with capsys.disabled():
        print(f"\n{done.stdout}{done.stderr}")


@pytest.mark.skipif(
    os.environ.get("TEEMATE_MACHINE_ALL") != "1", reason="a control, in minutes: TEEMATE_MACHINE_ALL=1"
)
def test_without_a_descriptor_store_the_same_grant_is_lost(tmp_path: Path) -> None:
    done = run(tmp_path, "FileDescriptorStoreMax=0\nEnvironment=FDSTORE=")
    assert done.returncode != 0
    assert "socket activation" in done.stdout
    assert "nothing lost" not in done.stdout
    assert "ConnectionLost" in done.stderr
