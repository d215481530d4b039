"""Private enclaves through the synchronous API."""

from __future__ import annotations

import errno
import os
import struct
import threading
from pathlib import Path

import pytest
from backends import BACKEND
from images import Images
from losing import lose_epc

import teemate
from teemate import Enclave
from teemate.vault import PRIVATE, SHARED, Changed, Vault


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


def test_a_call_goes_in_and_its_answer_comes_out(vault: Enclave) -> None:
    with vault.slot() as slot:
        assert slot.call("echo", b"hello") == b"hello"
        assert slot.call("echo", bytearray(b"bytes")) == b"bytes"
        assert slot.call("echo", memoryview(b"view")) == b"view"
        assert slot.call("empty") == b""


def test_the_enclave_tells_what_was_measured(images: Images, vault: Enclave) -> None:
    assert vault.mrenclave == images.vault.mrenclave
    with vault.slot() as slot:
        assert Vault(slot).mrenclave() == images.vault.mrenclave
    assert vault.base % vault.size == 0
    assert vault.pages() > 1024  # of heap alone


def test_the_vault_keeps_values(vault: Enclave) -> None:
    with vault.slot() as slot:
        store = Vault(slot)
        first = store.put(b"key", b"value")
        entry = store.get(b"key")
        assert entry is not None
        assert (entry.value, entry.version) == (b"value", first)
        assert store.compare_and_swap(b"key", first + 1, b"no") == Changed(entry)
        second = store.compare_and_swap(b"key", first, b"yes")
        assert isinstance(second, int)
        assert second > first
        assert [listed.key for listed in store.list(b"k")] == [b"key"]
        assert Vault(slot, PRIVATE).get(b"key") is None
        blobs = list(store.export())
        assert store.delete(b"key")
        assert not store.delete(b"key")
        assert store.get(b"key") is None
        assert sum(Vault(slot, SHARED).import_(blob) for blob in blobs) == 1
        entry = store.get(b"key")
        assert entry is not None
        assert entry.value == b"yes"


def test_every_slot_of_the_image_can_be_used_at_once(images: Images, vault: Enclave) -> None:
    count = images.vault.slots
    inside = threading.Barrier(count)
    seen: set[int] = set()

    def body() -> None:
        with vault.slot() as slot:
            slot.call("empty")
            inside.wait(30)
            seen.add(slot.index)

    threads = [threading.Thread(target=body) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen) == count
    statistics = vault.statistics()
    assert (statistics.slots, statistics.free, statistics.calls) == (count, count, count)


def test_no_free_slot_is_busy_after_the_wait(images: Images) -> None:
    image = images.build("vault", slots=1, heap="1M")
    with teemate.create_enclave(image.sgxs, image.sigstruct, BACKEND) as enclave, enclave.slot():
        with pytest.raises(teemate.Busy, match="no free slot after 0"), enclave.slot(wait=0.01):
            pass


def test_a_slot_that_could_not_be_opened_can_be_had_later(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = images.build("vault", slots=1, heap="1M")
    with teemate.create_enclave(image.sgxs, image.sigstruct, BACKEND) as enclave:
        with monkeypatch.context() as patch:
            patch.setattr("teemate._slot._slot_open", lambda *_: -errno.ENOMEM)
            with pytest.raises(teemate.Error), enclave.slot():
                pass
        with enclave.slot() as slot:
            assert slot.call("echo", b"later") == b"later"


def test_without_a_slot_that_can_be_used_it_is_busy_at_once_and_says_why(images: Images) -> None:
    image = images.build("faults", slots=1)
    with teemate.create_enclave(image.sgxs, image.sigstruct, BACKEND) as enclave:
        with pytest.raises(teemate.EnclaveFault), enclave.slot() as slot:
            slot.call("divide")
        with pytest.raises(teemate.Busy, match="no slot left"), enclave.slot(wait=3600):
            pass


def test_a_slot_that_is_given_back_wakes_who_waits(images: Images) -> None:
    image = images.build("vault", slots=1, heap="1M")
    with teemate.create_enclave(image.sgxs, image.sigstruct, BACKEND) as enclave:
        answers = []

        def second() -> None:
            with enclave.slot(wait=30) as slot:
                answers.append(slot.call("echo", b"second"))

        with enclave.slot() as slot:
            thread = threading.Thread(target=second)
            thread.start()
            assert slot.call("echo", b"first") == b"first"
        thread.join(60)
        assert answers == [b"second"]


def test_a_raw_entry_has_the_contract_of_the_vdso(images: Images) -> None:
    image = images.build("raw")
    with teemate.create_enclave(image.sgxs, image.sigstruct, BACKEND) as enclave, enclave.slot() as slot:
        exit_ = slot.enter(rdi=0, rsi=40, rdx=2)
        assert (exit_.rdi, exit_.function) == (42, 4)
        with pytest.raises(teemate.EnclaveFault, match="#UD"):
            slot.enter(rdi=3)


def test_an_unknown_call_is_not_found(vault: Enclave) -> None:
    with vault.slot() as slot:
        with pytest.raises(teemate.NotFound, match="no ECALL"):
            slot.call("no such call")
        assert slot.call("echo", b"still") == b"still"


def test_a_status_of_the_images_own_comes_with_its_output(faults: Enclave) -> None:
    with faults.slot() as slot:
        with pytest.raises(teemate.CallFailed) as caught:
            slot.call("status", number(7))
        assert caught.value.status == 7
        assert caught.value.detail["status"] == 7
        slot.call("empty")


def test_an_answer_that_does_not_fit_tells_how_much_is_needed(faults: Enclave) -> None:
    with faults.slot() as slot:
        with pytest.raises(teemate.LimitReached, match="max_reply=70000") as caught:
            slot.call("produce", number(70000))
        assert caught.value.detail["needed"] == 70000
        assert slot.call("produce", number(70000), max_reply=70000) == b"Z" * 70000


def test_ocalls_run_in_the_calling_thread(faults: Enclave) -> None:
    threads = []

    def echo(data: bytes) -> bytes:
        threads.append(threading.get_ident())
        return data[::-1]

    faults.ocalls["echo"] = echo
    with faults.slot() as slot:
        assert slot.call("ocall", b"abc") == b"cba"
        assert slot.call("ocall", b"abc", ocalls={"echo": lambda data: data + b"!"}) == b"abc!"
        handlers = {"first": lambda data: data + b"1", "second": lambda data: data + b"2"}
        assert slot.call("ocall_twice", b"x", ocalls=handlers) == b"x12"
    assert threads == [threading.get_ident()]


def test_an_ocall_without_a_handler_fails_inside_and_costs_no_slot(faults: Enclave) -> None:
    with faults.slot() as slot:
        with pytest.raises(teemate.CallFailed, match="OCALL"):
            slot.call("ocall", b"abc")
        slot.call("empty")


def test_what_an_ocall_handler_raises_reaches_the_caller_and_costs_no_slot(faults: Enclave) -> None:
    def broken(_data: bytes) -> bytes:
        raise ZeroDivisionError("in the handler")

    with faults.slot() as slot:
        with pytest.raises(ZeroDivisionError, match="in the handler"):
            slot.call("ocall", b"abc", ocalls={"echo": broken})
        slot.call("empty")


def test_an_ocall_answer_that_is_too_long_reaches_the_caller_and_costs_no_slot(faults: Enclave) -> None:
    with faults.slot() as slot:
        with pytest.raises(teemate.LimitReached, match="1048576 are possible"):
            slot.call("ocall", b"abc", ocalls={"echo": lambda _data: bytes((1 << 20) + 1)})
        assert slot.broken is None
        slot.call("empty")


def test_a_call_from_an_ocall_handler_in_the_same_slot_is_busy(faults: Enclave) -> None:
    with faults.slot() as slot:
        with pytest.raises(teemate.Busy, match="one slot for each thread"):
            slot.call("ocall", b"", ocalls={"echo": lambda _data: slot.call("empty")})
        slot.call("empty")


@pytest.mark.parametrize(
    ("name", "payload", "vector"),
    [
        ("divide", number(1), "#DE"),
        ("illegal", b"", "#UD"),
        ("fault_line", b"", "#PF"),
        ("overflow_stack", b"", "#PF"),
    ],
)
def test_a_fault_names_its_vector_and_costs_one_slot(
    faults: Enclave, name: str, payload: bytes, vector: str
) -> None:
    before = faults.statistics().slots
    with faults.slot() as slot:
        with pytest.raises(teemate.EnclaveFault, match=vector) as caught:
            slot.call(name, payload)
        assert caught.value.detail["name"] == vector
        with pytest.raises(teemate.NotAttached, match="out of use"):
            slot.call("empty")
    assert faults.statistics().slots == before - 1
    with faults.slot() as slot:
        slot.call("empty")


def test_a_fault_is_shown_as_function_and_line(images: Images, faults: Enclave) -> None:
    source = Path(__file__).resolve().parents[2] / "native" / "enclaves" / "faults" / "faults.c"
    line = next(n for n, text in enumerate(source.read_text().splitlines(), 1) if "FAULT LINE" in text)
    with faults.slot() as slot, pytest.raises(teemate.EnclaveFault) as caught:
        slot.call("fault_line")
    assert "in fault_at_known_line (" in caught.value.message
    assert f"faults.c:{line})" in caught.value.message


def test_a_call_that_takes_too_long_is_given_up_and_costs_one_slot(faults: Enclave) -> None:
    before = faults.statistics()
    with faults.slot() as slot:
        with pytest.raises(teemate.CallTimeout, match="'loop' took longer"):
            slot.call("loop", timeout=0.05)
        assert slot.broken is not None
    after = faults.statistics()
    assert (after.slots, after.abandoned) == (before.slots - 1, before.abandoned + 1)
    with faults.slot() as slot:
        slot.call("empty", timeout=30)


def test_a_timeout_of_nothing_still_lets_a_short_call_through_or_gives_it_up(faults: Enclave) -> None:
    with faults.slot() as slot, pytest.raises(teemate.CallTimeout):
        slot.call("loop", timeout=0)


def test_after_detach_there_is_nothing(images: Images) -> None:
    enclave = teemate.create_enclave(images.vault.sgxs, images.vault.sigstruct, BACKEND)
    with enclave.slot() as slot:
        slot.call("empty")
    base = enclave.base
    enclave.detach()
    enclave.detach()
    with pytest.raises(teemate.NotAttached, match="detached"), enclave.slot():
        pass
    assert f"{base:x}-" not in Path("/proc/self/maps").read_text()


def test_detaching_gives_up_the_calls_of_other_threads(faults: Enclave) -> None:
    inside = threading.Event()
    errors: list[BaseException] = []

    def body() -> None:
        try:
            with faults.slot() as slot:
                inside.set()
                slot.call("loop")
        except teemate.Error as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    assert inside.wait(30)
    faults.detach()
    thread.join(30)
    assert [type(error) for error in errors] == [teemate.NotAttached]


def test_a_child_of_fork_is_not_attached(vault: Enclave) -> None:
    with vault.slot() as slot:
        slot.call("empty")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                slot.call("empty")
            except teemate.NotAttached:
                try:
                    with vault.slot():
                        status = 2
                except teemate.NotAttached:
                    status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert slot.call("echo", b"parent") == b"parent"


def test_an_image_that_is_cut_off_is_an_image_error(images: Images) -> None:
    data = images.vault.sgxs.read_bytes()
    with pytest.raises(teemate.ImageError) as caught:
        teemate.create_enclave(data[:-100], images.vault.sigstruct, BACKEND)
    assert caught.value.detail["step"] in ("parse", "read")
    assert isinstance(caught.value.detail["offset"], int)


def test_a_signature_of_another_image_is_an_image_error(images: Images) -> None:
    with pytest.raises(teemate.ImageError) as caught:
        teemate.create_enclave(images.vault.sgxs, images.faults.sigstruct, BACKEND)
    assert caught.value.detail["step"] in ("sigstruct", "einit")
    with pytest.raises(teemate.ImageError, match="1808 bytes"):
        teemate.create_enclave(images.vault.sgxs, b"short", BACKEND)


def test_an_image_that_is_not_there_is_an_image_error(images: Images, tmp_path: Path) -> None:
    with pytest.raises(teemate.ImageError, match=r"nothing\.sgxs"):
        teemate.create_enclave(tmp_path / "nothing.sgxs", images.vault.sigstruct, BACKEND)


def test_an_unknown_backend_is_unsupported(images: Images) -> None:
    with pytest.raises(teemate.Unsupported, match="auto, sim or sgx"):
        teemate.create_enclave(images.vault.sgxs, images.vault.sigstruct, "tdx")


@pytest.mark.parametrize("image", ["vault", "faults"])
def test_an_enclave_that_is_gone_is_lost_for_every_later_call(images: Images, image: str) -> None:
    built = getattr(images, image)
    with teemate.create_enclave(built.sgxs, built.sigstruct, BACKEND) as enclave:
        with enclave.slot() as slot:
            slot.call("empty")
            lose_epc(enclave)
            with pytest.raises(teemate.EnclaveLost):
                slot.call("empty")
            with pytest.raises(teemate.EnclaveLost):
                slot.call("empty")
        with pytest.raises(teemate.EnclaveLost), enclave.slot():
            pass


def test_a_raw_entry_into_an_enclave_that_is_gone_is_lost(images: Images) -> None:
    image = images.build("raw")
    with teemate.create_enclave(image.sgxs, image.sigstruct, BACKEND) as enclave, enclave.slot() as slot:
        assert slot.enter(rdi=0, rsi=40, rdx=2).rdi == 42
        lose_epc(enclave)
        with pytest.raises(teemate.EnclaveLost):
            slot.enter(rdi=0, rsi=40, rdx=2)


def test_bytes_do_as_well_as_paths(images: Images) -> None:
    with teemate.create_enclave(
        images.vault.sgxs.read_bytes(), images.vault.sigstruct.read_bytes(), BACKEND
    ) as enclave:
        assert enclave.mrenclave == images.vault.mrenclave
