"""Containers on Linux's driver, on a kernel with nothing but the unified hierarchy of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import machine
import pytest
from elves import kept_builds
from images import Images
from machine import Machine

CONTAINERS = machine.PROJECT / "tests" / "containers" / "test_containers.py"
# What depends on kernel and driver.  The others take a Python in a container each: for TEEMATE_MACHINE_ALL=1.
DEPENDENT = "told_apart or delegated or seccomp"


def test_containers_work_on_the_driver_with_control_groups_v2_and_their_ioctls_are_denied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    builds = kept_builds()
    if builds is None:
        builds = tmp_path / "builds"
        monkeypatch.setenv("TEEMATE_TEST_BUILDS", str(builds))
    images = Images(tmp_path)
    for options in ({}, {"slots": 4, "heap": "4M"}):
        images.build("vault", **options)
    chosen = [] if os.environ.get("TEEMATE_MACHINE_ALL") == "1" else ["-k", DEPENDENT]
    # With systemd, since who runs in a chroot may make no user namespace.
    done = machine.run(
        ["python", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(CONTAINERS), *chosen],
        machine=Machine(systemd=True, epc="128M", memory="3G"),
        directory=machine.PROJECT,
        env={"TEEMATE_TEST_BACKEND": "sgx", "TEEMATE_TEST_BUILDS": str(builds)},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
