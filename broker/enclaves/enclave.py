"""Enclaves: how they are built, and what the broker knows of each.

Building runs in a worker thread, through libteemate: it reads the image, hashes it, and copies its
pages.  Nothing is mapped or entered here, not even to set the control key; the warden does that.
"""

from __future__ import annotations

import enum
import os
import stat
import struct
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import trio

from teemate import errors, wire
from teemate._native import ffi, lib
from teemate.broker.enclaves.control import ControlKey, SlotKey
from teemate.broker.enclaves.source import ImageSource
from teemate.broker.policy.limits import Charge
from teemate.broker.policy.rules import EnclavePolicy
from teemate.broker.slots.table import SlotStatistics, SlotTable
from teemate.broker.telemetry.durations import WAIT_BOUNDS, Durations, DurationStatistics
from teemate.broker.wardens.warden import Geometry, Warden, WardenStatistics

__all__ = [
    "AttachInfo",
    "Built",
    "Enclave",
    "EnclaveState",
    "EnclaveStatistics",
    "ImageFacts",
    "build_enclave",
    "measure_image",
    "require_file",
]

SIGSTRUCT_SIZE = 1808
PAGE = 4096
_ATTRIBUTE_DEBUG = 0x2
_WARDEN_SLOTS = 2
_SLOT_COUNTS = ("total", "free", "used", "withheld", "quarantined", "waiting")
_MAX_SLOTS = 4096
_HEADER = struct.Struct("<QIIIIIIQQ")  # struct tm_image_header up to tcs_offset
_STEPS = {
    1: "read",
    2: "parse",
    3: "sigstruct",
    4: "ecreate",
    5: "eadd",
    6: "einit",
    7: "map",
    8: "enter",
    9: "control",
}
_SEGMENT_CAPACITY = 4096


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What an image and its SIGSTRUCT say, before anything is built."""

    size: int
    pages: int
    mrenclave: bytes
    mrsigner: bytes
    isvsvn: int
    sdk: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An enclave as far as EINIT; whoever holds this owns `fd` and `arena`."""

    fd: int
    arena: int
    base: int
    size: int
    pages: int
    debug: bool
    sdk: bool
    isvprodid: int
    isvsvn: int
    mrenclave: bytes
    mrsigner: bytes
    segments: tuple[tuple[int, int, int, int], ...]
    tcs: tuple[int, ...]
    io_slots: int
    client_slots: int


def _image_error(status: int, diag: Any) -> errors.ImageError:
    text = ffi.string(diag.text).decode("utf-8", "replace") or os.strerror(-status)
    step = _STEPS.get(diag.step, "image")
    detail = {"step": step, "code": int(diag.code), "offset": int(diag.offset)}
    return errors.ImageError(f"{step}: {text}", detail)


def require_file(image_fd: int) -> None:
    """An image is read several times and from anywhere: only a regular file can be."""
    try:
        mode = os.fstat(image_fd).st_mode
    except OSError as error:  # its file system has failed
        raise errors.ImageError(
            f"read: {error.strerror}", {"step": "read", "code": 0, "offset": 0}
        ) from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a directory", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise errors.ImageError(
            f"the image is {kind}: send the descriptor of a regular file",
            {"step": "read", "code": 0, "offset": 0},
        )


def measure_image(image_fd: int, sigstruct: bytes) -> ImageFacts:
    """Return what is in an image, before a page is built.  `image_fd` stays the caller's.

    Raises
    ------
    ImageError
        With the step, and the offset of the record or field at fault.

    """
    require_file(image_fd)
    diag = ffi.new("struct teemate_diag *")
    info = ffi.new("struct teemate_image_info *")
    status = lib.teemate_image_measure(image_fd, info, diag)
    if status < 0:
        raise _image_error(status, diag)
    mrsigner = ffi.new("uint8_t[32]")
    status = lib.teemate_sigstruct_verify(sigstruct, bytes(ffi.buffer(info.mrenclave)), mrsigner, diag)
    if status < 0:
        raise _image_error(status, diag)
    return ImageFacts(
        size=info.size,
        pages=info.pages,
        mrenclave=bytes(ffi.buffer(info.mrenclave)),
        mrsigner=bytes(ffi.buffer(mrsigner)),
        isvsvn=int.from_bytes(sigstruct[1026:1028], "little"),
        sdk=bool(info.sdk),
    )


def build_enclave(image_fd: int, sigstruct: bytes, *, backend: str, base: int, debug: bool) -> Built:
    """Build an enclave at `base`; for a worker thread.  `image_fd` stays the caller's.

    Raises
    ------
    ImageError
        Image or SIGSTRUCT is bad, or the backend refuses them.
    LimitReached
        The host has no memory or EPC for it.

    """
    require_file(image_fd)
    number = lib.TEEMATE_SIM if backend == "sim" else lib.TEEMATE_SGX
    diag = ffi.new("struct teemate_diag *")
    handle = ffi.new("struct teemate_enclave **")
    status = lib.teemate_create(
        number, base, _ATTRIBUTE_DEBUG if debug else 0, image_fd, sigstruct, handle, diag
    )
    if status < 0:
        error = _image_error(status, diag)
        if -status in (12, 28):  # ENOMEM, ENOSPC
            raise errors.LimitReached(error.message, error.detail)
        raise error
    enclave = handle[0]
    try:
        return _describe(enclave)
    finally:
        lib.teemate_close(enclave)


def _describe(enclave: Any) -> Built:
    info = ffi.new("struct teemate_enclave_info *")
    status = lib.teemate_enclave_describe(enclave, info)
    if status < 0:
        raise errors.InternalError(f"a finished enclave cannot be described: {os.strerror(-status)}")
    raw = ffi.new("struct teemate_segment[]", _SEGMENT_CAPACITY)
    count = lib.teemate_enclave_segments(enclave, raw, _SEGMENT_CAPACITY)
    if count > _SEGMENT_CAPACITY:
        raise errors.ImageError(f"the image has {count} segments; at most {_SEGMENT_CAPACITY} can be mapped")
    offsets = ffi.new("uint64_t[]", _MAX_SLOTS)
    tcs_count = lib.teemate_enclave_tcs(enclave, offsets, _MAX_SLOTS)
    if tcs_count > _MAX_SLOTS:
        raise errors.ImageError(f"the image has {tcs_count} TCSs; at most {_MAX_SLOTS} can be used")
    sdk = bool(info.sdk)
    tcs = tuple(int(offset) for offset in offsets[0:tcs_count])
    io_slots, client_slots = 0, int(tcs_count)
    if sdk:
        header = _HEADER.unpack_from(bytes(ffi.buffer(info.header)))
        io_slots, client_slots, tcs_offset = header[3], header[4], header[8]
        total = _WARDEN_SLOTS + io_slots + client_slots
        expected = tuple(tcs_offset + index * PAGE for index in range(total))
        if tcs != expected:
            raise errors.ImageError(
                f"the image header names {total} slots from {tcs_offset:#x} on, its TCS pages are others"
            )
    arena = lib.teemate_arena_create()
    if arena < 0:
        raise errors.LimitReached(f"no memory for the arena: {os.strerror(-arena)}")
    try:
        fd = os.dup(lib.teemate_enclave_fd(enclave))
    except OSError:
        os.close(arena)
        raise
    return Built(
        fd=fd,
        arena=arena,
        base=info.base,
        size=info.size,
        pages=info.pages,
        debug=bool(info.attributes & _ATTRIBUTE_DEBUG),
        sdk=sdk,
        isvprodid=info.isvprodid,
        isvsvn=info.isvsvn,
        mrenclave=bytes(ffi.buffer(info.mrenclave)),
        mrsigner=bytes(ffi.buffer(info.mrsigner)),
        segments=tuple((int(s.offset), int(s.size), int(s.prot), int(s.type)) for s in raw[0:count]),
        tcs=tcs,
        io_slots=io_slots,
        client_slots=client_slots,
    )


class AttachInfo(NamedTuple):
    """The pairs of ``enclave-info``, encoded, and how many they are; slots and clients are not among them."""

    data: bytes
    pairs: int


class EnclaveState(enum.Enum):
    """As on the wire."""

    BUILDING = "building"
    READY = "ready"
    DRAINING = "draining"
    QUARANTINED = "quarantined"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveStatistics:
    """One enclave at this moment."""

    name: str
    generation: int
    state: str
    clients: int
    grants: int
    attaches: int
    recycled: int
    repaired: int
    waits: DurationStatistics
    """Of requests that had to wait for slots, also of those that got none."""
    slots: SlotStatistics
    warden: WardenStatistics | None


@final
class Enclave:
    """One finished enclave: its descriptors, keys, slots and warden."""

    def __init__(
        self,
        policy: EnclavePolicy,
        backend: str,
        built: Built,
        charge: Charge | None,
        *,
        generation: int = 1,
        key: ControlKey | None = None,
    ) -> None:
        self.on_change: Callable[[Enclave], None] = lambda _enclave: None
        """Called when something has changed that has to outlive the broker."""
        self.on_unready: Callable[[], None] = lambda: None
        """Called before it is not ready any more: nobody gets in after that."""
        self.on_armed: Callable[[], None] = lambda: None
        """Called when a slot got free."""
        self.policy = policy
        self.generation = generation
        self.serial = 0
        """Its number in the broker's state, which no other enclave ever gets."""
        self.requested = False
        """Whether a client had it made, and not the policy's file."""
        self.payer: int | None = None
        """The uid whose account its pages are on."""
        self.maker = (0, 0)
        """The client and its request that made it."""
        self.made_from = (b"", "")
        """SIGSTRUCT of the image, and where that came from."""
        self.retired = False
        """Whether its name has a newer generation."""
        self.used: set[int] = set()
        """Without a warden: the slots that were handed out once."""
        self.recovered = trio.Event()
        """Set unless the broker was restarted and has not looked at all slots yet."""
        self.recovered.set()
        self.source: ImageSource | None = None
        """For the next generation; it is closed with the enclave."""
        self.ending = False
        """Whether it is being destroyed: no way back to `ready` from there."""
        self.destroyed = trio.Event()
        self.drained = ""
        """Why an administrator has it drained; its next generation is drained as well."""
        self.upgrading = False
        """Whether it is drained for an upgrade only: that ends with the broker, and then it goes on."""
        self.upgrade_broke_off = False
        """Whether its holders have to be told so."""
        self.lost_first_seen_by: dict[str, int] = {}
        """Client, pid, uid and grant whose slot came back when the warden found the memory gone."""
        self.changed = trio.lowlevel.ParkingLot()
        """Woken when a grant has ended, or the warden is done with a slot: see :meth:`wait_unused`."""
        self.name = policy.name
        self.backend = backend
        self.built = built
        self._state = EnclaveState.BUILDING
        self.reason = ""
        self.key = key or ControlKey()
        first = _WARDEN_SLOTS + built.io_slots if built.sdk else 0
        self.slots = SlotTable(range(first, first + built.client_slots))
        self.slot_keys: dict[int, SlotKey] = {
            index: SlotKey(0, bytes(16)) for index in range(first, first + built.client_slots)
        }
        self.grants: set[int] = set()
        self.clients_by_uid: dict[int, int] = {}
        self.warden: Warden | None = None
        self.attaches = 0
        self.recycled = 0
        self.repaired = 0
        """Slots that came back with a call in them: interrupted, parked or stolen."""
        self.waits = Durations(WAIT_BOUNDS)
        self.gate_calls: dict[int, tuple[float, int]] = {}
        """By slot: when it was read, and how many calls the gate had counted then."""
        self.slot_work: defaultdict[int, trio.Lock] = defaultdict(trio.Lock)
        """By slot: who clears, repairs, resets and arms it."""
        self.charge = charge
        self.fixed_info: dict[str, object] = {
            "name": self.name,
            "generation": generation,
            "backend": backend,
            "isolation": "gate" if built.sdk else "none",
            "mrenclave": built.mrenclave,
            "mrsigner": built.mrsigner,
            "isvprodid": built.isvprodid,
            "isvsvn": built.isvsvn,
            "debug": built.debug,
            "sdk": built.sdk,
            "base": built.base,
            "size": built.size,
            "pages": built.pages,
            "owner": policy.owner,
        }
        self.segments = wire.Encoded(built.segments)
        # cbor2 imports the email package when it first looks for the encoder of a type that it does
        # not know; the first client to attach would wait 10 ms for that.
        wire.encode({"segments": self.segments})
        """As every reply to `attach` has them."""

    @property
    def state(self) -> EnclaveState:
        """As on the wire; `reason` says why it is not ready."""
        return self._state

    @state.setter
    def state(self, state: EnclaveState) -> None:
        if state is not EnclaveState.READY:
            self.on_unready()
        self._state = state
        self.on_change(self)

    @property
    def geometry(self) -> Geometry:
        """What a warden has to know."""
        built = self.built
        number = lib.TEEMATE_SIM if self.backend == "sim" else lib.TEEMATE_SGX
        return Geometry(backend=number, base=built.base, size=built.size, segments=built.segments)

    @property
    def sim(self) -> bool:
        """Whether its memory is a model that protects nothing."""
        return self.backend == "sim"

    def info(self) -> dict[str, object]:
        """Return ``enclave-info`` of the protocol."""
        info = self.fixed_info | {
            "state": self.state.value,
            "slots": dict(zip(_SLOT_COUNTS, self.slots.counts(), strict=True)),
            "clients": sum(self.clients_by_uid.values()),
        }
        if self.reason:
            info["reason"] = self.reason
        return info

    def attach_parts(self) -> tuple[AttachInfo, bytes]:
        """Return what all replies to `attach` have in common, while it is ready: see :meth:`info`."""
        pairs = self.fixed_info | {"state": EnclaveState.READY.value}
        assert len(pairs) < 24  # then a map's head is one byte
        rest = {"segments": self.segments, "arena": self.arena_address}
        return AttachInfo(wire.encode_part(pairs)[1:], len(pairs)), wire.encode_part(rest)[1:]

    @property
    def arena_address(self) -> int:
        """Where everybody maps the arena."""
        return self.built.base + self.built.size + PAGE

    def counts(self) -> tuple[int, ...]:
        """Return the numbers of :meth:`info`: ``slot-counts`` in their order, and the clients."""
        return (*self.slots.counts(), sum(self.clients_by_uid.values()))

    def close(self) -> None:
        """Close the descriptors; clients that mapped the enclave keep it alive until they end."""
        self.on_unready()
        os.close(self.built.fd)
        os.close(self.built.arena)
        if self.source is not None:
            self.source.close()
        if self.charge is not None:
            self.charge.release()
            self.charge = None

    async def wait_unused(self) -> None:
        """Return when no grant is left, and no slot that somebody may still use or the warden works on."""
        while self.grants or self.slots.in_use or (self.slots.arming and self.state is not EnclaveState.LOST):
            await self.changed.park()

    async def wait_ungranted(self) -> None:
        """Return when no grant is left."""
        while self.grants:
            await self.changed.park()

    def statistics(self) -> EnclaveStatistics:
        """This enclave at this moment."""
        return EnclaveStatistics(
            name=self.name,
            generation=self.generation,
            state=self.state.value,
            clients=sum(self.clients_by_uid.values()),
            grants=len(self.grants),
            attaches=self.attaches,
            recycled=self.recycled,
            repaired=self.repaired,
            waits=self.waits.statistics(),
            slots=self.slots.statistics(),
            warden=self.warden.statistics() if self.warden else None,
        )
