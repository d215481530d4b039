from __future__ import annotations

import datetime
import hashlib
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teemate.errors import ImageError
from teemate.image import SigParams, Sigstruct, generate_key, sign, sign_with_key, verify
from teemate.image.sigstruct import ATTR_DEBUG, ATTR_MODE64BIT, ATTR_PROVISIONKEY, FIELDS, SIZE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

HASH = hashlib.sha256(b"an image").digest()


@pytest.fixture(scope="module")
def signed(key: RSAPrivateKey) -> Sigstruct:
    return sign_with_key(SigParams(isvprodid=7, isvsvn=3).unsigned(HASH), key)


def values(field_format: str) -> st.SearchStrategy[int] | st.SearchStrategy[bytes]:
    if field_format.endswith("s"):
        size = int(field_format[:-1])
        return st.binary(min_size=size, max_size=size)
    return st.integers(0, (1 << {"B": 8, "H": 16, "I": 32, "Q": 64}[field_format]) - 1)


@given(st.fixed_dictionaries({field.name: values(field.format) for field in FIELDS}))
def test_any_sigstruct_survives_the_way_to_bytes_and_back(fields: dict[str, int | bytes]) -> None:
    sigstruct = Sigstruct(**fields)  # type: ignore[arg-type]
    data = sigstruct.to_bytes()
    assert len(data) == SIZE
    assert Sigstruct.from_bytes(data) == sigstruct


def test_no_two_fields_share_a_byte() -> None:
    ends = [(field.offset, field.offset + field.size) for field in FIELDS]
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert ends[-1][1] == SIZE


def test_a_signature_is_accepted_for_its_image_and_signer(signed: Sigstruct) -> None:
    verify(signed, mrenclave=HASH, mrsigner=signed.mrsigner, attributes=ATTR_MODE64BIT, miscselect=0)
    assert (signed.isvprodid, signed.isvsvn, signed.date, signed.day) == (7, 3, 0x20000101, "2000-01-01")
    assert signed.mrsigner == hashlib.sha256(signed.modulus).digest()


def test_signing_again_gives_the_same_bytes(key: RSAPrivateKey, signed: Sigstruct) -> None:
    again = sign_with_key(SigParams(isvprodid=7, isvsvn=3).unsigned(HASH), key)
    assert again.to_bytes() == signed.to_bytes()


def test_the_date_is_written_in_decimal_digits() -> None:
    sigstruct = SigParams(date=datetime.date(2031, 12, 9)).unsigned(HASH)
    assert sigstruct.to_bytes()[20:24] == bytes.fromhex("09123120")


def test_the_signature_is_that_of_pkcs1_over_the_signed_parts(key: RSAPrivateKey, signed: Sigstruct) -> None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15

    data = signed.to_bytes()
    key.public_key().verify(signed.signature[::-1], data[:128] + data[900:1028], PKCS1v15(), hashes.SHA256())


def test_q1_and_q2_are_the_quotients_that_the_cpu_wants(key: RSAPrivateKey, signed: Sigstruct) -> None:
    s, m = (int.from_bytes(part, "little") for part in (signed.signature, signed.modulus))
    q1, q2 = (int.from_bytes(part, "little") for part in (signed.q1, signed.q2))
    assert q1 == s * s // m
    assert q2 == (s**3 - q1 * s * m) // m
    assert s**3 - q1 * s * m - q2 * m == pow(s, 3, m)


def test_a_key_may_stay_where_it_is(key: RSAPrivateKey, signed: Sigstruct) -> None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15

    asked: list[bytes] = []

    def hsm(message: bytes) -> bytes:
        asked.append(message)
        return key.sign(message, PKCS1v15(), hashes.SHA256())

    result = sign(
        SigParams(isvprodid=7, isvsvn=3).unsigned(HASH),
        modulus=key.public_key().public_numbers().n,
        rsa=hsm,
    )
    assert result == signed
    assert asked == [signed.signed_bytes]


def test_what_another_key_signed_is_not_written_out(key: RSAPrivateKey) -> None:
    with pytest.raises(ImageError, match="signature"):
        sign(
            SigParams().unsigned(HASH),
            modulus=key.public_key().public_numbers().n,
            rsa=lambda _: (12345).to_bytes(384, "big"),
        )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"header": bytes(16)}, "header"),
        ({"vendor": 1}, "vendor"),
        ({"header2": bytes(16)}, "header2"),
        ({"exponent": 65537}, "exponent"),
        ({"modulus": bytes(384)}, "modulus"),
        ({"signature": b"\xff" * 384}, "signature"),
        ({"q1": bytes(384)}, "q1"),
        ({"q2": bytes(384)}, "q2"),
        ({"isvsvn": 4}, "signature"),
        ({"date": 0x20010101}, "signature"),
        ({"enclavehash": bytes(32)}, "signature"),
        ({"attributes": ATTR_MODE64BIT | ATTR_PROVISIONKEY}, "signature"),
    ],
)
def test_a_changed_sigstruct_is_refused_with_the_field_named(
    signed: Sigstruct, change: dict[str, int | bytes], field: str
) -> None:
    with pytest.raises(ImageError, match=f"^sigstruct at offset 0x[0-9a-f]+: {field}: ") as caught:
        verify(replace(signed, **change), mrenclave=HASH)  # type: ignore[arg-type]
    assert caught.value.detail["field"] == field


@given(bit=st.integers(0, SIZE * 8 - 1))
def test_any_flipped_bit_is_noticed(signed: Sigstruct, bit: int) -> None:
    data = bytearray(signed.to_bytes())
    data[bit // 8] ^= 1 << bit % 8
    # Bytes 1028 to 1039 are reserved and not signed: from_bytes looks at them.
    with pytest.raises(ImageError) as caught:
        verify(Sigstruct.from_bytes(bytes(data)), mrenclave=HASH)
    assert caught.value.detail["step"] == "sigstruct"
    assert "field" in caught.value.detail


def test_another_images_hash_is_refused(signed: Sigstruct) -> None:
    other = hashlib.sha256(b"another image").digest()
    with pytest.raises(ImageError, match=f"enclavehash: .*{HASH.hex()}.*{other.hex()}") as caught:
        verify(signed, mrenclave=other)
    assert caught.value.detail["field"] == "enclavehash"


def test_another_signer_is_refused(signed: Sigstruct) -> None:
    with pytest.raises(ImageError, match="MRSIGNER"):
        verify(signed, mrsigner=bytes(32))


def test_debug_is_refused_unless_the_signer_allowed_it(key: RSAPrivateKey, signed: Sigstruct) -> None:
    debug = ATTR_MODE64BIT | ATTR_DEBUG
    with pytest.raises(ImageError, match="DEBUG is not allowed by the signer") as caught:
        verify(signed, attributes=debug)
    assert caught.value.detail["field"] == "attributes"
    allowed = sign_with_key(SigParams(debug_allowed=True).unsigned(HASH), key)
    verify(allowed, attributes=debug)
    verify(allowed, attributes=ATTR_MODE64BIT)
    assert allowed.debug_allowed
    assert not signed.debug_allowed


def test_attributes_that_the_signer_demands_must_be_there(key: RSAPrivateKey) -> None:
    provisioning = sign_with_key(SigParams(provision_key=True).unsigned(HASH), key)
    with pytest.raises(ImageError, match="PROVISIONKEY is demanded by the signer"):
        verify(provisioning, attributes=ATTR_MODE64BIT)
    with pytest.raises(ImageError, match="xfrm"):
        verify(provisioning, attributes=ATTR_MODE64BIT | ATTR_PROVISIONKEY, xfrm=7)
    with pytest.raises(ImageError, match="miscselect"):
        verify(provisioning, miscselect=1)


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_another_length_is_no_sigstruct(size: int) -> None:
    with pytest.raises(ImageError, match=f"1808 bytes, not {size}"):
        Sigstruct.from_bytes(bytes(size))


@pytest.mark.parametrize("name", ["isvprodid", "isvsvn", "vendor", "swdefined"])
def test_numbers_that_do_not_fit_are_refused_by_name(name: str) -> None:
    with pytest.raises(ImageError, match=name):
        SigParams(**{name: 1 << 32}).unsigned(HASH)  # type: ignore[arg-type]


def test_keys_that_sgx_cannot_use_are_refused() -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    with pytest.raises(ImageError, match="exponent 3"):
        sign_with_key(SigParams().unsigned(HASH), rsa.generate_private_key(65537, 3072))
    with pytest.raises(ImageError, match="3072 bits, this one has 2048"):
        sign_with_key(SigParams().unsigned(HASH), rsa.generate_private_key(3, 2048))
    assert generate_key().public_key().public_numbers().e == 3
