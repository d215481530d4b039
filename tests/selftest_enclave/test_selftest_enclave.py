"""The enclave of the kernel's SGX selftests, which nobody wrote for us, on either backend.

What the scenarios of operations.c print is the same on both; where the selftests (main.c, Linux 6.1) say
what has to come out, it is what stands here.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from backends import BACKEND, sgx_only
from processes import DEADLINE
from running_broker import RunningBroker
from selftest_build import Material
from selftest_image import SelftestImage, segments
from selftest_operations import Operations

import teemate
from teemate.image import Sigstruct

MAGIC, MAGIC2 = 0x1122334455667788, 0x8877665544332211
MISMATCH = 19  # SGX_PAGE_ATTRIBUTES_MISMATCH
ADDED = 0x20B  # a regular page, RW, pending


SCENARIOS = {
    "buffer": """
        put: left
        get: left, 0x1122334455667788
        nop: left
        no operation: left
        put: left
        get: left, 0x8877665544332211
    """,
    "handler": "nop: left, handled 1, data 0",
    "permissions": """
        restrict: -22, 0, 0 pages
        put: left
        restrict: 0, 0, 1 pages
        accept: left, 19
        accept: left, 0
        put: function 3 vector 14 error 0x8007 at +0x4000
        extend: left
        resume: left
        get: left, 0x8877665544332211
    """,
    "augment": """
        put: function 3 vector 14 error 0x8007 at +0xa000
        accept: left, 0
        resume: left
        get: left, 0x1122334455667788
    """,
    "augment-by-accept": """
        accept: left, 0
        get: left, 0
        put: left
        get: left, 0x1122334455667788
    """,
    "new-tcs": """
        accept: left, 0
        accept: left, 0
        accept: left, 0
        init: left
        types: 0, 0, 1 pages
        accept: left, 0
        put: left
        get: left, 0x1122334455667788
        types: 0, 0, 3 pages
        accept: left, 0
        accept: left, 0
        accept: left, 0
        remove: 0, 3 pages
        accept: left, 0
        get: left, 0
        put: left
        get: left, 0x1122334455667788
    """,
    "remove-unaccepted": """
        put: left
        types: 0, 0, 1 pages
        remove: -1, 0 pages
    """,
    "trimmed-access": """
        put: left
        types: 0, 0, 1 pages
        get: function 3 vector 14 error 0x8005 at +0x4000
    """,
    "accepted-trimmed-access": """
        put: left
        types: 0, 0, 1 pages
        accept: left, 0
        get: function 3 vector 14 error 0x8005 at +0x4000
    """,
    "remove-untouched": """
        types: 0, 0, 1 pages
        accept: left, 0
        remove: 0, 1 pages
    """,
}
MAPPING = """
    put: left
    put: function 3 vector 14 error 0x7 at +0x4000
    resume: left
    get: left, 0x8877665544332211
"""


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def run(
    material: Material, selftest: SelftestImage, scenario: str, sigstruct: Path | None = None
) -> list[str]:
    """Run a scenario of operations.c in a process of its own."""
    image = (selftest.sgxs, sigstruct or selftest.sigstruct, hex(selftest.data), hex(selftest.dynamic_entry))
    done = subprocess.run(
        [material.operations, BACKEND, *image, scenario],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_image_is_what_the_selftests_loader_adds(material: Material) -> None:
    ours = [(part.offset, part.size, part.flags, part.content is not None) for part in segments(material.elf)]
    assert ours == material.their_segments


def test_the_image_measures_as_the_selftests_measure_it(material: Material, selftest: SelftestImage) -> None:
    theirs = Sigstruct.from_bytes(material.their_sigstruct.read_bytes())
    assert theirs.enclavehash == selftest.mrenclave
    changed = bytearray(selftest.sgxs.read_bytes())
    changed[-1] ^= 1  # the last record is the heap's EADD
    with pytest.raises(teemate.ImageError):
        teemate.create_enclave(bytes(changed), selftest.sigstruct, BACKEND)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenario_of_the_selftests_ends_as_the_selftests_want_it(
    material: Material, selftest: SelftestImage, scenario: str
) -> None:
    assert run(material, selftest, scenario) == lines(SCENARIOS[scenario])


@sgx_only("the sim's page tables follow the EPCM alone, whatever the host's mprotect says")
def test_a_mapping_with_fewer_permissions_than_the_page_faults_as_the_selftests_want_it(
    material: Material, selftest: SelftestImage
) -> None:
    assert run(material, selftest, "mapping") == lines(MAPPING)


def test_the_selftests_own_signature_is_as_good_as_ours(material: Material, selftest: SelftestImage) -> None:
    assert run(material, selftest, "buffer", material.their_sigstruct) == lines(SCENARIOS["buffer"])


def test_a_private_one_does_all_that_needs_no_ioctl_through_slot_enter(selftest: SelftestImage) -> None:
    with teemate.create_enclave(selftest.sgxs, selftest.sigstruct, BACKEND) as enclave:
        assert enclave.mrenclave == selftest.mrenclave
        with enclave.slot() as first, enclave.slot() as second:
            one, two = Operations(first), Operations(second)
            one.put_buffer(MAGIC)
            assert two.get_buffer() == MAGIC
            page = enclave.base + selftest.data + 4096
            two.put(page, MAGIC2)
            assert one.get(page) == MAGIC2
            one.nop()
            # Nothing is pending there; and what the page may already, it may after EMODPE.
            assert one.accept(page, ADDED) == MISMATCH
            one.extend(page, 3)
            assert one.get(page) == MAGIC2
            assert one.get_buffer() == MAGIC


def test_an_access_that_no_page_allows_is_an_enclave_fault(selftest: SelftestImage) -> None:
    with (
        teemate.create_enclave(selftest.sgxs, selftest.sigstruct, BACKEND) as enclave,
        enclave.slot() as slot,
    ):
        with pytest.raises(teemate.EnclaveFault, match="#PF") as caught:
            Operations(slot).put(enclave.base + 0x2000, MAGIC)  # .text is not writable
        assert caught.value.detail["address"] == enclave.base + 0x2000
        assert caught.value.detail["error_code"] in (
            0x6,
            0x7,
        )  # the mapping's: the page is there, or is not yet
        with enclave.slot() as other:
            Operations(other).nop()


@pytest.fixture
def shared(broker: Callable[..., RunningBroker], selftest: SelftestImage) -> RunningBroker:
    """A broker with the enclave, which has no SDK and no gate."""
    return broker(f"""
[[enclave]]
name = "selftest"
image = "{selftest.sgxs}"
sigstruct = "{selftest.sigstruct}"
require_sdk = false
slots_per_client = 2
[[enclave.attach]]
uid = 0
""")


def client(broker: RunningBroker, *arguments: str) -> str:
    """Let a process of its own do an operation in the enclave."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("selftest_client.py")), broker.socket, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def attach_to_the_next(connection: teemate.Broker) -> teemate.GrantedEnclave:
    """Attach when there is a slot that nobody has had; until then the broker says that there is none."""
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            return connection.attach("selftest", slots=1)
        except (teemate.Busy, teemate.EnclaveLost):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_clients_of_a_broker_share_it_and_each_slot_is_handed_out_once(
    shared: RunningBroker, selftest: SelftestImage
) -> None:
    with teemate.connect(shared.socket) as connection:
        (info,) = connection.enclaves()
        assert (info.isolation, info.mrenclave) == ("none", selftest.mrenclave)
        with connection.attach("selftest", slots=1) as enclave, enclave.slot() as slot:
            operations = Operations(slot)
            operations.put_buffer(MAGIC)
            assert client(shared, "put", hex(MAGIC2)) == hex(MAGIC2)
            assert operations.get_buffer() == MAGIC2
            operations.put(enclave.base + selftest.data + 4096, MAGIC)
            assert operations.get(enclave.base + selftest.data + 4096) == MAGIC
        # Both TCSs have had their holder, and nobody could tell whether they are clean: whoever comes
        # next waits for an enclave of its own.
        with attach_to_the_next(connection) as enclave, enclave.slot() as slot:
            assert Operations(slot).get_buffer() not in (MAGIC, MAGIC2)
        (info,) = connection.enclaves()
        assert info.generation == 2
