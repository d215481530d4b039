"""An SGXS writer and a SIGSTRUCT signer of the tests' own.

They share nothing with the ones of the package, so that a misreading of the formats does
not agree with itself.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from functools import cache

import elves
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

PAGE = 4096
CHUNK = 256
R, W, X = 1, 2, 4
REG, TCS = 2 << 8, 1 << 8


def ecreate(size: int, ssa_frame_pages: int = 1, tag: bytes = b"ECREATE\0") -> bytes:
    return struct.pack("<8sIQ44x", tag, ssa_frame_pages, size)


def eadd(offset: int, flags: int) -> bytes:
    return struct.pack("<8sQQ40x", b"EADD", offset, flags)


def eextend(offset: int, data: bytes) -> bytes:
    return struct.pack("<8sQ48x", b"EEXTEND", offset) + data.ljust(CHUNK, b"\0")


def unmeasured(offset: int, data: bytes) -> bytes:
    return struct.pack("<8sQ48x", b"UNMEASRD", offset) + data.ljust(CHUNK, b"\0")


def tcs_page(oentry: int = 0, ossa: int = 0, nssa: int = 1) -> bytes:
    """Return a TCS page that EADD takes."""
    head = struct.pack("<QQQIIQQQQII", 0, 0, ossa, 0, nssa, oentry, 0, 0, 0, 0xFFF, 0xFFF)
    return head.ljust(PAGE, b"\0")


@dataclass
class Stream:
    """Records in the order in which they are to lie in the file."""

    size: int = 64 * 1024
    records: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.records.append(ecreate(self.size))

    def page(self, offset: int, flags: int, data: bytes = b"", *, measured: bool = True) -> Stream:
        """Add one page and all of its chunks when there is data, none of them otherwise."""
        self.records.append(eadd(offset, flags))
        if data:
            data = data.ljust(PAGE, b"\0")
            record = eextend if measured else unmeasured
            self.records += [record(offset + at, data[at : at + CHUNK]) for at in range(0, PAGE, CHUNK)]
        return self

    def to_bytes(self) -> bytes:
        return b"".join(self.records)

    def offset_of(self, index: int) -> int:
        """Return where record `index` starts in the file; negative ones count from the end."""
        return sum(len(record) for record in self.records[: index % len(self.records)])

    def mrenclave(self) -> bytes:
        measured = (record for record in self.records if not record.startswith(b"UNMEASRD"))
        return hashlib.sha256(b"".join(measured)).digest()


def small_image() -> Stream:
    """Return code, a TCS with its SSA frame, and a heap of four pages; not an SDK image."""
    image = Stream(size=64 * 1024)
    image.page(0x0000, REG | R | X, b"\x0f\x0b" * 100)
    image.page(0x1000, TCS, tcs_page(oentry=0, ossa=0x2000))
    image.page(0x2000, REG | R | W)
    for offset in range(0x4000, 0x8000, PAGE):
        image.page(offset, REG | R | W)
    return image


def sdk_header(**changes: int) -> bytes:
    """Return the SDK's image header of sdk_image(), with `changes`."""
    values = {
        "magic": 0x3145544D45455400,
        "abi_version": 1,
        "flags": 0,
        "io_slots": 0,
        "client_slots": 1,
        "nssa": 1,
        "ssa_frame_size": PAGE,
        "size": 64 * 1024,
        "tcs_offset": 0x1000,
        "td_offset": 0x4000,
        "td_stride": 0x1000,
        "stack_offset": 0x7000,
        "stack_stride": 0x1000,
        "stack_size": 0x1000,
        "ssa_offset": 0xA000,
        "heap_offset": 0xD000,
        "heap_size": 0x3000,
        "rela_offset": 0x100,
        "rela_count": 2,
    }
    values.update(changes)
    return struct.pack("<Q6I12Q", *values.values())


def sdk_image(**changes: int) -> Stream:
    """Return an image that the SDK could have made, had it an entry point."""
    image = Stream(size=64 * 1024).page(0, REG | R | X, sdk_header(**changes))
    for offset in range(0x1000, 0x4000, PAGE):
        image.page(offset, TCS, b"\0")
    for offset in range(0x4000, 0x10000, PAGE):
        image.page(offset, REG | R | W)
    return image


@cache
def signing_key() -> rsa.RSAPrivateKey:
    """Return a key that is made once in a run (or, for the machine, once in many)."""
    return elves.signing_key()


def sign(
    mrenclave: bytes,
    *,
    attributes: int = 4,
    attribute_mask: int = (1 << 64) - 1 & ~2,
    xfrm: int = 3,
    xfrm_mask: int = (1 << 64) - 1,
    misc: int = 0,
    misc_mask: int = 0xFFFFFFFF,
    key: rsa.RSAPrivateKey | None = None,
) -> bytes:
    """Return a SIGSTRUCT for `mrenclave`: 64-bit, and debug or not as the loader likes."""
    key = key or signing_key()
    head = bytes.fromhex("06000000e10000000000010000000000") + struct.pack("<II", 0, 0x20260101)
    head += bytes.fromhex("01010000600000006000000001000000") + struct.pack("<I84x", 0)
    body = struct.pack("<II20x", misc, misc_mask)
    body += struct.pack("<QQQQ", attributes, xfrm, attribute_mask, xfrm_mask)
    body += mrenclave + bytes(32) + struct.pack("<HH", 7, 3)
    assert (len(head), len(body)) == (128, 128)
    m = key.public_key().public_numbers().n
    s = int.from_bytes(key.sign(head + body, padding.PKCS1v15(), hashes.SHA256()), "big")
    q1, r1 = divmod(s * s, m)
    q2 = r1 * s // m
    numbers = [number.to_bytes(384, "little") for number in (m, s, q1, q2)]
    return head + numbers[0] + struct.pack("<I", 3) + numbers[1] + body + bytes(12) + numbers[2] + numbers[3]
