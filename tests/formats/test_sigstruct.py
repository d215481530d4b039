from __future__ import annotations

import errno
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from public_api import RefusalError, verify
from sgxs_writer import sign, signing_key

from teemate._native import lib

MRENCLAVE = hashlib.sha256(b"some image").digest()


def refused(sigstruct: bytes, mrenclave: bytes | None = None) -> RefusalError:
    with pytest.raises(RefusalError) as caught:
        verify(sigstruct, mrenclave)
    assert caught.value.step == lib.TEEMATE_STEP_SIGSTRUCT
    assert caught.value.text
    return caught.value


def flipped(sigstruct: bytes, offset: int, bit: int = 0) -> bytes:
    changed = bytearray(sigstruct)
    changed[offset] ^= 1 << bit
    return bytes(changed)


def test_a_right_sigstruct_tells_its_signer() -> None:
    modulus = signing_key().public_key().public_numbers().n
    expected = hashlib.sha256(modulus.to_bytes(384, "little")).digest()
    assert verify(sign(MRENCLAVE)) == expected
    assert verify(sign(MRENCLAVE), MRENCLAVE) == expected


# (what, a byte of it, where the field starts)
CONSTANTS = [
    ("header", 0, 0),
    ("header", 15, 0),
    ("vendor", 17, 16),
    ("header2", 24, 24),
    ("header2", 39, 24),
    ("reserved1", 44, 44),
    ("reserved1", 127, 44),
    ("exponent", 512, 512),
    ("exponent", 515, 512),
    ("reserved2", 910, 910),
    ("reserved3", 992, 992),
    ("reserved4", 1028, 1028),
    ("reserved4", 1039, 1028),
]


@pytest.mark.parametrize(("name", "at", "field"), CONSTANTS)
def test_a_malformed_sigstruct_is_refused_at_its_field(name: str, at: int, field: int) -> None:
    refusal = refused(flipped(sign(MRENCLAVE), at, 6))
    assert (refusal.error, refusal.code, refusal.offset) == (errno.EBADMSG, 1, field), name


# Date, swdefined, modulus, miscselect, masks, attributes, hash, product and version.
@pytest.mark.parametrize(
    "at", [20, 40, 128, 511, 516, 899, 900, 904, 928, 936, 944, 952, 960, 991, 1024, 1026]
)
def test_what_was_changed_after_signing_is_refused(at: int) -> None:
    refusal = refused(flipped(sign(MRENCLAVE), at))
    assert (refusal.error, refusal.code, refusal.offset) == (errno.EKEYREJECTED, 8, 516)


@pytest.mark.parametrize("at", [1040, 1423, 1424, 1807])
def test_wrong_quotients_are_told_from_a_wrong_signature(at: int) -> None:
    refusal = refused(flipped(sign(MRENCLAVE), at))
    assert (refusal.error, refusal.code, refusal.offset) == (errno.EBADMSG, 1, 1040)


def test_the_signature_of_another_key_is_refused() -> None:
    other = rsa.generate_private_key(public_exponent=3, key_size=3072)
    mine, theirs = sign(MRENCLAVE), sign(MRENCLAVE, key=other)
    mixed = mine[:128] + theirs[128:512] + mine[512:]
    assert refused(mixed).error == errno.EKEYREJECTED


def test_the_sigstruct_of_another_image_is_refused() -> None:
    refusal = refused(sign(MRENCLAVE), hashlib.sha256(b"another image").digest())
    assert (refusal.error, refusal.code, refusal.offset) == (errno.EKEYEXPIRED, 4, 960)


@pytest.mark.parametrize("content", [bytes(1808), b"\xff" * 1808], ids=["zeros", "ones"])
def test_garbage_is_refused(content: bytes) -> None:
    assert refused(content).error == errno.EBADMSG


def test_a_modulus_of_zero_is_refused() -> None:
    right = sign(MRENCLAVE)
    assert refused(right[:128] + bytes(384) + right[512:]).error == errno.EKEYREJECTED
