"""The policy file: what it means, and how it complains."""

from __future__ import annotations

from pathlib import Path

import pytest

from teemate.broker.connections.cgroups import CgroupTree
from teemate.broker.connections.identity import Identity
from teemate.broker.policy.rules import Policy, PolicyError, load_policy

GOOD = """\
[broker]
socket = "/tmp/x.sock"
socket_mode = "0660"

[limits]
slots = 7
queued_bytes = "1MiB"

[[enclave]]
name = "vault"
image = "vault.sgxs"
owner = "root"

[[enclave.attach]]
uid = "*"

[[enclave]]
name = "later"
start = "create"
identity = "uid+cgroup"

[[enclave.attach]]
uid = [0, "root"]

[[enclave.attach]]
cgroup = ["/a/*", "/b/**"]
gid = 5

[[create]]
uid = 0
min_isvsvn = 3

[administrators]
uids = [0]
"""


def load(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "broker.toml"
    path.write_text(text)
    return load_policy(path, default_owner=123)


def test_a_good_file_is_read_into_frozen_types(tmp_path: Path) -> None:
    policy = load(tmp_path, GOOD)
    assert policy.broker.socket_mode == 0o660
    assert policy.limits.slots == 7
    assert policy.limits.queued_bytes == 1 << 20
    vault, later = policy.enclaves
    assert vault.image == tmp_path / "vault.sgxs"
    assert vault.sigstruct == tmp_path / "vault.sig"
    assert vault.owner == 0
    assert later.owner == 123
    assert later.with_cgroup
    assert later.attach[1].cgroups == ("/a/*", "/b/**")
    assert policy.create[0].min_isvsvn == 3
    with pytest.raises(AttributeError):
        vault.owner = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ('uid = "*"', 'uid = "nobody-of-that-name"', 15, "enclave.attach.uid: this host has no user"),
        ('uid = [0, "root"]', "uid = -1", 23, "enclave.attach.uid: expected a user"),
        ('uid = [0, "root"]', "uid = [true]", 23, "enclave.attach.uid: expected a user"),
        ('uid = [0, "root"]', "", 22, "enclave.attach.uid: a rule names a uid, gid or cgroup"),
        ('["/a/*", "/b/**"]', '"a/*"', 26, "anchored at the root"),
        ('["/a/*", "/b/**"]', '"/a/**/b"', 26, "only as the last component"),
        ('name = "later"', 'name = "vault"', 18, "'vault' is defined twice"),
        ('name = "later"', 'title = "later"', 17, "enclave.name: is missing"),
        ('name = "later"', 'name = "a/b"', 18, "letters, digits"),
        ('start = "create"', 'start = "maybe"', 19, "expected one of boot, create"),
        ('start = "create"', "", 17, "enclave.image: is missing"),
        ("[administrators]", "[administrator]", 33, "administrator: there is no such setting"),
        ("uids = [0]", "uid = [0]", 34, "administrators.uid: there is no such setting"),
        ("slots = 7", "slots = -7", 6, "limits.slots: expected a number from 0"),
        ("slots = 7", 'slots = "many"', 6, "limits.slots: expected a whole number"),
        ('socket_mode = "0660"', "socket_mode = 660", 3, "broker.socket_mode: expected a mode"),
        ("[[create]]", "[create]", 29, "create: expected tables [[create]]"),
        ("min_isvsvn = 3", "min_isvsvn = 70000", 31, "create.min_isvsvn"),
        ("min_isvsvn = 3", 'mrsigner = "abc"', 31, "create.mrsigner: expected 64 hexadecimal digits"),
        ("slots = 7", "slots = = 7", 6, "Invalid value"),
        ('start = "create"', 'start = "create"\nio = "client"', 20, "set storage = true"),
        ('start = "create"', 'start = "create"\nstorage = true\nio = "client"', 21, "set revoke_kill = true"),
        ('start = "create"', 'start = "create"\nio = "kernel"', 20, "expected one of warden, client"),
    ],
)
def test_a_mistake_is_told_with_file_line_and_key(
    tmp_path: Path, old: str, new: str, line: int, message: str
) -> None:
    assert GOOD.count(old) == 1
    with pytest.raises(PolicyError) as refused:
        load(tmp_path, GOOD.replace(old, new))
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path / 'broker.toml'}:{line}: ")


def test_a_shared_debug_enclave_is_a_mistake(tmp_path: Path) -> None:
    text = GOOD.replace('owner = "root"', "debug = true\ninsecure_sim_sharing = true")
    with pytest.raises(PolicyError, match="never shared between owners"):
        load(tmp_path, text)


def test_a_file_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(tmp_path / "nothing.toml", default_owner=0)


# ---- decisions -----------------------------------------------------------------------

TREE = CgroupTree(hierarchy="", mount="")


def identity(uid: int = 0, gid: int = 0, groups: frozenset[int] = frozenset()) -> Identity:
    return Identity(pid=1, uid=uid, gid=gid, groups=groups, label="", cgroup="/")


@pytest.mark.parametrize(
    ("rule", "who", "allowed"),
    [
        ("uid = 0", identity(0), True),
        ("uid = 0", identity(1), False),
        ("uid = [5, 1]", identity(1), True),
        ('uid = "*"', identity(7), True),
        ("gid = 4", identity(7, gid=4), True),
        ("gid = 4", identity(7, groups=frozenset({4})), True),
        ("gid = 4", identity(7, gid=5), False),
        ("uid = 7\ngid = 4", identity(7, gid=5), False),
        ("uid = 7\ngid = 4", identity(7, gid=4), True),
        ('cgroup = "/**"', identity(7), False),  # no tree can be looked at: not believed
    ],
)
def test_a_rule_holds_when_all_its_conditions_hold(
    tmp_path: Path, rule: str, who: Identity, allowed: bool
) -> None:
    head = '[[enclave]]\nname = "e"\nstart = "create"\ninsecure_sim_sharing = true\n'
    text = f"{head}[[enclave.attach]]\n{rule}\n"
    (enclave,) = load(tmp_path, text).enclaves
    missing = enclave.missing_for_attach(who, TREE, backend="sim", debug=False)
    assert (missing is None) == allowed


@pytest.mark.parametrize(
    ("extra", "backend", "debug", "missing"),
    [
        ("", "sim", False, "insecure_sim_sharing = true"),
        ("", "sgx", False, 'share_between_owners = "unfenced"'),
        ("insecure_sim_sharing = true", "sim", False, None),
        ("insecure_sim_sharing = true", "sgx", False, 'share_between_owners = "unfenced"'),
        ('share_between_owners = "unfenced"', "sgx", False, None),
        ('share_between_owners = "unfenced"', "sim", False, "insecure_sim_sharing = true"),
        ("insecure_sim_sharing = true", "sim", True, "debug enclaves are never shared"),
        ('share_between_owners = "unfenced"', "sgx", True, "debug enclaves are never shared"),
    ],
)
def test_other_users_than_the_owner_need_the_sharing_of_the_backend(
    tmp_path: Path, extra: str, backend: str, debug: bool, missing: str | None
) -> None:
    text = f'[[enclave]]\nname = "e"\nstart = "create"\nowner = 1\n{extra}\n[[enclave.attach]]\nuid = "*"\n'
    (enclave,) = load(tmp_path, text).enclaves
    assert enclave.missing_for_attach(identity(1), TREE, backend=backend, debug=debug) is None
    found = enclave.missing_for_attach(identity(2), TREE, backend=backend, debug=debug)
    assert (found is None) == (missing is None)
    assert missing is None or missing in str(found)


def test_the_example_in_the_repository_is_a_good_policy() -> None:
    example = Path(__file__).resolve().parents[2] / "systemd" / "broker.toml.example"
    policy = load_policy(example, default_owner=0)
    assert policy.enclaves
    assert policy.create
