"""Keys and values of functions: who sees them, how many there may be, and how long they stay."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import key_modules
import modules as wasm
import pytest
from function_enclaves import Gate, functions_of, installed, kill, leave_inside, owner, weakened
from images import BuiltImage, Images
from running_functions import module, run_functions

import teemate
from teemate.cli.main import run as run_command
from teemate.functions import (
    BadArgument,
    FunctionFailed,
    FunctionLimit,
    FunctionLimits,
    Functions,
    ModuleInvalid,
)

ALICE, BOB = 1001, 1002
GRANTS = ("keys",)
STAY = "TM_TEST_STAY_IN_CHANGE=4"
"""Who is about to make a fourth key visible stays where it is."""
KEY = 512
EFAULT, EINVAL, ENOENT, ENOSPC, ERANGE = 21, 28, 44, 51, 68


class Keys:
    """A function's calls by name, one an invocation."""

    def __init__(self, functions: Functions) -> None:
        self.functions = functions
        for name in ("put", "get", "delete", "list"):
            functions.deploy(name, key_modules.module(name), grants=GRANTS, replace=True)

    def put(self, key: bytes, value: bytes) -> int:
        return self._do("put", key, value)[0]

    def get(self, key: bytes) -> bytes | int:
        errno, length, data = self._do("get", key)
        return errno or data[:length]

    def delete(self, key: bytes) -> int:
        return self._do("delete", key)[0]

    def list(self, prefix: bytes = b"") -> dict[bytes, int]:
        return {key: length for key, (length, _) in self.records(prefix).items()}

    def records(self, prefix: bytes = b"") -> dict[bytes, tuple[int, int]]:
        """The length of each value, and its version."""
        errno, length, data = self._do("list", prefix)
        assert errno == 0
        found, at = {}, 0
        while at < length:
            key_length, _, value_length, version, _ = struct.unpack_from("<HHIQQ", data, at)
            at += 24 + key_length
            found[data[at - key_length : at]] = (value_length, version)
        return found

    def _do(self, name: str, key: bytes, value: bytes = b"") -> tuple[int, int, bytes]:
        """Invoke; returns errno, length and data."""
        answer = self.functions.invoke(
            name, struct.pack("<II", len(key), len(value)) + key.ljust(512) + value
        )
        errno, length = struct.unpack_from("<II", answer)
        return errno, length, answer[8:]


@pytest.fixture
def gate() -> Iterator[Gate]:
    with Gate(installed()) as gate:
        yield gate


def test_what_is_put_is_got_listed_and_deleted(gate: Gate) -> None:
    keys = Keys(owner(gate, 2, ALICE))
    assert keys.get(b"a") == ENOENT
    assert keys.put(b"a", b"one") == 0
    assert keys.put(b"ab", b"") == 0
    assert keys.put(b"b", bytes(65536)) == 0
    assert (keys.get(b"a"), keys.get(b"ab"), keys.get(b"b")) == (b"one", b"", bytes(65536))
    assert keys.list() == {b"a": 3, b"ab": 0, b"b": 65536}
    assert keys.list(b"a") == {b"a": 3, b"ab": 0}
    assert keys.put(b"a", b"another") == 0
    assert keys.get(b"a") == b"another"
    assert keys.delete(b"a") == 0
    assert keys.delete(b"a") == ENOENT
    assert keys.list() == {b"ab": 0, b"b": 65536}


def test_what_no_key_or_value_can_be_is_refused(gate: Gate) -> None:
    keys = Keys(owner(gate, 2, ALICE))
    assert keys.put(b"", b"x") == EINVAL
    assert keys.put(b"k" * 257, b"x") == EINVAL
    assert keys.put(b"k" * 256, b"x") == 0
    assert keys.put(b"k", bytes(65537)) == EINVAL
    assert keys.get(b"k" * 257) == EINVAL
    assert keys.delete(b"") == EINVAL


@pytest.mark.parametrize("name", ["put", "get", "delete", "list"])
def test_what_does_not_lie_in_the_functions_memory_is_not_touched(gate: Gate, name: str) -> None:
    functions = owner(gate, 2, ALICE)
    parameters = key_modules.PARAMETERS[name]
    for wrong in range(parameters):
        for value in (0xFFFFFFFF, 0x7FFFFFFF, key_modules.PAGES * 65536 - 1):
            arguments = [512, 8, 1024, 64, 256, 264][:parameters]
            arguments[wrong] = value
            functions.deploy("wild", key_modules.calling(name, arguments), grants=GRANTS, replace=True)
            (errno,) = struct.unpack("<I", functions.invoke("wild"))
            assert errno in (0, EFAULT, EINVAL, ENOENT, ERANGE)
    assert functions.usage().heap > 0


def see_nothing_of_each_other(gate: Gate) -> None:
    alice, bob = Keys(owner(gate, 2, ALICE)), Keys(owner(gate, 3, BOB))
    assert alice.put(b"secret", b"alice's") == 0
    assert bob.get(b"secret") == ENOENT
    assert bob.list() == {}
    assert bob.delete(b"secret") == ENOENT
    assert bob.put(b"secret", b"bob's") == 0
    assert alice.get(b"secret") == b"alice's"
    bob.functions.clear_keys()
    assert alice.list() == {b"secret": 7}
    assert (alice.functions.usage().keys, bob.functions.usage().keys) == (1, 0)


def test_owners_keys_are_apart(gate: Gate) -> None:
    see_nothing_of_each_other(gate)


@pytest.fixture(scope="module")
def one_bucket(images: Images, tmp_path_factory: pytest.TempPathFactory) -> BuiltImage:
    """The image with everybody's keys in one bucket."""
    return weakened(images, tmp_path_factory.mktemp("one_bucket"), "TM_TEST_ONE_BUCKET")


def test_versions_tell_nothing_of_what_others_do(one_bucket: BuiltImage) -> None:
    with Gate(one_bucket) as gate:
        alice, bob = Keys(owner(gate, 2, ALICE)), Keys(owner(gate, 3, BOB))
        alice.put(b"a", b"")
        bob.put(b"b", b"")
        alice.put(b"c", b"")
        versions = {key: version for key, (_, version) in alice.records().items()}
        assert versions[b"c"] == versions[b"a"] + 1


def test_a_version_is_of_one_value_also_when_all_was_deleted(gate: Gate) -> None:
    keys = Keys(owner(gate, 2, ALICE))
    seen = set()
    for _ in range(3):
        keys.put(b"a", b"")
        seen.add(keys.records()[b"a"][1])
        keys.delete(b"a")
    assert len(seen) == 3


def test_the_example_lists_what_takes_more_than_its_page(one_bucket: BuiltImage, tmp_path: Path) -> None:
    program = module("keys", tmp_path)
    with Gate(one_bucket) as gate:
        functions = owner(gate, 2, ALICE)
        functions.deploy("keys", program, grants=GRANTS)
        names = [f"{number}".rjust(256, "k") for number in range(20)]
        for name in names:
            functions.invoke("keys", args=("put", name))
        assert sorted(functions.invoke("keys", args=("list",)).decode().split()) == sorted(names)


def fill(keys: Keys) -> int:
    """Put values until there may be no more; returns how many there are."""
    for number in range(1000):
        errno = keys.put(b"%d" % number, bytes(65536))
        if errno:
            assert errno == ENOSPC
            return number
    raise AssertionError("there is no end")


def have_a_share_each(gate: Gate) -> None:
    alice, bob = Keys(owner(gate, 2, ALICE)), Keys(owner(gate, 3, BOB))
    count = fill(alice)
    usage = alice.functions.usage()
    assert usage.keys == count
    assert usage.keys_maximum - 66_000 < usage.keys_size <= usage.keys_maximum
    assert 0 <= usage.keys_maximum - usage.heap // 16 < 4096
    assert bob.put(b"a", bytes(65536)) == 0
    assert alice.put(b"0", bytes(65536)) == 0  # takes the place of one
    assert alice.delete(b"0") == 0
    assert alice.put(b"more", bytes(65536)) == 0
    fill(bob)
    carol = Keys(owner(gate, 4, 1003))
    assert fill(carol) <= 2  # that is all that all may have
    alice.functions.clear_keys()
    assert carol.put(b"more", bytes(65536)) == 0


def test_an_owner_has_a_share_of_the_heap_for_keys_and_all_have_one(gate: Gate) -> None:
    have_a_share_each(gate)


@pytest.fixture(scope="module")
def careless(images: Images, tmp_path_factory: pytest.TempPathFactory) -> BuiltImage:
    """The image without what these tests guard."""
    return weakened(images, tmp_path_factory.mktemp("careless"), "TM_TEST_NO_OWNERS", "TM_TEST_NO_ACCOUNTS")


def test_who_does_not_ask_whose_keys_they_are_is_found(careless: BuiltImage) -> None:
    with Gate(careless) as gate, pytest.raises(AssertionError):
        see_nothing_of_each_other(gate)


def test_who_does_not_count_is_found(careless: BuiltImage) -> None:
    with Gate(careless) as gate, pytest.raises(AssertionError):
        have_a_share_each(gate)


def test_nothing_is_there_without_a_grant(gate: Gate) -> None:
    functions = owner(gate, 2, ALICE)
    for name in ("put", "get", "delete", "list"):
        with pytest.raises(ModuleInvalid, match='grant "keys"'):
            functions.deploy(name, key_modules.module(name))
    with pytest.raises(ModuleInvalid, match="there is not"):
        functions.deploy("other", key_modules.calling("other", []), grants=GRANTS)
    with pytest.raises(ModuleInvalid, match="another type"):
        functions.deploy("put", key_modules.calling("put", [0]), grants=GRANTS)
    with pytest.raises(BadArgument, match="grant"):
        functions.deploy("put", key_modules.module("put"), grants=("files",))
    info = functions.deploy("put", key_modules.module("put"), grants=GRANTS)
    assert info.grants == GRANTS
    assert functions.deploy("plain", wasm.printing(b"")).grants == ()
    assert [listed.grants for listed in functions.list()] == [(), GRANTS]


def test_keys_outlive_functions_until_they_are_cleared(gate: Gate) -> None:
    functions = owner(gate, 2, ALICE)
    before = functions.usage()
    keys = Keys(functions)
    keys.put(b"a", b"one")
    keys = Keys(functions)  # replaced
    assert keys.get(b"a") == b"one"
    for info in functions.list():
        functions.remove(info.name)
    assert (functions.usage().keys, functions.usage().keys_size) == (1, 72 + 1 + 3)
    assert Keys(functions).get(b"a") == b"one"
    functions.clear_keys()
    assert Keys(functions).get(b"a") == ENOENT
    for info in functions.list():
        functions.remove(info.name)
    after = functions.usage()
    assert (after.keys, after.keys_size) == (0, 0)
    # What is kept ready is the slot's; of keys nothing is left.
    assert after.heap_used - after.blocks_owned <= before.heap_used + (4 << 20)


def test_a_sealed_function_has_its_grant_too(gate: Gate) -> None:
    functions = owner(gate, 2, ALICE)
    info = functions.deploy("put", key_modules.module("put"), grants=GRANTS, sealed=True)
    assert info.grants == GRANTS


def test_keys_cost_fuel(gate: Gate) -> None:
    functions = owner(gate, 2, ALICE)
    body = key_modules.calling("put", [512, 8, 1024, 64], repeat=True)
    functions.deploy("endless", body, grants=GRANTS, limits=FunctionLimits(fuel=10**7))
    with pytest.raises(FunctionLimit) as met:
        functions.invoke("endless")
    assert met.value.limit == "fuel"
    assert functions.usage().keys == 1


def is_whole(keys: Keys) -> None:
    """What there is, and what is said of it, fit together."""
    listed, usage = keys.list(), keys.functions.usage()
    assert (usage.keys, usage.keys_size) == (len(listed), sum(72 + len(k) + n for k, n in listed.items()))
    for key, length in listed.items():
        assert keys.get(key) == key * length


def test_changes_are_whole_wherever_a_client_is_killed(gate: Gate) -> None:
    watch = Keys(owner(gate, 3, ALICE))
    watch.functions.deploy("churn", key_modules.churning(), grants=GRANTS)
    for generation in range(1, 13):
        holder = gate.assign(2, generation, uid=ALICE)
        call = leave_inside(gate, holder, "churn")
        kill(gate, holder)
        assert call.capacity
        is_whole(watch)


def die_in_a_change(gate: Gate) -> Keys:
    """Be killed when the fourth key is about to be there."""
    holder = gate.assign(2, uid=ALICE)
    mine = functions_of(holder)
    mine.deploy("churn", key_modules.churning(), grants=GRANTS)
    leave_inside(gate, holder, "churn")
    kill(gate, holder)
    return Keys(owner(gate, 3, ALICE))


def test_a_change_that_was_about_to_happen_has_not(
    images: Images, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Gate(weakened(images, tmp_path_factory.mktemp("staying"), STAY)) as gate:
        keys = die_in_a_change(gate)
        assert len(keys.list()) == 3
        is_whole(keys)


def test_who_counts_beside_the_change_is_found(
    images: Images, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Gate(weakened(images, tmp_path_factory.mktemp("apart"), STAY, "TM_TEST_COUNT_APART")) as gate:
        keys = die_in_a_change(gate)
        assert len(keys.list()) == 3
        with pytest.raises(AssertionError):
            is_whole(keys)


@pytest.fixture
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Functions]:
    """The example, deployed by this user."""
    with run_functions() as running, teemate.connect(running.socket) as broker:
        program = module("keys", tmp_path_factory.mktemp("modules"))
        broker.functions.deploy("keys", program, grants=GRANTS)
        yield broker.functions


def test_the_example_is_a_store(example: Functions) -> None:
    def do(*args: str, payload: bytes = b"") -> bytes:
        return example.invoke("keys", payload, args=args)

    large = bytes(range(256)) * 256
    assert do("put", "large", payload=large) == b""
    for number in range(500):
        do("put", f"{'long ' * 20}{number}", payload=b"%d" % number)
    assert do("get", "large") == large
    assert do("get", f"{'long ' * 20}77") == b"77"
    listed = do("list", "long").decode().splitlines()
    assert sorted(listed) == sorted(f"{'long ' * 20}{number}" for number in range(500))
    assert len(do("list").splitlines()) == 501
    assert do("delete", "large") == b""
    for wrong, code in (
        (("get", "large"), 4),
        (("delete", "large"), 4),
        (("put", "k" * 257), 1),
        (("put",), 2),
        (("take", "large"), 2),
    ):
        with pytest.raises(FunctionFailed) as failed:
            do(*wrong)
        assert failed.value.exit_code == code
    with pytest.raises(FunctionFailed):
        do("put", "larger", payload=large + b"x")
    example.clear_keys()
    assert do("list") == b""


def test_the_shell_grants_and_clears(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "put.wasm"
    path.write_bytes(key_modules.calling("put", [KEY, 8, KEY, 8]))
    with run_functions() as running:

        def run(*arguments: str) -> tuple[int, str]:
            status = run_command(["fn", *arguments, "--socket", running.socket])
            return status, "".join(capsys.readouterr())

        status, told = run("deploy", "put", str(path))
        assert status != 0
        assert 'grant "keys"' in told
        assert run("deploy", "put", str(path), "--grant", "keys")[0] == 0
        assert "keys" in run("describe", "put")[1]
        assert run("invoke", "put")[0] == 0
        assert "1 key" in run("list")[1]
        assert run("clear-keys")[0] == 0
        assert "0 keys" in run("list")[1]
