"""Functions that arrive sealed: by whom they can be opened, and what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import modules as wasm
import pytest
from function_enclaves import Gate, functions_image, installed, owner, principal, weakened
from images import BuiltImage, Images
from policies import enclave_policy
from running_broker import RunningBroker, run_broker

import teemate
from teemate.cli.main import run as run_command
from teemate.errors import CallFailed
from teemate.functions import (
    BadArgument,
    FunctionExists,
    Functions,
    ModuleInvalid,
    Offer,
    Sealing,
    SealRefused,
    seal,
)
from teemate.report import Report, ReportRejected
from teemate.vault import Vault

HELLO = wasm.printing(b"hello")
ALICE, BOB = 1001, 1002
KEY, TAG, HEAD = 32, 16, 48


@pytest.fixture(scope="module")
def running(images: Images) -> Iterator[RunningBroker]:
    """A broker that lends an enclave with functions and a vault."""
    attach = f"[[enclave.attach]]\nuid = {os.geteuid()}\n"
    policy = f'[[enclave]]\nname = "functions"\nimage = "{functions_image()}"\nslots_per_client = 2\n{attach}'
    with run_broker(policy + enclave_policy("vault", images.vault)) as running:
        yield running


@pytest.fixture
def connection(running: RunningBroker) -> Iterator[teemate.Broker]:
    with teemate.connect(running.socket) as connection:
        yield connection
        for info in connection.functions.list():
            connection.functions.remove(info.name)


def measured(functions: Functions) -> Report:
    """What the enclave's report says of it."""
    reports: list[Report] = []

    def upload(offer: Offer) -> bytes:
        reports.append(Report.parse(offer.report))
        raise KeyError

    with pytest.raises(KeyError):
        functions.deploy_sealed("measured", upload)
    return reports[0]


def test_a_sealed_function_is_deployed_under_the_digest_of_what_it_is(connection: teemate.Broker) -> None:
    info = connection.functions.deploy("hello", HELLO, env={"KEY": "value"}, sealed=True)
    assert (info.digest, info.size) == (hashlib.sha256(HELLO).hexdigest(), len(HELLO))
    assert connection.functions.invoke("hello") == b"hello"
    assert [listed.digest for listed in connection.functions.list()] == [info.digest]
    with pytest.raises(FunctionExists):
        connection.functions.deploy("hello", HELLO, sealed=True)
    again = connection.functions.deploy("hello", HELLO, replace=True, sealed=True)
    assert again.version > info.version


def test_a_sealed_module_is_checked_as_any(connection: teemate.Broker) -> None:
    with pytest.raises(ModuleInvalid, match="asm"):
        connection.functions.deploy("text", b"no module", sealed=True)
    with pytest.raises(BadArgument):
        connection.functions.deploy("no name", HELLO, sealed=True)


async def test_a_task_deploys_sealed_functions_too(running: RunningBroker) -> None:
    async with teemate.open_broker(running.socket) as broker:
        await broker.functions.deploy("hello", HELLO, sealed=True, replace=True)
        await broker.functions.deploy_sealed("hello", lambda offer: seal(offer, "hello", HELLO, replace=True))
        assert await broker.functions.invoke("hello") == b"hello"
        await broker.functions.remove("hello")


def test_who_may_have_the_code_is_compared_with_the_report(connection: teemate.Broker) -> None:
    functions = connection.functions
    report = measured(functions)
    right = Sealing(mrenclave=report.mrenclave, mrsigner=report.mrsigner)
    info = functions.deploy("hello", HELLO, sealed=right)
    for wrong in (
        Sealing(mrenclave=bytes(32)),
        Sealing(mrsigner=bytes(32)),
        Sealing(owner=principal(ALICE)),
    ):
        with pytest.raises(SealRefused, match="is to"):
            functions.deploy("other", HELLO, sealed=wrong)
    functions.deploy("other", HELLO, sealed=Sealing(owner=info.owner))


def test_a_vault_verifies_the_report(connection: teemate.Broker) -> None:
    with connection.attach("vault") as enclave, enclave.slot() as slot:
        sealing = Sealing(verifier=Vault(slot))
        connection.functions.deploy("hello", HELLO, sealed=sealing)

        def forge(offer: Offer) -> bytes:
            changed = bytearray(offer.report)
            changed[-1] ^= 1
            return seal(replace(offer, report=bytes(changed)), "forged", HELLO, sealing=sealing)

        with pytest.raises(ReportRejected):
            connection.functions.deploy_sealed("forged", forge, target=sealing.target())
        with pytest.raises(ReportRejected):  # it was made for the functions enclave itself
            connection.functions.deploy_sealed(
                "other", lambda offer: seal(offer, "o", HELLO, sealing=sealing)
            )


def test_a_key_in_the_place_of_the_enclaves_is_noticed(connection: teemate.Broker) -> None:
    for changes in (
        {"key": os.urandom(32)},
        {"nonce": os.urandom(32)},
        {"owner": principal(ALICE)},
    ):

        def stand_between(offer: Offer, changes: dict[str, object] = changes) -> bytes:
            return seal(replace(offer, **changes), "hello", HELLO)  # type: ignore[arg-type]

        with pytest.raises(SealRefused, match="another"):
            connection.functions.deploy_sealed("hello", stand_between)


def test_an_enclave_in_debug_mode_gets_nothing_unless_it_is_to(connection: teemate.Broker) -> None:
    def pretend(offer: Offer) -> bytes:
        report = bytearray(offer.report)
        report[48] |= 2  # ATTRIBUTES.DEBUG
        shown = replace(offer, report=bytes(report))
        assert seal(shown, "hello", HELLO, sealing=Sealing(debug=True))
        return seal(shown, "hello", HELLO)

    with pytest.raises(SealRefused, match="debug"):
        connection.functions.deploy_sealed("hello", pretend)


def test_an_upload_that_was_changed_anywhere_is_refused(connection: teemate.Broker) -> None:
    functions = connection.functions
    size = KEY + TAG + HEAD + len("hello") + len(HELLO)
    limits = KEY + TAG + 16
    places = [0, KEY - 1, KEY, KEY + TAG - 1, KEY + TAG + 2, limits, size - len(HELLO) - 1, size - len(HELLO)]
    for place in [*places, size - 1]:

        def change(offer: Offer, place: int = place) -> bytes:
            upload = bytearray(seal(offer, "hello", HELLO))
            assert len(upload) == size
            upload[place] ^= 1
            return bytes(upload)

        with pytest.raises(SealRefused, match="changed"):
            functions.deploy_sealed("hello", change)
    for shorter in (1, len(HELLO), size - KEY, size):
        with pytest.raises(CallFailed):
            functions.deploy_sealed("hello", lambda offer, n=shorter: seal(offer, "hello", HELLO)[:-n])  # type: ignore[misc]
    assert functions.list() == []


def test_a_key_that_everybody_could_agree_on_is_refused(connection: teemate.Broker) -> None:
    def weak(offer: Offer) -> bytes:
        return bytes(KEY) + seal(offer, "hello", HELLO)[KEY:]

    with pytest.raises(SealRefused):
        connection.functions.deploy_sealed("hello", weak)


def record(functions: Functions, **more: bool) -> bytes:
    """Deploy sealed; returns what went by."""
    uploads: list[bytes] = []

    def upload(offer: Offer) -> bytes:
        uploads.append(seal(offer, "hello", HELLO, **more))
        return uploads[0]

    functions.deploy_sealed("hello", upload)
    return uploads[0]


def send_again(functions: Functions, upload: bytes) -> None:
    """Without asking for another offer."""
    functions._call("deploy_sealed", upload, "hello", None)


def test_an_upload_cannot_be_sent_again(connection: teemate.Broker) -> None:
    functions = connection.functions
    upload = record(functions, replace=True)
    functions.deploy("hello", wasm.printing(b"newer"), replace=True)
    with pytest.raises(SealRefused, match="no offer here, or it was used"):
        send_again(functions, upload)
    with pytest.raises(SealRefused, match="another offer"):
        functions.deploy_sealed("hello", lambda _: upload)
    assert functions.invoke("hello") == b"newer"


def test_an_offer_is_used_up_by_an_upload_that_fails(connection: teemate.Broker) -> None:
    functions = connection.functions
    kept: list[bytes] = []

    def spoil(offer: Offer) -> bytes:
        kept.append(seal(offer, "hello", HELLO))
        return bytes(KEY) + kept[0][KEY:]

    with pytest.raises(SealRefused):
        functions.deploy_sealed("hello", spoil)
    with pytest.raises(SealRefused, match="no offer"):
        send_again(functions, kept[0])


def test_an_offer_is_for_its_slot_and_its_owner() -> None:
    with Gate(installed()) as gate:
        alice, bob, mallory = (owner(gate, slot, uid) for slot, uid in ((2, ALICE), (3, BOB), (4, ALICE)))

        def relay(offer: Offer) -> bytes:
            assert offer.owner == principal(ALICE)
            upload = seal(offer, "hello", HELLO)
            for other in (bob, mallory):
                with pytest.raises(SealRefused):
                    other.deploy_sealed("hello", lambda _: upload)
                with pytest.raises(SealRefused):
                    send_again(other, upload)
            return upload

        alice.deploy_sealed("hello", relay)
        assert alice.invoke("hello") == b"hello"
        assert bob.list() == []


@pytest.fixture(scope="module")
def forgetful(images: Images, tmp_path_factory: pytest.TempPathFactory) -> BuiltImage:
    """The image whose offers can be used again."""
    return weakened(images, tmp_path_factory.mktemp("forgetful"), "TM_TEST_OFFER_STAYS")


def test_who_does_not_use_offers_up_is_found(forgetful: BuiltImage) -> None:
    with Gate(forgetful) as gate:
        functions = owner(gate, 2, ALICE)
        upload = record(functions, replace=True)
        functions.deploy("hello", wasm.printing(b"newer"), replace=True)
        send_again(functions, upload)
        assert functions.invoke("hello") == b"hello"


def test_a_start_that_seals_nothing_does_without_cryptography() -> None:
    program = "import sys, teemate, teemate.functions; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_shell_seals_for_an_enclave_that_is_named(
    running: RunningBroker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hello.wasm"
    path.write_bytes(HELLO)
    with teemate.connect(running.socket) as connection:
        mrenclave = measured(connection.functions).mrenclave

    def deploy(name: str, *options: str) -> tuple[int, str]:
        status = run_command(["fn", "deploy", name, str(path), "--socket", running.socket, *options])
        return status, "".join(capsys.readouterr())

    assert deploy("first", "--sealed")[0] == 0
    status, told = deploy("second", "--sealed", "--mrenclave", mrenclave.hex(), "--vault", "vault")
    assert status == 0, told
    status, told = deploy("third", "--sealed", "--mrenclave", "00" * 32)
    assert status != 0
    assert "MRENCLAVE" in told
    assert deploy("third", "--mrenclave", mrenclave.hex())[0] != 0
    assert deploy("third", "--sealed", "--mrenclave", "0011")[0] != 0
    with teemate.connect(running.socket) as connection:
        assert [info.name for info in connection.functions.list()] == ["first", "second"]
