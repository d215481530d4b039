"""The same refusals as a Python program sees them: ImageError with step, offset and code."""

from __future__ import annotations

import pytest
from backends import BACKEND, sgx_only
from sgxs_writer import PAGE, REG, TCS, R, Stream, X, eadd, ecreate, eextend, sign, small_image, tcs_page

import teemate
from teemate._native import lib

IMAGE = small_image()
GOOD, SIGNED = IMAGE.to_bytes(), sign(IMAGE.mrenclave())
BAD_TCS = Stream().page(0, REG | R | X, b"code").page(PAGE, TCS, tcs_page()[:-1] + b"\1")

BAD: dict[str, tuple[bytes, bytes, str, int, int | None]] = {
    "truncated": (GOOD[:-1], SIGNED, "parse", len(GOOD) - 64, lib.TEEMATE_BAD_TRUNCATED),
    "out of order": (GOOD + eadd(0, REG | R), SIGNED, "parse", len(GOOD), lib.TEEMATE_BAD_ORDER),
    "overlapping": (GOOD + eadd(0x7000, REG | R), SIGNED, "parse", len(GOOD), lib.TEEMATE_BAD_OVERLAP),
    "out of range": (GOOD + eadd(0x10000, REG | R), SIGNED, "parse", len(GOOD), lib.TEEMATE_BAD_RANGE),
    "odd size": (ecreate(3 * PAGE) + GOOD[64:], SIGNED, "parse", 0, lib.TEEMATE_BAD_SIZE),
    "bit flipped in a tag": (b"F" + GOOD[1:], SIGNED, "parse", 0, lib.TEEMATE_BAD_TAG),
    "bit flipped in the code": (GOOD[:200] + b"\0" + GOOD[201:], SIGNED, "einit", 960, 4),
    "bad TCS": (BAD_TCS.to_bytes(), sign(BAD_TCS.mrenclave()), "eadd", 64 + 64 + 16 * 320, None),
    "another image's hash": (GOOD, sign(bytes(32)), "einit", 960, 4),
    "wrong signature": (GOOD, SIGNED[:516] + bytes([SIGNED[516] ^ 1]) + SIGNED[517:], "einit", 516, 8),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_an_image_error_that_says_where(name: str) -> None:
    image, sigstruct, step, offset, code = BAD[name]
    with pytest.raises(teemate.ImageError) as caught:
        teemate.create_enclave(image, sigstruct, backend=BACKEND)
    assert caught.value.detail["step"] == step
    assert caught.value.detail["offset"] == offset
    if code is not None:
        assert caught.value.detail["code"] == code
    assert caught.value.message


def test_attributes_that_are_not_allowed_are_denied() -> None:
    forbidden = sign(IMAGE.mrenclave(), attribute_mask=(1 << 64) - 1)
    with pytest.raises(teemate.Denied) as caught:
        teemate.create_enclave(GOOD, forbidden, backend=BACKEND, debug=True)
    assert (caught.value.detail["step"], caught.value.detail["offset"]) == ("einit", 928)
    with pytest.raises(teemate.Denied) as caught:
        teemate.create_enclave(GOOD, sign(IMAGE.mrenclave(), attributes=4 | 0x20), backend=BACKEND)
    assert (caught.value.detail["step"], caught.value.detail["offset"]) == ("einit", 928)


@sgx_only("Linux measures a page from its first byte to its last, or not at all")
def test_a_page_that_is_measured_in_part_is_an_image_error_that_says_why() -> None:
    image = Stream().page(0, REG | R | X, b"code")
    image.records += [eadd(PAGE, REG | R), eextend(PAGE + 512, b"c" * 256)]
    with pytest.raises(teemate.ImageError, match="measured in part") as caught:
        teemate.create_enclave(image.to_bytes(), sign(image.mrenclave()), backend=BACKEND)
    assert (caught.value.detail["step"], caught.value.detail["offset"]) == ("eadd", image.offset_of(1 + 17))
