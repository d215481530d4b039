"""``teemate-broker check-config`` says what a policy means before a broker lives by it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from images import Images

from teemate.broker.policy.check import store_capacity_for


def check(
    folder: Path, policy: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    path = folder / "broker.toml"
    path.write_text(policy)
    command = [sys.executable, "-m", "teemate.broker.main", "check-config", "--config", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)


def vault(images: Images, more: str = "uid = 0") -> str:
    return f"""
[administrators]
uids = [0]
[[enclave]]
name = "vault"
image = "{images.vault.sgxs}"
sigstruct = "{images.vault.sigstruct}"
owner = 0
[[enclave.attach]]
{more}
"""


def test_a_policy_in_order_is_told_in_words(tmp_path: Path, images: Images) -> None:
    done = check(tmp_path, vault(images), "--strict")
    assert (done.returncode, done.stderr) == (0, "")
    assert "enclave vault" in done.stdout
    assert "may attach: user root (0)" in done.stdout
    assert check(tmp_path, vault(images), "--quiet").stdout == ""


def test_a_mistake_is_told_with_its_line_and_fails(tmp_path: Path) -> None:
    done = check(tmp_path, "[broker]\n\nbackand = 'sim'\n")
    assert done.returncode == 1
    assert "broker.toml:3: broker.backand" in done.stderr
    assert "Traceback" not in done.stderr


def test_images_that_are_not_there_are_warned_of_and_fail_only_when_asked(tmp_path: Path) -> None:
    policy = '[[enclave]]\nname = "gone"\nimage = "gone.sgxs"\n[[enclave.attach]]\nuid = 0\n'
    done = check(tmp_path, policy)
    assert done.returncode == 0
    assert f"{tmp_path}/gone.sgxs: No such file" in done.stderr
    assert "no [administrators]" in done.stderr
    assert check(tmp_path, policy, "--strict").returncode == 1


def test_rules_for_others_without_sharing_are_warned_of(tmp_path: Path, images: Images) -> None:
    done = check(tmp_path, vault(images, 'uid = "*"'))
    assert "a rule names others than its owner" in done.stderr


def test_a_store_that_is_too_small_is_warned_of(tmp_path: Path, images: Images) -> None:
    small = {"FDSTORE": str(store_capacity_for(1) - 1)}
    assert "raise FileDescriptorStoreMax=" in check(tmp_path, vault(images), environment=small).stderr
    enough = {"FDSTORE": str(store_capacity_for(1))}
    assert check(tmp_path, vault(images), "--strict", environment=enough).returncode == 0
