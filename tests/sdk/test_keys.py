"""Sealing, reports, random numbers, prints: what an author gets besides calls."""

from __future__ import annotations

import struct

import pytest
from gate import ARGUMENT, EXIT_DONE, EXIT_OCALL, OCALL_RETURN, OK, Call, Gate, Holder
from images import Images

from teemate._native import ffi
from teemate.image import SigParams

MRENCLAVE, MRSIGNER = 1, 2
MAC = -4


def seal(holder: Holder, policy: int, text: bytes) -> bytes:
    status, sealed = holder.call(b"seal", struct.pack("<Q", policy) + text)
    assert status == OK
    assert text not in sealed
    return sealed


@pytest.mark.parametrize("policy", [MRENCLAVE, MRSIGNER])
def test_what_was_sealed_comes_back_in_another_instance(images: Images, policy: int) -> None:
    with Gate(images.faults) as first, Gate(images.faults) as second:
        sealed = seal(first.assign(2), policy, b"a secret for later")
        assert second.assign(2).call(b"unseal", sealed) == (OK, b"a secret for later")


def test_sealing_twice_gives_different_bytes(holder: Holder) -> None:
    assert seal(holder, MRENCLAVE, b"the same") != seal(holder, MRENCLAVE, b"the same")


@pytest.mark.parametrize("policy", [0, 4, 5, 0x100, 0x8001])
def test_nothing_is_sealed_under_a_key_that_strangers_can_derive(holder: Holder, policy: int) -> None:
    status, reply = holder.call(b"seal", struct.pack("<Q", policy) + b"a secret for later")
    assert (status, reply) == (ARGUMENT, b"")


@pytest.mark.parametrize("policy", [0, 4, 5, 0x100, 0x8001])
def test_a_blob_under_a_key_that_strangers_can_derive_is_refused(holder: Holder, policy: int) -> None:
    sealed = bytearray(seal(holder, MRENCLAVE, b"forged by another enclave"))
    sealed[4:6] = struct.pack("<H", policy)
    assert holder.call(b"unseal", bytes(sealed)) == (ARGUMENT, b"")
    assert holder.call(b"unseal", seal(holder, MRENCLAVE, b"still there")) == (OK, b"still there")


@pytest.mark.parametrize("offset", [6, 8, 24, 56, 64, 79, 80, 97])
def test_a_sealed_blob_that_was_changed_is_refused(holder: Holder, offset: int) -> None:
    sealed = bytearray(seal(holder, MRENCLAVE, b"a secret for later"))
    sealed[offset] ^= 1
    status, reply = holder.call(b"unseal", bytes(sealed))
    assert (status, reply) == (MAC, b"")


def test_a_truncated_blob_is_refused(holder: Holder) -> None:
    sealed = seal(holder, MRENCLAVE, b"a secret for later")
    assert holder.call(b"unseal", sealed[:-1])[0] == MAC
    assert holder.call(b"unseal", sealed[:79])[0] == ARGUMENT


def test_the_signers_next_image_reads_what_is_sealed_for_the_signer_only(images: Images) -> None:
    following = images.build("faults", slots=7)
    assert following.mrenclave != images.faults.mrenclave
    with Gate(images.faults) as old, Gate(following) as new:
        holder, successor = old.assign(2), new.assign(2)
        assert successor.call(b"unseal", seal(holder, MRSIGNER, b"handed over")) == (OK, b"handed over")
        assert successor.call(b"unseal", seal(holder, MRENCLAVE, b"kept"))[0] == MAC


def test_an_older_isvsvn_cannot_read_what_a_newer_sealed(images: Images) -> None:
    newer = images.build("faults", sign=SigParams(isvsvn=5, debug_allowed=True))
    with Gate(images.faults) as old, Gate(newer) as new:
        before, after = old.assign(2), new.assign(2)
        assert before.call(b"unseal", seal(after, MRSIGNER, b"new secret"))[0] == MAC
        assert after.call(b"unseal", seal(before, MRSIGNER, b"old secret")) == (OK, b"old secret")


def test_random_bytes_do_not_repeat(holder: Holder) -> None:
    drawn = {holder.call(b"random")[1] for _ in range(20)}
    assert len(drawn) == 20


def test_a_report_carries_the_callers_data(holder: Holder) -> None:
    status, report = holder.call(b"report", b"x" * 64)
    assert status == OK
    assert report[320:384] == b"x" * 64


def test_prints_of_a_debug_image_reach_the_caller(holder: Holder) -> None:
    call = Call(b"print")
    left = holder.start(call)
    assert (left.rdi, left.status) == (EXIT_OCALL, 3)
    assert bytes(ffi.buffer(call.ocall, left.length)) == b"printed -5 7 beef 12345678901 c%\n"
    left = holder.gate.enter(holder.slot, holder.key, OCALL_RETURN, left.nonce, 0, 0)
    assert (left.rdi, left.status) == (EXIT_DONE, OK)


def test_a_release_image_prints_nothing(images: Images) -> None:
    with Gate(images.build("faults", debug=False)) as gate:
        assert gate.assign(2).call(b"print") == (OK, b"")
