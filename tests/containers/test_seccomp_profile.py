"""``teemate seccomp`` takes SGX's ioctls, and nothing else, out of a runtime's own profile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from images import Images
from runc import SECCOMP, Root, start
from running_broker import RunningBroker
from test_containers import policy, sgx_ioctls

from teemate.cli.seccomp import without_sgx_ioctls
from teemate.errors import Error

PODMANS = Path("/usr/share/containers/seccomp.json")
LIST = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "syscalls": [{"names": ["read", "ioctl"], "action": "SCMP_ACT_ALLOW"}],
}


def allows(profile: dict[str, Any], request: int) -> bool:
    """Whether ioctl(_, request) comes through, as seccomp takes rules of one system call."""
    actions = [
        rule["action"]
        for rule in profile["syscalls"]
        if "ioctl" in rule["names"]
        and all(request & compare["value"] == compare["valueTwo"] for compare in rule.get("args", []))
    ]
    return (actions or [profile["defaultAction"]])[0] == "SCMP_ACT_ALLOW"


@pytest.mark.parametrize("base", [LIST, {"defaultAction": "SCMP_ACT_ALLOW"}])
def test_of_all_types_of_ioctls_only_sgxs_is_denied(base: dict[str, Any]) -> None:
    profile = without_sgx_ioctls(base)
    for kind in range(256):
        for number in (0, 7, 0xFF):
            for more in (0, 3 << 30 | 40 << 16, 1 << 40):
                assert allows(profile, more | kind << 8 | number) == (kind != 0xA4), hex(kind)


def test_other_system_calls_of_the_profile_are_left_alone() -> None:
    rules = without_sgx_ioctls(LIST)["syscalls"]
    assert rules[0] == {"names": ["read"], "action": "SCMP_ACT_ALLOW"}
    assert {name for rule in rules[1:] for name in rule["names"]} == {"ioctl"}


def test_the_profile_that_is_shipped_is_what_the_command_makes_of_one_that_allows_everything() -> None:
    shipped = json.loads(SECCOMP.read_text())
    made = without_sgx_ioctls({**shipped, "syscalls": []})
    for rule in shipped["syscalls"]:
        del rule["comment"]
    assert made == shipped


def test_a_profile_that_looks_at_ioctls_itself_is_refused() -> None:
    rule = {"names": ["ioctl"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 1, "value": 1}]}
    with pytest.raises(Error, match="by hand"):
        without_sgx_ioctls({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]})
    with pytest.raises(Error, match="no seccomp profile"):
        without_sgx_ioctls({})


def test_a_client_works_below_podmans_own_profile_without_them(
    broker: Callable[..., RunningBroker], images: Images, bare: Root, tmp_path: Path
) -> None:
    if not PODMANS.exists():
        pytest.skip(f"{PODMANS} is not here")
    path = tmp_path / "profile.json"
    profile = without_sgx_ioctls(_plain(json.loads(PODMANS.read_text())))
    path.write_text(json.dumps(profile))
    running = broker(policy(images))
    with start(bare, ["/program"], running.socket, seccomp=path) as container:
        assert sgx_ioctls(container) == {1}


def _plain(profile: dict[str, Any]) -> dict[str, Any]:
    """What podman and docker make of their own form before they give it to the runtime, for no capability."""
    rules = [
        {name: rule[name] for name in ("names", "action", "args", "errnoRet") if rule.get(name) is not None}
        for rule in profile["syscalls"]
        if not (rule.get("includes") or {}).get("caps")
    ]
    return {
        "defaultAction": profile["defaultAction"],
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    }
