"""The vault against a model: identities, spaces, versions, expiry, export and import."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from gate import ARGUMENT, OK, TIME, Gate, Holder
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from images import Images

from teemate.errors import CallFailed
from teemate.vault import KEY_MAX, PRIVATE, SHARED, VALUE_MAX, Changed, Vault

MAC = -4
NOMEM = -6
SECOND = 1_000_000_000


class _Slot:
    """What teemate.vault wants of a slot, over a raw one."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder

    def call(
        self, name: str, payload: bytes = b"", timeout: float | None = None, *, max_reply: int = 65536
    ) -> bytes:
        status, reply = self.holder.call(name.encode(), payload, max_reply)
        if status:
            raise CallFailed(f"{name}: status {status}", status, reply=reply)
        return reply


@pytest.fixture
def gate(images: Images) -> Iterator[Gate]:
    with Gate(images.vault) as gate:
        yield gate


def vault(gate: Gate, slot: int, *, uid: int = 1000, space: int = SHARED) -> Vault:
    return Vault(_Slot(gate.assign(slot, uid=uid)), space)


def both(gate: Gate, slot: int, uid: int) -> tuple[Vault, Vault]:
    """One client's view of its private space and of the shared one."""
    caller = _Slot(gate.assign(slot, uid=uid))
    return Vault(caller, PRIVATE), Vault(caller, SHARED)


def test_what_one_client_puts_another_reads(gate: Gate) -> None:
    one, two = vault(gate, 2, uid=1000), vault(gate, 3, uid=2000)
    version = one.put(b"key", b"value")
    entry = two.get(b"key")
    assert entry is not None
    assert (entry.value, entry.version, entry.expires) == (b"value", version, 0)


def test_private_values_are_seen_by_the_same_identity_only(gate: Gate) -> None:
    mine, shared = both(gate, 2, 1000)
    mine.put(b"key", b"private")
    other, other_shared = both(gate, 3, 2000)
    same, _ = both(gate, 4, 1000)
    assert other.get(b"key") is None
    assert shared.get(b"key") is None
    assert list(other.list()) == list(other_shared.list()) == []
    entry = same.get(b"key")
    assert entry is not None
    assert entry.value == b"private"
    assert not other.delete(b"key")
    assert same.delete(b"key")


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, VALUE_MAX])
def test_values_of_every_size_come_back(gate: Gate, length: int) -> None:
    one = vault(gate, 2)
    value = bytes(n % 251 for n in range(length))
    one.put(b"k" * KEY_MAX, value)
    entry = one.get(b"k" * KEY_MAX)
    assert entry is not None
    assert entry.value == value


def test_keys_and_values_that_are_too_long_are_refused(gate: Gate) -> None:
    one = vault(gate, 2)
    for key, value in ((b"", b""), (b"k" * (KEY_MAX + 1), b""), (b"k", bytes(VALUE_MAX + 1))):
        with pytest.raises(CallFailed) as failed:
            one.put(key, value)
        assert failed.value.status == ARGUMENT
    assert list(one.list()) == []


@pytest.mark.parametrize("name", ["put", "get", "delete", "compare_and_swap", "list", "export", "import"])
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0",
        bytes(8),
        bytes(16),
        bytes(24),
        struct.pack("<BBHI", 2, 0, 1, 0) + b"k",
        struct.pack("<BBHI", 0, 1, 1, 0) + b"k",
        struct.pack("<BBHI", 0, 0, 0xFFFF, 0xFFFFFFFF) + bytes(200),
        struct.pack("<BBHIQQ", 1, 0, 4, 0xFFFFFFFF, 0, 0) + b"key!",
        struct.pack("<BBHIQQ", 1, 0, 4, 1, (1 << 64) - 1, 0) + b"key!v",
        b"\xff" * 300,
    ],
    ids=lambda payload: f"{len(payload)} bytes of {payload[:4].hex()}",
)
def test_requests_that_cannot_be_are_refused(gate: Gate, name: str, payload: bytes) -> None:
    holder = gate.assign(2)
    if name in ("list", "export"):
        payload = payload.replace(bytes(16), bytes(15))  # 16 zeros are a scan from the beginning
    assert gate.control(TIME, argument=SECOND).status == OK
    assert holder.call(name.encode(), payload, 65536)[0] in (ARGUMENT, MAC)
    assert holder.call(b"list", bytes(16)) == (OK, bytes(16))


def test_a_swap_needs_the_version_that_is_there(gate: Gate) -> None:
    one, two = vault(gate, 2), vault(gate, 3)
    first = one.compare_and_swap(b"key", 0, b"one")
    assert isinstance(first, int)
    lost = two.compare_and_swap(b"key", 0, b"two")
    assert isinstance(lost, Changed)
    assert lost.entry is not None
    assert (lost.entry.value, lost.entry.version) == (b"one", first)
    second = two.compare_and_swap(b"key", first, b"two")
    assert isinstance(second, int)
    assert second > first
    one.delete(b"key")
    gone = one.compare_and_swap(b"key", second, b"three")
    assert gone == Changed(None)
    third = one.compare_and_swap(b"key", 0, b"three")
    assert isinstance(third, int)
    assert third > second


def test_processes_that_swap_one_counter_lose_no_increment(images: Images) -> None:
    with Gate(images.vault) as gate:
        first = vault(gate, 2)
        first.put(b"counter", bytes(8))
        request = struct.pack("<BBHIQQ", SHARED, 0, 3, 8, 0, 0) + b"own" + bytes(8)
        workers = [
            gate.worker(gate.assign(3 + n), [("put", request), ("get", NAME)], repeat=100) for n in range(2)
        ]
        increments = 0
        for _ in range(200):
            entry = first.get(b"counter")
            assert entry is not None
            number = int.from_bytes(entry.value, "little") + 1
            if isinstance(
                first.compare_and_swap(b"counter", entry.version, number.to_bytes(8, "little")), int
            ):
                increments += 1
        for worker in workers:
            assert {status for status, _ in worker.replies()} == {OK}
        entry = first.get(b"counter")
        assert entry is not None
        assert int.from_bytes(entry.value, "little") == increments == 200
        # Every put of the shared key got a version of its own: none was lost.
        versions = [entry.version for entry in first.list(b"own")]
        assert len(versions) == 1


NAME = struct.pack("<BBHI", SHARED, 0, 3, 0) + b"own"


def test_an_entry_is_gone_when_its_time_is_over(gate: Gate) -> None:
    one = vault(gate, 2)
    assert gate.control(TIME, argument=1000 * SECOND).status == OK
    one.put(b"short", b"1", ttl_ms=500)
    one.put(b"long", b"2", ttl_ms=5000)
    entry = one.get(b"short")
    assert entry is not None
    assert entry.expires == 1000 * SECOND + SECOND // 2
    assert gate.control(TIME, argument=1000 * SECOND + SECOND // 2).status == OK
    assert one.get(b"short") is None
    assert [listed.key for listed in one.list()] == [b"long"]
    assert not one.delete(b"short")
    one.put(b"short", b"again", ttl_ms=1)
    assert gate.control(TIME, argument=1001 * SECOND).status == OK
    assert isinstance(one.compare_and_swap(b"short", 0, b"fresh"), int)


def test_without_a_time_nothing_can_expire(gate: Gate) -> None:
    one = vault(gate, 2)
    with pytest.raises(CallFailed) as failed:
        one.put(b"key", b"value", ttl_ms=1000)
    assert failed.value.status == -11


def test_a_list_goes_over_many_pages_and_names_each_key_once(gate: Gate) -> None:
    one = vault(gate, 2)
    keys = {b"key %d " % n + b"x" * 200 for n in range(400)}
    for key in keys:
        one.put(key, b"v")
    one.put(b"other", b"v")
    small = [listed.key for listed in _pages(one, b"key", 4000)]
    assert len(small) == len(keys)
    assert set(small) == keys
    assert {listed.key for listed in one.list(b"key")} == keys


def _pages(one: Vault, prefix: bytes, room: int) -> Iterator[_Key]:
    """List with replies of at most `room` bytes."""
    slot = one._slot
    assert isinstance(slot, _Slot)
    cursor = 0
    while True:
        request = struct.pack("<BBHIQ", SHARED, 0, len(prefix), 0, cursor) + prefix
        status, reply = slot.holder.call(b"list", request, room)
        assert status == OK
        cursor, count, _ = struct.unpack_from("<QII", reply)
        position = 16
        for _ in range(count):
            (length,) = struct.unpack_from("<H", reply, position)
            yield _Key(reply[position + 24 : position + 24 + length])
            position += 24 + length
        if not cursor:
            return


@dataclass(frozen=True)
class _Key:
    key: bytes


def test_a_reply_without_room_tells_how_much_it_takes_and_changes_nothing(gate: Gate) -> None:
    one = vault(gate, 2)
    slot = one._slot
    assert isinstance(slot, _Slot)
    request = struct.pack("<BBHIQQ", SHARED, 0, 1, 1, 0, 0) + b"kv"
    assert slot.holder.call(b"put", request, 7)[0] == -7
    assert one.get(b"k") is None
    one.put(b"k", bytes(100))
    assert slot.holder.call(b"get", struct.pack("<BBHI", SHARED, 0, 1, 0) + b"k", 100)[0] == -7


# ---- export and import ---------------------------------------------------------------------


def test_an_export_is_imported_by_another_instance(images: Images) -> None:
    with Gate(images.vault) as old, Gate(images.vault) as new:
        for space in (PRIVATE, SHARED):
            source = vault(old, 2 + space, space=space)
            target = vault(new, 2 + space, space=space)
            values = {b"key %d" % n: bytes([n]) * (n * 150) for n in range(120)}
            for key, value in values.items():
                source.put(key, value)
            blobs = list(source.export())
            assert all(b"key 7" not in blob for blob in blobs)
            assert sum(target.import_(blob) for blob in blobs) == len(values)
            for key, value in values.items():
                entry = target.get(key)
                assert entry is not None
                assert entry.value == value


def test_a_private_export_is_for_its_identity_and_space_only(gate: Gate) -> None:
    mine, shared = both(gate, 2, 1000)
    other, _ = both(gate, 3, 2000)
    mine.put(b"key", b"value")
    (blob,) = mine.export()
    for target in (other, shared):
        with pytest.raises(CallFailed) as failed:
            target.import_(blob)
        assert failed.value.status == MAC
    changed = bytearray(blob)
    changed[-1] ^= 1
    with pytest.raises(CallFailed) as failed:
        mine.import_(bytes(changed))
    assert failed.value.status == MAC


def test_an_export_takes_only_what_begins_with_the_prefix(gate: Gate) -> None:
    one = vault(gate, 2)
    for key in (b"a/1", b"a/2", b"b/1"):
        one.put(key, b"value")
    blobs = list(one.export(b"a/"))
    for key in (b"a/1", b"a/2", b"b/1"):
        one.delete(key)
    assert sum(one.import_(blob) for blob in blobs) == 2
    assert {listed.key for listed in one.list()} == {b"a/1", b"a/2"}


def _fits(one: Vault, key: bytes, value: bytes) -> bool:
    try:
        one.put(key, value)
    except CallFailed as error:
        if error.status != NOMEM:
            raise
        return False
    return True


def test_a_full_vault_refuses_and_keeps_what_it_has(gate: Gate) -> None:
    one = vault(gate, 2)
    stored = 0
    for size, most in ((60_000, 100), (100, 5000)):  # to the last byte
        while _fits(one, b"key %d" % stored, bytes(size)):
            stored += 1
        # At least nine tenths of the heap are used, but for the payload's own copy.
        assert stored * size > (gate.header.heap_size * 9 // 10 - 2 * size if size == 60_000 else 0)
        assert stored < most
    assert len(list(one.list())) == stored
    assert one.get(b"key 3") is not None
    for number in range(stored):
        assert one.delete(b"key %d" % number)
    one.put(b"again", bytes(60_000))


# ---- a model --------------------------------------------------------------------------------

keys = st.sampled_from([b"a", b"b", b"ab", b"c" * KEY_MAX])
values = st.one_of(st.binary(max_size=40), st.integers(0, VALUE_MAX).map(bytes))


@dataclass(frozen=True)
class _Model:
    value: bytes
    version: int
    expires: int


class VaultMachine(RuleBasedStateMachine):
    """Two identities, both spaces, a clock: the enclave does what a dictionary would."""

    images: Images

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate(self.images.vault)
        self.now = 1000 * SECOND
        self.clients = [both(self.gate, 2, 1000), both(self.gate, 3, 2000)]
        self.model: dict[tuple[int | None, bytes], _Model] = {}
        self.highest: dict[tuple[int | None, bytes], int] = {}

    @initialize()
    def start_clock(self) -> None:
        assert self.gate.control(TIME, argument=self.now).status == OK

    def place(self, client: int, space: int, key: bytes) -> tuple[int | None, bytes]:
        return (None if space == SHARED else client, key)

    def present(self, place: tuple[int | None, bytes]) -> _Model | None:
        model = self.model.get(place)
        return model if model and (not model.expires or model.expires > self.now) else None

    def store(self, place: tuple[int | None, bytes], value: bytes, version: int, ttl_ms: int) -> None:
        assert version > self.highest.get(place, 0)
        self.highest[place] = version
        self.model[place] = _Model(value, version, self.now + ttl_ms * 1_000_000 if ttl_ms else 0)

    @rule(
        client=st.integers(0, 1),
        space=st.integers(0, 1),
        key=keys,
        value=values,
        ttl=st.sampled_from([0, 0, 50]),
    )
    def put(self, client: int, space: int, key: bytes, value: bytes, ttl: int) -> None:
        version = self.clients[client][space].put(key, value, ttl_ms=ttl)
        self.store(self.place(client, space, key), value, version, ttl)

    @rule(client=st.integers(0, 1), space=st.integers(0, 1), key=keys)
    def get(self, client: int, space: int, key: bytes) -> None:
        entry = self.clients[client][space].get(key)
        model = self.present(self.place(client, space, key))
        assert (entry and tuple(entry)) == (model and (model.value, model.version, model.expires))

    @rule(client=st.integers(0, 1), space=st.integers(0, 1), key=keys)
    def delete(self, client: int, space: int, key: bytes) -> None:
        place = self.place(client, space, key)
        assert self.clients[client][space].delete(key) == (self.present(place) is not None)
        self.model.pop(place, None)

    @rule(client=st.integers(0, 1), space=st.integers(0, 1), key=keys, value=values, stale=st.booleans())
    def swap(self, client: int, space: int, key: bytes, value: bytes, stale: bool) -> None:
        place = self.place(client, space, key)
        model = self.present(place)
        version = model.version if model else 0
        result = self.clients[client][space].compare_and_swap(key, version + stale, value)
        if stale:
            assert isinstance(result, Changed)
            assert (result.entry and tuple(result.entry)) == (
                model and (model.value, model.version, model.expires)
            )
        else:
            assert isinstance(result, int)
            self.store(place, value, result, 0)

    @rule(milliseconds=st.integers(1, 60))
    def time_passes(self, milliseconds: int) -> None:
        self.now += milliseconds * 1_000_000
        assert self.gate.control(TIME, argument=self.now).status == OK

    @rule(client=st.integers(0, 1), space=st.integers(0, 1), prefix=st.sampled_from([b"", b"a"]))
    def export_and_import(self, client: int, space: int, prefix: bytes) -> None:
        view = self.clients[client][space]
        for blob in list(view.export(prefix)):
            view.import_(blob)
        for listed in view.list(prefix):
            place = self.place(client, space, listed.key)
            model = self.model[place]
            assert listed.version > model.version
            self.highest[place] = listed.version
            self.model[place] = _Model(model.value, listed.version, model.expires)

    @invariant()
    def lists_agree(self) -> None:
        for client, views in enumerate(self.clients):
            for space, view in enumerate(views):
                expected = {
                    (key, len(model.value), model.version, model.expires)
                    for (owner, key), model in self.model.items()
                    if owner == (None if space == SHARED else client) and self.present((owner, key))
                }
                assert {tuple(listed) for listed in view.list()} == expected

    def teardown(self) -> None:
        self.gate.__exit__(None, None, None)


def test_the_vault_does_what_a_dictionary_would(images: Images) -> None:
    class Machine(VaultMachine):
        pass

    Machine.images = images
    Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
    case = Machine.TestCase("runTest")
    case.runTest()
