"""SIGSTRUCT, the enclave's signature: 1808 bytes, described by one table.

Intel SDM volume 3D, "Enclave Signature Structure (SIGSTRUCT)" gives the fields; "EINIT" gives
the checks that :func:`verify` does beforehand, with a sentence that names the field.
"""

from __future__ import annotations

import datetime
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Final

from ._problem import problem

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

__all__ = [
    "ATTR_DEBUG",
    "ATTR_MODE64BIT",
    "SIZE",
    "Field",
    "SigParams",
    "Sigstruct",
    "field_at",
    "sign",
    "sign_with_key",
    "verify",
]

SIZE = 1808

ATTR_INIT = 0x01
ATTR_DEBUG = 0x02
ATTR_MODE64BIT = 0x04
ATTR_PROVISIONKEY = 0x10
ATTR_EINITTOKENKEY = 0x20
ATTR_KSS = 0x80
ATTR_AEXNOTIFY = 0x400
XFRM_LEGACY = 3

# SDM 3D, "SIGSTRUCT": both are constants that EINIT compares.
HEADER = bytes.fromhex("06000000e10000000000010000000000")
HEADER2 = bytes.fromhex("01010000600000006000000001000000")
EXPONENT = 3
_KEY_BYTES = 384
_ALL = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Field:
    """One row of the SDM's table: where a field lies and how it is packed."""

    name: str
    offset: int
    format: str

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return struct.calcsize("<" + self.format)


# SDM 3D, table "Layout of Enclave Signature Structure (SIGSTRUCT)".  Names are the SDM's, in lower
# case.  What the table leaves out is reserved and zero; the key and its numbers are little endian.
FIELDS: Final = (
    Field("header", 0, "16s"),
    Field("vendor", 16, "I"),  # 0x8086 for Intel, 0 for others
    Field("date", 20, "I"),  # BCD, yyyymmdd
    Field("header2", 24, "16s"),
    Field("swdefined", 40, "I"),
    Field("modulus", 128, "384s"),
    Field("exponent", 512, "I"),
    Field("signature", 516, "384s"),  # over bytes 0 to 127 and 900 to 1027
    Field("miscselect", 900, "I"),
    Field("miscmask", 904, "I"),
    Field("cet_attributes", 908, "B"),
    Field("cet_attributes_mask", 909, "B"),
    Field("isvfamilyid", 912, "16s"),
    Field("attributes", 928, "Q"),
    Field("xfrm", 936, "Q"),
    Field("attributemask", 944, "Q"),
    Field("xfrmmask", 952, "Q"),
    Field("enclavehash", 960, "32s"),
    Field("isvextprodid", 1008, "16s"),
    Field("isvprodid", 1024, "H"),
    Field("isvsvn", 1026, "H"),
    Field("q1", 1040, "384s"),  # floor(signature^2 / modulus)
    Field("q2", 1424, "384s"),  # floor((signature^3 - q1 * signature * modulus) / modulus)
)
_BY_NAME = {field.name: field for field in FIELDS}
_SIGNED = (slice(0, 128), slice(900, 1028))


def field_at(offset: int) -> str:
    """Return the name of the field that byte `offset` belongs to."""
    for field in FIELDS:
        if field.offset <= offset < field.offset + field.size:
            return field.name
    return "reserved"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sigstruct:
    """A SIGSTRUCT; attributes are named as in :data:`FIELDS`.  Nothing is checked: see :func:`verify`."""

    header: bytes = HEADER
    vendor: int = 0
    date: int = 0
    header2: bytes = HEADER2
    swdefined: int = 0
    modulus: bytes = bytes(_KEY_BYTES)
    exponent: int = EXPONENT
    signature: bytes = bytes(_KEY_BYTES)
    miscselect: int = 0
    miscmask: int = 0xFFFFFFFF
    cet_attributes: int = 0
    # CPUs without CET have these two reserved, and refuse what is not zero.
    cet_attributes_mask: int = 0
    isvfamilyid: bytes = bytes(16)
    attributes: int = ATTR_MODE64BIT
    xfrm: int = XFRM_LEGACY
    attributemask: int = _ALL
    xfrmmask: int = _ALL
    enclavehash: bytes = bytes(32)
    isvextprodid: bytes = bytes(16)
    isvprodid: int = 0
    isvsvn: int = 0
    q1: bytes = bytes(_KEY_BYTES)
    q2: bytes = bytes(_KEY_BYTES)

    def to_bytes(self) -> bytes:
        """Return the 1808 bytes; reserved ones are zero."""
        data = bytearray(SIZE)
        for field in FIELDS:
            struct.pack_into("<" + field.format, data, field.offset, getattr(self, field.name))
        return bytes(data)

    @classmethod
    def from_bytes(cls, data: bytes) -> Sigstruct:
        """Read 1808 bytes.

        Raises :class:`~teemate.errors.ImageError` for another length, or for reserved bytes that are
        not zero, which no field could carry.
        """
        if len(data) != SIZE:
            raise problem("sigstruct", f"a SIGSTRUCT has {SIZE} bytes, not {len(data)}", size=len(data))
        values = {
            field.name: struct.unpack_from("<" + field.format, data, field.offset)[0] for field in FIELDS
        }
        result = cls(**values)
        if (canonical := result.to_bytes()) != data:
            at = next(n for n in range(SIZE) if data[n] != canonical[n])
            raise problem("sigstruct", "reserved bytes are not zero", offset=at, field="reserved")
        return result

    @property
    def signed_bytes(self) -> bytes:
        """The 256 bytes that the signature is over."""
        data = self.to_bytes()
        return b"".join(data[part] for part in _SIGNED)

    @property
    def mrsigner(self) -> bytes:
        """SHA-256 of the modulus as it lies in the structure, 32 bytes."""
        return hashlib.sha256(self.modulus).digest()

    @property
    def debug_allowed(self) -> bool:
        """Whether an enclave with ATTRIBUTES.DEBUG may be made with it."""
        return bool(self.attributes & ATTR_DEBUG or not self.attributemask & ATTR_DEBUG)

    @property
    def day(self) -> str:
        """The date as ``2024-01-31``."""
        digits = f"{self.date:08x}"
        return f"{digits[:4]}-{digits[4:6]}-{digits[6:]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SigParams:
    """What the signer decides.

    `date`: deterministic by default (1 January 2000), so that signing twice gives the same bytes.
    `debug_allowed`: permit ATTRIBUTES.DEBUG (anybody with the fd can then read the enclave's memory).
    `provision_key`: the enclave may ask for provisioning keys.  `exinfo`: SSA frames carry the exact
    address of page faults; CPUs without SGX2 refuse that.  `aexnotify`: permit AEX-Notify.
    """

    isvprodid: int = 0
    isvsvn: int = 0
    date: datetime.date = datetime.date(2000, 1, 1)
    vendor: int = 0
    swdefined: int = 0
    debug_allowed: bool = False
    provision_key: bool = False
    exinfo: bool = False

    def unsigned(self, mrenclave: bytes) -> Sigstruct:
        """Return the structure of an image of that measurement, still without key and signature."""
        for name, limit in (("isvprodid", 16), ("isvsvn", 16), ("vendor", 32), ("swdefined", 32)):
            if not 0 <= getattr(self, name) < 1 << limit:
                raise problem(
                    "sigstruct", f"{name} {getattr(self, name)} has more than {limit} bits", field=name
                )
        return Sigstruct(
            vendor=self.vendor,
            date=int(self.date.strftime("%Y%m%d"), 16),
            swdefined=self.swdefined,
            miscselect=int(self.exinfo),
            attributes=ATTR_MODE64BIT | (ATTR_PROVISIONKEY if self.provision_key else 0),
            attributemask=_ALL & ~ATTR_DEBUG if self.debug_allowed else _ALL,
            enclavehash=mrenclave,
            isvprodid=self.isvprodid,
            isvsvn=self.isvsvn,
        )


def sign(unsigned: Sigstruct, *, modulus: int, rsa: Callable[[bytes], bytes]) -> Sigstruct:
    """Return `unsigned` with key and signature.

    `rsa` gets the 256 bytes to be signed and returns their RSASSA-PKCS1-v1_5 signature with
    SHA-256, 384 bytes, big endian as usual; the key may be in an HSM.  Its answer is checked
    against `modulus`: ImageError when it does not fit.
    """
    if modulus.bit_length() != 3072:
        raise problem(
            "key", f"SGX wants an RSA key of 3072 bits, this one has {modulus.bit_length()}", field="modulus"
        )
    prepared = replace(unsigned, modulus=modulus.to_bytes(_KEY_BYTES, "little"), exponent=EXPONENT)
    signature = int.from_bytes(rsa(prepared.signed_bytes), "big")
    q1, q2 = _quotients(signature, modulus)
    signed = replace(
        prepared,
        signature=signature.to_bytes(_KEY_BYTES, "little"),
        q1=q1.to_bytes(_KEY_BYTES, "little"),
        q2=q2.to_bytes(_KEY_BYTES, "little"),
    )
    verify(signed)
    return signed


def sign_with_key(unsigned: Sigstruct, key: RSAPrivateKey) -> Sigstruct:
    """Sign with an RSA-3072 key of exponent 3 that is in memory."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15

    numbers = key.public_key().public_numbers()
    if numbers.e != EXPONENT:
        raise problem("key", f"SGX wants the public exponent 3, this key has {numbers.e}", field="exponent")
    return sign(
        unsigned, modulus=numbers.n, rsa=lambda message: key.sign(message, PKCS1v15(), hashes.SHA256())
    )


def _quotients(signature: int, modulus: int) -> tuple[int, int]:
    """Q1 and Q2, which spare the CPU the divisions (SDM 3D, "SIGSTRUCT", Q1 and Q2)."""
    q1, rest = divmod(signature * signature, modulus)
    return q1, rest * signature // modulus


def _padded(message: bytes) -> int:
    """EMSA-PKCS1-v1_5 of the SHA-256 of `message`, as a number (RFC 8017, section 9.2)."""
    digest_info = bytes.fromhex("3031300d060960864801650304020105000420") + hashlib.sha256(message).digest()
    padding = b"\xff" * (_KEY_BYTES - 3 - len(digest_info))
    return int.from_bytes(b"\0\1" + padding + b"\0" + digest_info, "big")


def _wrong(name: str, reason: str) -> Exception:
    return problem("sigstruct", f"{name}: {reason}", offset=_BY_NAME[name].offset, field=name)


def verify(
    sigstruct: Sigstruct,
    *,
    mrenclave: bytes | None = None,
    mrsigner: bytes | None = None,
    attributes: int | None = None,
    xfrm: int = XFRM_LEGACY,
    miscselect: int | None = None,
) -> None:
    """Check what EINIT checks, in its order (SDM 3D, "EINIT", operation).

    Against `mrenclave` and `mrsigner` (32 bytes) and the SECS's `attributes`, `xfrm` and
    `miscselect` where they are given.  Raises :class:`~teemate.errors.ImageError`, whose
    ``detail["field"]`` names the field and ``offset`` tells where it is.
    """
    if sigstruct.header != HEADER:
        raise _wrong("header", "it is not the constant that makes this a SIGSTRUCT")
    if sigstruct.vendor not in (0, 0x8086):
        raise _wrong("vendor", f"{sigstruct.vendor:#x} is neither 0 nor Intel's 0x8086")
    if sigstruct.header2 != HEADER2:
        raise _wrong("header2", "it is not the constant that names the key's size")
    if sigstruct.exponent != EXPONENT:
        raise _wrong("exponent", f"it must be 3, not {sigstruct.exponent}")
    modulus = int.from_bytes(sigstruct.modulus, "little")
    if modulus.bit_length() != 3072:
        raise _wrong("modulus", f"it has {modulus.bit_length()} bits instead of 3072")
    signature = int.from_bytes(sigstruct.signature, "little")
    if signature >= modulus:
        raise _wrong("signature", "it is not smaller than the modulus")
    q1, q2 = _quotients(signature, modulus)
    for name, value in (("q1", q1), ("q2", q2)):
        if getattr(sigstruct, name) != value.to_bytes(_KEY_BYTES, "little"):
            raise _wrong(name, "it does not belong to this signature and modulus")
    if pow(signature, EXPONENT, modulus) != _padded(sigstruct.signed_bytes):
        raise _wrong("signature", "it was not made with this key over these fields")
    if mrenclave is not None and sigstruct.enclavehash != mrenclave:
        raise _wrong(
            "enclavehash",
            f"it is for the image {sigstruct.enclavehash.hex()}, and this one is {mrenclave.hex()}",
        )
    if mrsigner is not None and sigstruct.mrsigner != mrsigner:
        raise _wrong("modulus", f"MRSIGNER is {sigstruct.mrsigner.hex()}, not {mrsigner.hex()}")
    _verify_attributes(sigstruct, attributes, xfrm, miscselect)


def _verify_attributes(
    sigstruct: Sigstruct, attributes: int | None, xfrm: int, miscselect: int | None
) -> None:
    if sigstruct.attributes & ATTR_INIT:
        raise _wrong("attributes", "INIT is set, which only EINIT sets")
    if sigstruct.attributes & ATTR_EINITTOKENKEY:
        # Linux grants it to nobody but a launch enclave, which flexible launch control has no use for.
        raise _wrong("attributes", "EINITTOKENKEY is set, which is for launch enclaves")
    if sigstruct.xfrm & XFRM_LEGACY != XFRM_LEGACY:
        raise _wrong("xfrm", f"{sigstruct.xfrm:#x} lacks x87 or SSE, without which no enclave can be made")
    if attributes is not None:
        if (attributes ^ sigstruct.attributes) & sigstruct.attributemask:
            raise _wrong("attributes", _differences(sigstruct, attributes))
        if (xfrm ^ sigstruct.xfrm) & sigstruct.xfrmmask:
            raise _wrong(
                "xfrm", f"it demands {sigstruct.xfrm:#x} under mask {sigstruct.xfrmmask:#x}, not {xfrm:#x}"
            )
    if miscselect is not None and (miscselect ^ sigstruct.miscselect) & sigstruct.miscmask:
        raise _wrong("miscselect", f"it demands {sigstruct.miscselect:#x}, not {miscselect:#x}")


_ATTRIBUTE_NAMES = {
    ATTR_INIT: "INIT",
    ATTR_DEBUG: "DEBUG",
    ATTR_MODE64BIT: "MODE64BIT",
    ATTR_PROVISIONKEY: "PROVISIONKEY",
    ATTR_EINITTOKENKEY: "EINITTOKENKEY",
    ATTR_KSS: "KSS",
    ATTR_AEXNOTIFY: "AEXNOTIFY",
}


def attribute_names(attributes: int) -> str:
    """Return the flags of ATTRIBUTES as text, ``DEBUG MODE64BIT``."""
    names = [name for bit, name in _ATTRIBUTE_NAMES.items() if attributes & bit]
    rest = attributes & ~sum(_ATTRIBUTE_NAMES)
    return " ".join(names + ([f"{rest:#x}"] if rest else [])) or "none"


def _differences(sigstruct: Sigstruct, attributes: int) -> str:
    different = (attributes ^ sigstruct.attributes) & sigstruct.attributemask
    refused, missing = different & attributes, different & ~attributes
    parts = []
    if refused:
        parts.append(f"{attribute_names(refused)} is not allowed by the signer")
    if missing:
        parts.append(f"{attribute_names(missing)} is demanded by the signer")
    return " and ".join(parts)


assert len({f.name for f in fields(Sigstruct)} ^ set(_BY_NAME)) == 0
