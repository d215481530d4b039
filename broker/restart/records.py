"""The records of the snapshot: enclaves and clients as maps, and back.

What is read was written by a broker of the same format, and a checksum says so; what does not fit
all the same is damage, and refused as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

from teemate.broker.connections.identity import Identity
from teemate.broker.enclaves.enclave import Built, Enclave
from teemate.broker.policy.rules import EnclavePolicy, Rule
from teemate.broker.restart.snapshot import DamagedSnapshotError
from teemate.broker.slots.table import SlotState

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.enclaves.draining import StoredEnclave
    from teemate.broker.slots.grants import Grant

__all__ = [
    "GUEST",
    "ClientRecord",
    "EnclaveRecord",
    "GrantRecord",
    "SlotRecord",
    "StoredRecord",
    "client_content",
    "enclave_content",
    "greeted_content",
    "guest_content",
    "read_client",
    "read_enclave",
    "read_stored",
    "stored_content",
]

T = TypeVar("T")
_DESCRIPTORS = ("fd", "arena")
GUEST = "guest"
"""The kind of a record of those who are expected (guests.py)."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveRecord:
    """What an enclave is made again from, with its two descriptors."""

    serial: int
    policy: EnclavePolicy
    requested: bool
    backend: str
    built: Mapping[str, Any]
    control_key: bytes
    generation: int
    state: str
    reason: str
    quarantined: dict[int, str]
    former: dict[int, int]
    used: frozenset[int]
    payer: int | None
    maker: tuple[int, int]
    sigstruct: bytes
    origin: str
    drained: str
    upgrading: bool
    retired: bool
    ending: bool

    def with_descriptors(self, fd: int, arena: int) -> Built:
        """Return the geometry with the descriptors that were kept; the result owns them."""
        return Built(fd=fd, arena=arena, **self.built)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    """An enclave that was taken down to empty the host, with its image's descriptor."""

    serial: int
    policy: EnclavePolicy
    backend: str
    pages: int
    generation: int
    payer: int | None
    maker: tuple[int, int]
    sigstruct: bytes
    origin: str


@final
@dataclass(frozen=True, slots=True)
class SlotRecord:
    """A slot of a grant; `withheld` is the reason when it is not the client's any more."""

    index: int
    generation: int
    key: bytes
    withheld: str


@final
@dataclass(frozen=True, slots=True)
class GrantRecord:
    """A grant; `over`: given up, with slots that are withheld."""

    number: int
    enclave: int
    over: bool
    revoked: bool
    slots: tuple[SlotRecord, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRecord:
    """A client; `left`: its connection had ended, and its process has slots that are withheld."""

    identity: Identity
    started: int
    name: str
    left: bool
    tokens: tuple[bytes, ...]
    grants: tuple[GrantRecord, ...]
    returning: dict[tuple[int, int], int]
    """Slots that it had had, which the warden was not done with: enclave, index and generation."""
    outcomes: dict[int, tuple[str, dict[str, object]]]
    intents: dict[int, dict[str, object]]


# ---- writing ---------------------------------------------------------------------------------


def enclave_content(enclave: Enclave) -> dict[str, object]:
    """Return the record of an enclave; it holds the control key."""
    built = {
        field.name: getattr(enclave.built, field.name)
        for field in fields(Built)
        if field.name not in _DESCRIPTORS
    }
    return {
        "policy": _policy_content(enclave.policy),
        "requested": enclave.requested,
        "backend": enclave.backend,
        "built": built,
        "control_key": enclave.key.for_warden(),
        "generation": enclave.generation,
        "state": enclave.state.value,
        "reason": enclave.reason,
        "quarantined": {
            slot.index: slot.reason
            for slot in enclave.slots.slots.values()
            if slot.state is SlotState.QUARANTINED
        },
        "former": {
            slot.index: slot.former for slot in enclave.slots.slots.values() if slot.former is not None
        },
        "used": list(enclave.used),
        "payer": enclave.payer,
        "maker": enclave.maker,
        "made_from": enclave.made_from,
        "drained": enclave.drained,
        "upgrading": enclave.upgrading,
        "retired": enclave.retired,
        "ending": enclave.ending,
    }


def stored_content(stored: StoredEnclave) -> dict[str, object]:
    """Return the record of an enclave that was taken down to empty the host."""
    return {
        "policy": _policy_content(stored.policy),
        "backend": stored.backend,
        "pages": stored.charge.amount if stored.charge is not None else 0,
        "generation": stored.generation,
        "payer": stored.payer,
        "maker": stored.maker,
        "made_from": (stored.source.sigstruct, stored.source.origin),
    }


def _policy_content(policy: EnclavePolicy) -> dict[str, object]:
    content: dict[str, object] = {}
    for field in fields(EnclavePolicy):
        value = getattr(policy, field.name)
        if isinstance(value, Path):
            value = str(value)
        content[field.name] = value
    content["attach"] = [
        [_list(rule.uids), rule.any_uid, _list(rule.gids), _list(rule.cgroups)] for rule in policy.attach
    ]
    return content


def _list(values: frozenset[int] | tuple[str, ...] | None) -> list[object] | None:
    return None if values is None else list(values)


def client_content(client: Client, started: int) -> dict[str, object]:
    """Return the record of a client; it holds the slot keys.  On the path of every attach."""
    identity = client.identity
    grants = [grant for grant in client.grants.values() if grant.handed_out]
    return {
        "identity": [
            identity.pid, identity.uid, identity.gid, list(identity.groups), identity.label,
            identity.cgroup.encode("utf-8", "surrogateescape"),
        ],
        "started": started,
        "name": client.name,
        "left": client.left,
        "tokens": client.tokens if client.first_token is None else (*client.tokens, client.first_token),
        "grants": [_grant_content(grant) for grant in [*grants, *client.withheld]],
        "returning": [[serial, index, at] for (serial, index), at in client.returning.items()],
        "outcomes": client.recalled | client.outcomes if client.recalled else client.outcomes,
        "intents": client.intents,
    }  # fmt: skip


def guest_content(identity: Identity) -> dict[str, object]:
    """Return what is known ahead of clients that are like this one."""
    return {"identity": [identity.uid, identity.gid, list(identity.groups), identity.label]}


def greeted_content(
    guest: Mapping[str, Any], *, pid: int, started: int, name: str, token: bytes | None, session: bytes | None
) -> dict[str, object]:
    """Return the record of a client that was greeted and has asked for nothing yet.

    Its cgroup is not known: what it resumes with tells.

    Raises
    ------
    DamagedSnapshotError

    """
    try:
        uid, gid, groups, label = guest["identity"]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedSnapshotError("the record of a guest is not as this broker writes it") from error
    return {
        "identity": [pid, uid, gid, groups, label, b""],
        "started": started,
        "name": name,
        "left": False,
        "tokens": [hashed for hashed in (token, session) if hashed is not None],
        "grants": [],
        "returning": [],
        "outcomes": {},
        "intents": {},
    }


def _grant_content(grant: Grant) -> list[object]:
    enclave = grant.enclave
    slots = []
    for index in grant.charges:
        key, slot = enclave.slot_keys[index], enclave.slots.slots[index]
        withheld = slot.reason if slot.state is SlotState.WITHHELD else ""
        slots.append([index, key.generation, key.key, withheld])
    return [grant.number, enclave.serial, grant.over, grant.revoked, slots]


# ---- reading ---------------------------------------------------------------------------------


def _read(what: str, number: int, make: Callable[[], T]) -> T:
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedSnapshotError(
            f"the record of {what} {number} is not as this broker writes it"
        ) from error


def read_enclave(serial: int, content: Mapping[str, Any]) -> EnclaveRecord:
    """Return the record of an enclave.

    Raises
    ------
    DamagedSnapshotError

    """

    def make() -> EnclaveRecord:
        built = dict(content["built"])
        built["segments"] = tuple(tuple(segment) for segment in built["segments"])
        built["tcs"] = tuple(built["tcs"])
        client, request = content["maker"]
        sigstruct, origin = content["made_from"]
        record = EnclaveRecord(
            serial=serial,
            policy=_read_policy(content["policy"]),
            requested=content["requested"],
            backend=content["backend"],
            built=built,
            control_key=content["control_key"],
            generation=content["generation"],
            state=content["state"],
            reason=content["reason"],
            quarantined=dict(content["quarantined"]),
            former=dict(content.get("former", {})),  # an older broker wrote nothing of it
            used=frozenset(content["used"]),
            payer=content["payer"],
            maker=(client, request),
            sigstruct=sigstruct,
            origin=origin,
            drained=content["drained"],
            upgrading=content.get("upgrading", False),  # an older broker wrote nothing of it
            retired=content["retired"],
            ending=content["ending"],
        )
        record.with_descriptors(-1, -1)  # every field is there
        return record

    return _read("enclave", serial, make)


def read_stored(serial: int, content: Mapping[str, Any]) -> StoredRecord:
    """Return the record of an enclave that was taken down to empty the host.

    Raises
    ------
    DamagedSnapshotError

    """

    def make() -> StoredRecord:
        client, request = content["maker"]
        sigstruct, origin = content["made_from"]
        return StoredRecord(
            serial=serial,
            policy=_read_policy(content["policy"]),
            backend=content["backend"],
            pages=content["pages"],
            generation=content["generation"],
            payer=content["payer"],
            maker=(client, request),
            sigstruct=sigstruct,
            origin=origin,
        )

    return _read("stored enclave", serial, make)


def _read_policy(content: Mapping[str, Any]) -> EnclavePolicy:
    values = dict(content)
    values["attach"] = tuple(
        Rule(
            uids=None if uids is None else frozenset(uids),
            any_uid=any_uid,
            gids=None if gids is None else frozenset(gids),
            cgroups=None if cgroups is None else tuple(cgroups),
        )
        for uids, any_uid, gids, cgroups in content["attach"]
    )
    for key in ("image", "sigstruct"):
        values[key] = None if values[key] is None else Path(values[key])
    return EnclavePolicy(**values)


def read_client(number: int, content: Mapping[str, Any]) -> ClientRecord:
    """Return the record of a client.

    Raises
    ------
    DamagedSnapshotError

    """

    def make() -> ClientRecord:
        pid, uid, gid, groups, label, cgroup = content["identity"]
        return ClientRecord(
            identity=Identity(
                pid=pid,
                uid=uid,
                gid=gid,
                groups=frozenset(groups),
                label=label,
                cgroup=cgroup.decode("utf-8", "surrogateescape"),
            ),
            started=content["started"],
            name=content["name"],
            left=content["left"],
            tokens=tuple(content["tokens"]),
            grants=tuple(
                GrantRecord(grant, enclave, over, revoked, tuple(SlotRecord(*slot) for slot in slots))
                for grant, enclave, over, revoked, slots in content["grants"]
            ),
            returning={(serial, index): at for serial, index, at in content["returning"]},
            outcomes={number: (op, ok) for number, (op, ok) in content["outcomes"].items()},
            intents=dict(content["intents"]),
        )

    return _read("client", number, make)
