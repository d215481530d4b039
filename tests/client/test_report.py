"""Local attestation: a vault verifies the reports of others, on whichever backend it runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from backends import BACKEND
from images import BuiltImage, Images

import teemate
from teemate.image import Sigstruct
from teemate.report import Rejection, Report, ReportRejected
from teemate.vault import Vault


@pytest.fixture
def another_image(images: Images) -> BuiltImage:
    """A vault with another MRENCLAVE and the same signer."""
    return images.build("vault", slots=2, heap="1M")


@pytest.fixture
def maker(another_image: BuiltImage) -> Iterator[Vault]:
    with teemate.create_enclave(another_image.sgxs, another_image.sigstruct, BACKEND) as enclave:
        with enclave.slot() as slot:
            yield Vault(slot)


@pytest.fixture
def verifier(vault: teemate.Enclave) -> Iterator[Vault]:
    with vault.slot() as slot:
        yield Vault(slot)


@pytest.fixture
def report(maker: Vault, verifier: Vault) -> bytes:
    """A report by `maker` for `verifier`."""
    return maker.report(b"a nonce", Report.parse(verifier.report()).target())


def rejection(verifier: Vault, report: bytes) -> Rejection:
    with pytest.raises(ReportRejected) as caught:
        verifier.verify(report)
    assert caught.value.detail["reason"] == caught.value.reason.value
    return caught.value.reason


def test_a_report_for_an_enclave_verifies_there_and_tells_who_made_it(
    images: Images, another_image: BuiltImage, verifier: Vault, report: bytes
) -> None:
    said = verifier.verify(report)
    signed = Sigstruct.from_bytes(another_image.sigstruct.read_bytes())
    assert said.mrenclave == another_image.mrenclave != images.vault.mrenclave
    assert said.mrsigner == signed.mrsigner
    assert said.data == b"a nonce".ljust(64, b"\0")
    assert (said.debug, said.simulated) == (False, BACKEND == "sim")


def test_more_data_than_a_report_has_and_a_key_without_end_are_refused(maker: Vault) -> None:
    with pytest.raises(teemate.ProtocolError, match="64 bytes of data"):
        maker.report(bytes(65))
    with pytest.raises(teemate.CallFailed, match="256 are possible"):
        maker.get(bytes(1 << 16))


def test_a_report_for_itself_verifies_and_also_in_another_enclave_of_the_same_image(
    images: Images, verifier: Vault
) -> None:
    own = verifier.report()
    assert verifier.verify(own).mrenclave == images.vault.mrenclave
    with teemate.create_enclave(images.vault.sgxs, images.vault.sigstruct, BACKEND) as twin:
        with twin.slot() as slot:
            assert Vault(slot).verify(own).mrenclave == images.vault.mrenclave


def test_a_report_for_another_enclave_is_rejected(maker: Vault, verifier: Vault, report: bytes) -> None:
    assert rejection(maker, report) is Rejection.FORGED
    assert rejection(verifier, maker.report()) is Rejection.FORGED


# Every field and every reserved range of the structure, and both ends of it.
FIELDS = (16, 20, 31, 32, 48, 56, 64, 95, 96, 128, 159, 160, 192, 256, 258, 260, 262, 303, 304, 320, 383)


@pytest.mark.parametrize("offset", [*FIELDS, 384, 415, 416, 431])
def test_a_report_in_which_one_bit_was_changed_is_rejected(
    verifier: Vault, report: bytes, offset: int
) -> None:
    changed = bytearray(report)
    changed[offset] ^= 0x10
    assert rejection(verifier, bytes(changed)) is Rejection.FORGED
    verifier.verify(report)


def test_a_report_that_claims_another_platform_is_rejected_as_foreign(verifier: Vault, report: bytes) -> None:
    for offset in (0, 15):
        changed = bytearray(report)
        changed[offset] ^= 1
        assert rejection(verifier, bytes(changed)) is Rejection.FOREIGN


def test_what_is_no_report_is_refused_before_the_enclave_is_asked(verifier: Vault) -> None:
    with pytest.raises(teemate.ProtocolError, match="432"):
        verifier.verify(bytes(431))
    with pytest.raises(teemate.ProtocolError, match="512"):
        verifier.report(b"", bytes(511))


def test_the_enclave_refuses_what_is_no_report(vault: teemate.Enclave) -> None:
    with vault.slot() as slot:
        for length in (0, 431, 433):
            with pytest.raises(teemate.CallFailed) as caught:
                slot.call("verify", bytes(length))
            assert caught.value.status == -1
