"""Python and libteemate read the same formats: neither may accept what the other refuses."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from images import Images, layout_options
from test_image_sgxs import BAD, add, create, extend

from teemate.errors import ImageError
from teemate.image import (
    SigParams,
    Sigstruct,
    inspect,
    measure_file,
    read_sigstruct,
    sgxs,
    shipped,
    sign_with_key,
    verify,
)
from teemate.image.sigstruct import SIZE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

HASH = bytes(range(32))


@pytest.fixture(scope="module")
def native() -> Any:
    from teemate import _native

    return _native


def native_measure(native: Any, stream: bytes) -> tuple[int, bytes, int]:
    """Status, MRENCLAVE and offset of the error, as teemate_image_measure has them."""
    info = native.ffi.new("struct teemate_image_info *")
    diag = native.ffi.new("struct teemate_diag *")
    fd = os.memfd_create("stream", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(stream)
        status = native.lib.teemate_image_measure(fd, info, diag)
    finally:
        os.close(fd)
    return status, bytes(native.ffi.buffer(info.mrenclave)), int(diag.offset)


@pytest.mark.parametrize("name", BAD)
def test_both_refuse_a_bad_stream_at_the_same_place(native: Any, name: str) -> None:
    stream, offset, _ = BAD[name]
    status, _, at = native_measure(native, stream)
    assert status < 0
    assert at == offset


records = st.lists(
    st.one_of(
        st.builds(
            add, st.integers(0, 9).map(lambda n: n * 4096), st.sampled_from([0x203, 0x205, 0x100, 0x207])
        ),
        st.builds(
            extend,
            st.integers(0, 80).map(lambda n: n * 256),
            st.binary(min_size=256, max_size=256),
            st.sampled_from([b"EEXTEND", b"UNMEASRD"]),
        ),
    ),
    max_size=8,
)


@settings(max_examples=200)
@given(records=records, cut=st.one_of(st.just(0), st.integers(1, 320)))
@example(records=[add(0), extend(0)], cut=0)
def test_both_come_to_the_same_result_for_any_stream(native: Any, records: list[bytes], cut: int) -> None:
    stream = create() + b"".join(records)
    stream = stream[: len(stream) - cut] if cut < len(stream) else stream
    status, mrenclave, at = native_measure(native, stream)
    if status == 0:
        assert sgxs.measure(io.BytesIO(stream)) == mrenclave
        return
    with pytest.raises(ImageError) as caught:
        sgxs.measure(io.BytesIO(stream))
    assert caught.value.detail["offset"] == at


def native_verify(native: Any, data: bytes) -> int:
    status: int = native.lib.teemate_sigstruct_verify(data, HASH, native.ffi.NULL, native.ffi.NULL)
    return status


@pytest.fixture(scope="module")
def signed(key: RSAPrivateKey) -> bytes:
    return sign_with_key(SigParams().unsigned(HASH), key).to_bytes()


def test_what_is_signed_here_is_accepted_there(native: Any, key: RSAPrivateKey, signed: bytes) -> None:
    assert native_verify(native, signed) == 0
    everything = SigParams(debug_allowed=True, provision_key=True, exinfo=True, vendor=0x8086, isvsvn=65535)
    assert native_verify(native, sign_with_key(everything.unsigned(HASH), key).to_bytes()) == 0
    assert native_verify(native, sign_with_key(everything.unsigned(bytes(32)), key).to_bytes()) < 0


@given(bit=st.integers(0, SIZE * 8 - 1))
def test_both_refuse_a_flipped_bit(native: Any, signed: bytes, bit: int) -> None:
    data = bytearray(signed)
    data[bit // 8] ^= 1 << bit % 8
    assert native_verify(native, bytes(data)) < 0
    with pytest.raises(ImageError):
        verify(Sigstruct.from_bytes(bytes(data)), mrenclave=HASH)


def test_the_shipped_vault_is_signed_and_is_what_its_source_gives(images: Images) -> None:
    vault = shipped("vault")
    info = inspect(vault.sgxs)
    verify(read_sigstruct(vault.sigstruct), mrenclave=info.mrenclave)
    assert info.header is not None
    assert info.header.client_slots == 32
    assert info.header.heap_size == 64 << 20
    assert images.build("vault").mrenclave == info.mrenclave
    with vault.sgxs.open("rb") as stream:
        assert sgxs.measure(stream) == measure_file(vault.sgxs)
    assert layout_options("vault").heap == info.header.heap_size


def test_an_image_that_is_not_shipped_is_an_error_that_says_so() -> None:
    with pytest.raises(ImageError, match="comes with no image 'nothing'"):
        shipped("nothing")
    with pytest.raises(ImageError, match="is no name"):
        shipped("../images/vault")


def test_a_measured_heap_of_64_mib_is_measured_whole(images: Images, native: Any) -> None:
    image = images.build("vault", heap="64M", slots=1, measure_heap=True)
    info = inspect(image.sgxs)
    assert info.measured > 64 << 20
    assert Path(image.sgxs).stat().st_size > (64 << 20) * 320 // 256
    assert info.mrenclave == image.mrenclave
