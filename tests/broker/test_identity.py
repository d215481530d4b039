"""Who a client is, and what its user could have made up."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from backends import SHARING
from raw_client import RawClient
from running_broker import RunningBroker

from teemate.broker.connections import identity
from teemate.broker.connections.cgroups import CgroupTree, find_tree, glob_to_regex
from teemate.broker.connections.identity import identify
from teemate.errors import ConnectionLost

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="connects as other users, which only root can")

NOWHERE = CgroupTree(hierarchy="", mount="")


@contextlib.contextmanager
def credentials(uid: int, gid: int, groups: tuple[int, ...] = ()) -> Iterator[None]:
    """Effective ids of the block: those are what the kernel notes at connect()."""
    before = os.getgroups()
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


# ---- one process ----------------------------------------------------------------------


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        os.chmod(tmp_path / "s", 0o777)
        yield sock


def test_a_process_is_known_by_what_the_kernel_says(listener: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            peer = identify(server, find_tree())
    assert peer.identity.pid == os.getpid()
    assert peer.identity.uid == os.geteuid()
    assert peer.identity.gid == os.getegid()
    assert peer.identity.groups == frozenset(os.getgroups())
    assert not os.get_inheritable(peer.pidfd)
    assert not identity.process_ended(peer.pidfd)
    os.close(peer.pidfd)


@pytest.mark.parametrize("old_kernel", [False, True])
def test_a_process_that_has_ended_is_nobody(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, old_kernel: bool
) -> None:
    if old_kernel:
        monkeypatch.setattr(identity, "_SO_PEERPIDFD", 9999)
    pid = os.fork()
    if pid == 0:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.connect(listener.getsockname())
        os._exit(0)
    os.waitpid(pid, 0)
    server, _ = listener.accept()
    gc.collect()  # what tests before this one have left goes now
    before = len(os.listdir("/proc/self/fd"))
    with server, pytest.raises(ConnectionLost, match="ended before"):
        identify(server, find_tree())
    assert len(os.listdir("/proc/self/fd")) == before - 1, "a descriptor leaked"


def test_a_peer_that_was_reaped_is_not_looked_up_by_its_number_again() -> None:
    class Reaped:
        def getsockopt(self, _level: int, _option: int, _size: int) -> bytes:
            raise OSError(errno.EINVAL, "Invalid argument")

    with pytest.raises(OSError, match="Invalid argument"):
        identity._pidfd(cast("socket.socket", Reaped()), os.getpid())


def test_a_zombie_is_nobody_either(listener: socket.socket) -> None:
    pid = os.fork()
    if pid == 0:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.connect(listener.getsockname())
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    server, _ = listener.accept()
    with server, pytest.raises(ConnectionLost):
        identify(server, find_tree())
    os.waitpid(pid, 0)


def test_an_old_kernel_s_word_about_cgroups_is_believed_only_where_the_policy_trusts_pids(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_SO_PEERPIDFD", 9999)
    tree = find_tree("unified")
    found = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            for trust in (False, True):
                peer = identify(server, tree, trust_pid=trust)
                os.close(peer.pidfd)
                found.append(peer.identity.cgroup)
    assert found[0] == ""
    assert found[1].startswith("/")


# ---- cgroups -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("glob", "path", "matches"),
    [
        ("/a/b", "/a/b", True),
        ("/a/b", "/a/b/c", False),
        ("/a/b", "/x/a/b", False),
        ("/a/*", "/a/b", True),
        ("/a/*", "/a/b/c", False),
        ("/a/*", "/a/", True),
        ("/*", "/a/b", False),
        ("/a/b?", "/a/bc", True),
        ("/a/b?c", "/a/b/c", False),
        ("/a/**", "/a", True),
        ("/a/**", "/a/b/c", True),
        ("/a/**", "/ab", False),
        ("/**", "/", True),
        ("/a.b", "/axb", False),
        ("/a", "/a\n", False),
        ("/a*", "/a\nb", True),
    ],
)
def test_globs_are_anchored_and_stars_stop_at_slashes(glob: str, path: str, matches: bool) -> None:
    assert bool(glob_to_regex(glob).fullmatch(path)) == matches


HYBRID = b"4:memory:/m\n2:cpu,cpuacct:/c\n1:name=systemd:/s\n0::/u\n"


@pytest.mark.parametrize(
    ("hierarchy", "membership", "path"),
    [
        ("", HYBRID, "/u"),
        ("name=systemd", HYBRID, "/s"),
        ("memory", HYBRID, "/m"),
        ("cpuacct", HYBRID, "/c"),
        ("blkio", HYBRID, ""),
        ("", b"0::/a:b/c\n", "/a:b/c"),
        ("", b"0::/../other\n", ""),
        ("", b"0::/gone (deleted)\n", ""),
        # Names that would begin a line of their own if more than a newline ended one.
        ("", b"1:name=systemd:/user/x\x0c0::/trusted\n0::/user\n", "/user"),
        ("", "1:name=systemd:/user/x\u20280::/trusted\n0::/user\n".encode(), "/user"),
        ("", b"0::/user/\x1c", "/user/\x1c"),
        ("", b"", ""),
    ],
)
def test_the_path_is_that_of_the_hierarchy_which_the_policy_reads(
    hierarchy: str, membership: bytes, path: str
) -> None:
    assert CgroupTree(hierarchy=hierarchy, mount="").path_of(membership) == path


UNIFIED_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
HYBRID_MOUNTS = (
    "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
CONTAINER_MOUNT = "30 23 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("wanted", "mounts", "hierarchy", "mount"),
    [
        ("auto", UNIFIED_MOUNT, "", "/sys/fs/cgroup"),
        ("auto", HYBRID_MOUNTS, "name=systemd", "/sys/fs/cgroup/systemd"),
        ("unified", HYBRID_MOUNTS, "", "/sys/fs/cgroup/unified"),
        ("memory", HYBRID_MOUNTS, "memory", "/sys/fs/cgroup/memory"),
        ("memory", UNIFIED_MOUNT, "memory", ""),
        ("auto", CONTAINER_MOUNT, "", ""),
        ("auto", "", "", ""),
    ],
)
def test_the_hierarchy_is_found_where_it_is_mounted(
    wanted: str, mounts: str, hierarchy: str, mount: str
) -> None:
    assert find_tree(wanted, mounts) == CgroupTree(hierarchy=hierarchy, mount=mount)


@pytest.fixture
def tree(tmp_path: Path) -> CgroupTree:
    """A tree like that of cgroupfs: /a/b/c."""
    for folder in (tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/c"):
        folder.mkdir(mode=0o755)
        (folder / "cgroup.procs").touch(mode=0o644)
    return CgroupTree(hierarchy="", mount=str(tmp_path))


@as_root
def test_a_path_is_believed_down_to_the_first_group_that_a_user_may_write(tree: CgroupTree) -> None:
    assert tree.trusted("/a/b/c") == "/a/b/c"
    assert tree.matches(("/a/*/c",), "/a/b/c")
    os.chown(f"{tree.mount}/a/b", 1000, 0)
    assert tree.trusted("/a/b/c") == "/a/b"
    assert not tree.matches(("/a/*/c", "/a/b/*"), "/a/b/c")
    assert tree.matches(("/a/*",), "/a/b/c")
    assert tree.matches(("/a/**",), "/a/b/c")


@as_root
@pytest.mark.parametrize("how", ["procs owner", "group write", "others write"])
def test_whoever_may_move_processes_may_have_chosen_what_is_below(tree: CgroupTree, how: str) -> None:
    group = Path(tree.mount) / "a"
    if how == "procs owner":
        os.chown(group / "cgroup.procs", 1000, 0)
    elif how == "group write":
        os.chown(group, 0, 1000)
        group.chmod(0o775)
    else:
        (group / "cgroup.procs").chmod(0o646)
    assert tree.trusted("/a/b/c") == "/a"


def test_what_cannot_be_looked_at_is_not_believed(tree: CgroupTree) -> None:
    assert tree.trusted("/a/b/nothing") is None
    assert NOWHERE.trusted("/a") is None
    assert not NOWHERE.matches(("/**",), "/a")


# ---- over the broker's socket ----------------------------------------------------------------

Broker = Callable[..., RunningBroker]
Policy = Callable[..., str]
Connect = Callable[..., RawClient]


def denied(running: RunningBroker, client: RawClient, rule: str) -> None:
    error = client.fails("attach", "denied", enclave="vault")
    assert rule not in error["message"], "the client is not told which rule is missing"
    record = running.audit("denial")[-1]
    assert rule in str(record["missing_rule"])
    assert record["operation"] == "attach"


@as_root
def test_uids_and_gids_that_no_rule_names_are_denied(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    rules = "uid = 4001\n[[enclave.attach]]\ngid = 5001\n"
    running = broker(vault_policy(SHARING, attach=rules))
    for uid, gid, groups, allowed in [
        (4001, 4001, (), True),
        (4002, 5001, (), True),
        (4002, 4002, (1, 5001), True),
        (4002, 4002, (5002,), False),
        (5001, 4001, (), False),
    ]:
        with credentials(uid, gid, groups):
            client = connect(running)
        if allowed:
            client.ok("attach", enclave="vault")
            assert [info["name"] for info in client.ok("enclaves")["enclaves"]] == ["vault"]
        else:
            denied(running, client, "[[enclave.attach]]")
            assert client.ok("enclaves")["enclaves"] == []
    denied(running, connect(running), "[[enclave.attach]]")


@as_root
def test_another_user_than_the_owner_needs_the_sharing_of_the_backend(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    running = broker(vault_policy("owner = 4001", attach='uid = "*"'))
    with credentials(4001, 4001):
        connect(running).ok("attach", enclave="vault")
    with credentials(4002, 4002):
        stranger = connect(running)
    denied(running, stranger, SHARING.partition(" ")[0])
    denied(running, connect(running), SHARING.partition(" ")[0])


@as_root
def test_operations_of_administrators_are_for_administrators(
    broker: Broker, vault_policy: Policy, connect: Connect
) -> None:
    running = broker(vault_policy(SHARING, attach='uid = "*"'))
    with credentials(4001, 4001):
        client = connect(running)
    for op, args in [
        ("clients", {}),
        ("stats", {}),
        ("revoke", {"enclave": "vault"}),
        ("destroy", {"enclave": "vault"}),
        ("destroy", {"enclave": "nothing"}),
    ]:
        client.fails(op, "denied", **args)
        assert running.audit("denial")[-1]["missing_rule"] == "[administrators] uids or gids"
    with open("/dev/null", "rb") as null:
        client.fails("create", "denied", (null.fileno(),), name="x", sigstruct=bytes(1808))
    assert "[[create]]" in str(running.audit("denial")[-1]["missing_rule"])
    client.ok("attach", enclave="vault")


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A group of our own in the unified hierarchy: /teemate-test, with /teemate-test/inner."""
    mount = find_tree("unified").mount
    group = Path(mount) / f"teemate-test-{os.getpid()}"
    if not mount or os.geteuid() != 0:
        pytest.skip("no unified hierarchy that we may change")
    home = find_tree("unified").path_of(Path("/proc/self/cgroup").read_bytes())
    try:
        (group / "inner").mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"cannot make a control group: {error}")
    yield group
    Path(mount + home, "cgroup.procs").write_text("0")
    (group / "inner").rmdir()
    group.rmdir()


def test_a_group_whose_name_is_no_text_is_shown_escaped(
    broker: Broker, vault_policy: Policy, connect: Connect, cgroup: Path
) -> None:
    running = broker(vault_policy('identity = "uid+cgroup"', '[broker]\ncgroup_hierarchy = "unified"\n'))
    odd = cgroup / os.fsdecode(b"\xff\x1b[2J")
    odd.mkdir()
    try:
        (odd / "cgroup.procs").write_text("0")
        client = connect(running)
        client.ok("attach", enclave="vault")
        told = {entry["cgroup"] for entry in client.ok("clients")["clients"]}
        assert told == {f"/{cgroup.name}/\\udcff\\x1b[2J"}
        assert running.audit("grant")[0]["cgroup"] == told.pop()
    finally:
        (cgroup / "inner" / "cgroup.procs").write_text("0")
        odd.rmdir()


def test_cgroup_rules_hold_for_processes_that_root_put_there(
    broker: Broker, vault_policy: Policy, connect: Connect, cgroup: Path
) -> None:
    settings = '[broker]\ncgroup_hierarchy = "unified"\n'
    rule = f'uid = 0\ncgroup = "/{cgroup.name}/inner"'
    running = broker(vault_policy('identity = "uid+cgroup"', settings, attach=rule))
    outside = connect(running)
    (cgroup / "inner" / "cgroup.procs").write_text("0")
    denied(running, outside, "[[enclave.attach]]")
    inside = connect(running)
    inside.ok("attach", enclave="vault")
    inside.ok("ping")  # the record is written after the reply
    assert running.audit("grant")[0]["cgroup"] == f"/{cgroup.name}/inner"
    # From here on user 4001 could have put the process there: the same place counts no more.
    os.chown(cgroup, 4001, 4001)
    denied(running, connect(running), "[[enclave.attach]]")


def test_the_identity_that_the_enclave_gets_can_hold_the_cgroup(
    broker: Broker, vault_policy: Policy, connect: Connect, cgroup: Path
) -> None:
    from hashlib import sha256

    settings = '[broker]\ncgroup_hierarchy = "unified"\n'
    running = broker(vault_policy('identity = "uid+cgroup"', settings))
    (cgroup / "inner" / "cgroup.procs").write_text("0")
    (slot,) = connect(running).ok("attach", enclave="vault")["slots"]
    text = f"uid=0\ncgroup=/{cgroup.name}/inner"
    assert slot["bind"][8:40] == sha256(text.encode()).digest()
