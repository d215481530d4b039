"""Programs in C do with an enclave what programs in Python do, and meet the same errors."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import ANY

import pytest
from backends import NUMBER, PATIENCE
from c_programs import EXAMPLES, EXTRA_FLAGS, PREFIX, Program, Refused, compile_program, flags
from images import Images
from policies import enclave_policy
from processes import wait_until
from running_broker import RunningBroker

import teemate

StartBroker = Callable[..., RunningBroker]
StartProgram = Callable[[], Program]


TOTAL = {"vault": 12, "faults": 8}
"""Slots of the images that the shared broker has."""


def slots_of(running: RunningBroker, name: str) -> teemate.SlotCounts:
    with teemate.connect(running.socket) as connection:
        (slots,) = [info.slots for info in connection.enclaves() if info.name == name]
        return slots


def free_slots(running: RunningBroker, name: str) -> int:
    """Slots of an enclave that nobody has."""
    return slots_of(running, name).free


def all_come_back(running: RunningBroker, name: str, expected: int) -> bool:
    """Whether so many slots are free once what was given back has been looked at."""
    deadline = time.monotonic() + 30 * PATIENCE
    while free_slots(running, name) != expected:
        if time.monotonic() > deadline:
            return False
    return True


# -- the whole way ---------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True], ids=["shared", "static"])
def test_the_example_shares_a_value_with_a_python_program(
    shared: RunningBroker, tmp_path: Path, static: bool
) -> None:
    from teemate.vault import Vault

    example = compile_program(EXAMPLES / "greeting.c", tmp_path / "greeting", static=static)

    def greeting(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TEEMATE_SOCKET": shared.socket}
        return subprocess.run([example, *arguments], env=environment, capture_output=True, text=True)

    with teemate.connect(shared.socket) as connection, connection.attach("vault") as enclave:
        with enclave.slot() as slot:
            Vault(slot).put(b"name", b"Ada")
            told = greeting("vault", "name")
            assert (told.returncode, told.stdout.split(" (")[0]) == (0, "name = Ada")
            assert greeting("vault", "name", "Grace").returncode == 0
            entry = Vault(slot).get(b"name")
            assert entry is not None
            assert entry.value == b"Grace"
    told = greeting("vault", "nobody")
    assert (told.returncode, told.stdout) == (1, "nobody is not there\n")
    told = greeting("no-such", "name")
    assert told.returncode == 1
    assert "not-found" in told.stderr


def test_the_library_needs_nothing_but_libc_and_the_cbor_library() -> None:
    flags("--libs")
    if EXTRA_FLAGS:
        pytest.skip("sanitizers bring libraries along")
    needed = subprocess.run(
        ["readelf", "-d", str(PREFIX / "libteemate.so")], check=True, capture_output=True, text=True
    ).stdout
    names = {line.split("[")[1].split("]")[0] for line in needed.splitlines() if "(NEEDED)" in line}
    assert {name.split(".so")[0] for name in names} <= {"libc", "libcbor", "ld-linux-x86-64"}


def test_every_function_of_the_headers_is_exported_and_nothing_else() -> None:
    flags("--libs")
    command = ["nm", "-D", "--defined-only", str(PREFIX / "libteemate.so")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    exported = {line.split()[2] for line in shown.splitlines() if line.split()[1] in "TD"}
    headers = Path(flags("--cflags")[0].removeprefix("-I"))
    text = (headers / "teemate.h").read_text() + (headers / "teemate_client.h").read_text()
    assert exported == {name for name in exported if f"{name}(" in text}
    assert {"teemate_connect", "teemate_call", "teemate_enter"} <= exported


def test_the_header_can_be_used_from_cxx(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    source = tmp_path / "program.cc"
    text = "int main() { return teemate_detach(nullptr, nullptr); }"
    source.write_text(f"#include <teemate_client.h>\n{text}\n")
    options = ["-Wall", "-Wextra", "-Werror", *EXTRA_FLAGS, *flags("--cflags")]
    libraries = [*flags("--libs"), f"-Wl,-rpath,{PREFIX}", "-o", str(tmp_path / "program")]
    subprocess.run(["g++", *options, str(source), *libraries], check=True)
    subprocess.run([str(tmp_path / "program")], check=True)


def test_a_program_attaches_calls_and_leaves_nothing_behind(
    shared: RunningBroker, program: StartProgram
) -> None:
    total = TOTAL["vault"]
    user = program()
    before = (user.number("fds"), user.number("mapped"))
    user.connect(shared.socket)
    for _ in range(3):
        grant = user.attach("vault", slots=2)
        lease = user.take(grant)
        assert user.number("mapped") > 0
        assert user.call(lease, "echo", b"hello") == b"hello"
        user.do("give", lease)
        user.do("detach", grant)
        assert user.number("mapped") == 0
    user.do("ping")
    user.do("disconnect")
    # The listener's epoll and eventfd stay for the next connection of the process.
    assert user.number("fds") - before[0] <= 2
    kept = user.number("fds")
    user.connect(shared.socket)
    user.call(user.take(user.attach("vault")), "empty")
    user.do("disconnect")
    assert (user.number("fds"), user.number("mapped")) == (kept, before[1])
    assert all_come_back(shared, "vault", total)


def test_enclaves_are_listed_as_the_broker_has_them(shared: RunningBroker, program: StartProgram) -> None:
    user = program()
    user.connect(shared.socket)
    with teemate.connect(shared.socket) as connection:
        expected = [
            [info.name, str(NUMBER), "1", str(info.base), str(info.slots.total)]
            for info in connection.enclaves()
        ]
    # How many are free may have changed meanwhile.
    assert [re.split("[:/]", entry) for entry in user.do("list")] == [
        [*known[:4], ANY, known[4]] for known in expected
    ]


def test_slots_are_acquired_and_released(shared: RunningBroker, program: StartProgram) -> None:
    total = TOTAL["vault"]
    user = program()
    user.connect(shared.socket)
    grant = user.attach("vault", slots=1)
    user.do("acquire", grant, 2, 1000)
    leases = [user.take(grant, 0) for _ in range(3)]
    for lease in leases:
        assert user.call(lease, "echo", bytes([lease])) == bytes([lease])
    assert all_come_back(shared, "vault", total - 3)
    with pytest.raises(Refused, match="only 0 of this grant are free") as caught:
        user.do("release", grant, 1)
    assert caught.value.code == "busy"
    for lease in leases:
        user.do("give", lease)
    user.do("release", grant, 2)
    assert all_come_back(shared, "vault", total - 1)
    user.take(grant, 0)
    user.do("disconnect")
    assert all_come_back(shared, "vault", total)


# -- errors ----------------------------------------------------------------------------------


def test_requests_that_the_broker_refuses_say_why_and_which_limit(
    broker: StartBroker, policy: str, program: StartProgram, images: Images
) -> None:
    small = images.build("vault", slots=2, heap="1M")
    running = broker(policy + enclave_policy("small", small, "slots_per_client = 2"))
    user, other = program(), program()
    user.connect(running.socket)
    with pytest.raises(Refused) as caught:
        user.attach("nobody")
    assert caught.value.code == "not-found"
    with pytest.raises(Refused) as caught:
        user.attach("vault", slots=5)
    assert (caught.value.code, caught.value.limit) == ("busy", "slots_per_client")
    with pytest.raises(Refused) as caught:
        user.attach("x" * 65)
    assert caught.value.code == "bad-argument"
    other.connect(running.socket)
    other.attach("small", slots=2)
    with pytest.raises(Refused) as caught:
        user.attach("small", wait=50)
    assert caught.value.code == "busy"
    assert "0.05" in caught.value.text
    # None of it has cost anything.
    user.call(user.take(user.attach("vault")), "empty")


def test_nobody_listening_is_a_lost_connection_with_the_path(program: StartProgram, tmp_path: Path) -> None:
    user = program()
    with pytest.raises(Refused, match=f"no broker answers at {tmp_path}/nobody") as caught:
        user.connect(f"{tmp_path}/nobody")
    assert caught.value.code == "connection-lost"
    with pytest.raises(Refused) as caught:
        user.connect("/" + "x" * 200)
    assert caught.value.code == "bad-argument"


def test_a_taken_address_is_named(shared: RunningBroker, program: StartProgram) -> None:
    total = TOTAL["vault"]
    user = program()
    user.connect(shared.socket)
    user.attach("vault")
    with pytest.raises(Refused, match="is taken by") as caught:
        user.attach("vault")
    assert caught.value.code == "address-in-use"
    user.do("disconnect")
    assert all_come_back(shared, "vault", total)


def test_calls_fail_as_the_enclave_says(shared: RunningBroker, program: StartProgram) -> None:
    user = program()
    user.connect(shared.socket)
    lease = user.take(user.attach("faults"))
    with pytest.raises(Refused, match="no ECALL of that name") as caught:
        user.call(lease, "nothing")
    assert (caught.value.code, caught.value.status) == ("not-found", -2)
    with pytest.raises(Refused, match="answered status 7") as caught:
        user.call(lease, "status", struct.pack("<Q", 7))
    assert (caught.value.code, caught.value.status) == ("call-failed", 7)
    with pytest.raises(Refused) as caught:
        user.call(lease, "echo", bytes(100), room=10)
    assert (caught.value.code, caught.value.needed) == ("limit-reached", 100)
    with pytest.raises(Refused) as caught:
        user.call(lease, "x" * 65)
    assert caught.value.code == "bad-argument"
    assert user.call(lease, "echo", b"still here") == b"still here"


def test_a_fault_is_told_and_costs_only_its_slot(shared: RunningBroker, program: StartProgram) -> None:
    total = TOTAL["faults"]
    user = program()
    user.connect(shared.socket)
    grant = user.attach("faults", slots=2)
    lease, other = user.take(grant), user.take(grant)
    with pytest.raises(Refused, match="#PF") as caught:
        user.call(lease, "fault_line")
    assert (caught.value.code, caught.value.vector) == ("enclave-fault", 14)
    with pytest.raises(Refused, match="out of use: a fault in call 'fault_line'") as caught:
        user.call(lease, "empty")
    assert caught.value.code == "not-attached"
    user.do("give", lease)
    user.call(other, "empty")
    user.do("acquire", grant, 1, 10000)
    user.call(user.take(grant), "empty")
    user.do("disconnect")
    assert all_come_back(shared, "faults", total)


def test_a_call_that_takes_too_long_is_given_up(shared: RunningBroker, program: StartProgram) -> None:
    total = TOTAL["faults"]
    user = program()
    user.connect(shared.socket)
    grant = user.attach("faults", slots=2)
    lease, second = user.take(grant), user.take(grant)
    with pytest.raises(Refused, match="timeout of 50 ms") as caught:
        user.call(lease, "loop", timeout=50)
    assert caught.value.code == "call-timeout"
    with pytest.raises(Refused, match="given up by this program") as caught:
        user.do("patient", second, "loop", "-", 3)
    assert caught.value.code == "call-abandoned"
    user.do("give", lease)
    user.do("give", second)
    with pytest.raises(Refused, match="no slot left"):
        user.take(grant, 0)
    user.do("disconnect")
    assert all_come_back(shared, "faults", total)


def test_one_lease_is_for_one_thread(shared: RunningBroker, program: StartProgram) -> None:
    user = program()
    user.connect(shared.socket)
    grant = user.attach("faults")
    lease = user.take(grant)
    user.do("start", 0, "ocall", lease, "ocall", b"hello".hex(), "wait")
    while user.number("handlers") == 0:
        pass
    with pytest.raises(Refused, match="used by another thread") as caught:
        user.call(lease, "empty")
    assert caught.value.code == "busy"
    with pytest.raises(Refused, match="no free slot after 20 ms"):
        user.take(grant, 20)
    user.do("stopped")
    user.do("join", 0)
    user.call(lease, "empty")


def test_ocalls_run_in_the_calling_thread(shared: RunningBroker, program: StartProgram) -> None:
    user = program()
    user.connect(shared.socket)
    grant = user.attach("faults", slots=2)
    lease = user.take(grant)
    assert user.do("ocall", lease, "ocall", b"abc".hex(), "echo") == [b"echoabc".hex()]
    for how in ("fail", "none"):
        with pytest.raises(Refused, match="an OCALL of it was refused or failed") as caught:
            user.do("ocall", lease, "ocall", b"abc".hex(), how)
        assert (caught.value.code, caught.value.status) == ("call-failed", -10)
    with pytest.raises(Refused, match="given up by its OCALL handler") as caught:
        user.do("ocall", lease, "ocall", b"abc".hex(), "abandon")
    assert caught.value.code == "call-abandoned"
    user.call(user.take(grant), "empty")


def test_threads_call_on_slots_of_their_own_while_one_waits_for_events(
    shared: RunningBroker, program: StartProgram
) -> None:
    user = program()
    user.connect(shared.socket)
    grant = user.attach("faults", slots=4)
    leases = [user.take(grant) for _ in range(4)]
    user.do("start", 9, "event", 60000)
    for lease in leases:
        user.do("start", lease, "calls", lease, 2000)
    for _ in range(50):
        user.do("ping")
    for lease in leases:
        user.do("join", lease)
    with teemate.connect(shared.socket) as admin:
        admin.drain("faults", deadline=0.0)
        assert user.do("join", 9) == ["3", "0", "faults", "0", "0"]
        admin.undrain("faults")
        assert user.do("event", 60000) == ["4", "0", "faults", "0", "0"]
    with pytest.raises(Refused, match="no event within 10 ms"):
        user.do("event", 10)


def test_detaching_ends_the_waiting_of_other_threads_for_slots(
    broker: StartBroker, policy: str, images: Images, program: StartProgram
) -> None:
    small = images.build("vault", slots=1, heap="1M")
    running = broker(policy + enclave_policy("small", small, "slots_per_client = 4"))
    user = program()
    user.connect(running.socket)
    grant = user.attach("small")
    lease = user.take(grant)
    user.do("start", 0, "take", grant, 60000)
    user.do("start", 1, "acquire", grant, 1, 60000)
    wait_until(lambda: slots_of(running, "small").waiting, "a thread waits for another slot")
    with pytest.raises(Refused, match="waits for slots") as caught:
        user.do("detach", grant)  # the broker is still asked for one
    assert caught.value.code == "busy"
    with pytest.raises(Refused) as caught:
        user.do("join", 0)
    assert caught.value.code == "not-attached"
    user.do("give", lease)  # which is what the other thread gets, and has to give back
    with pytest.raises(Refused) as caught:
        user.do("join", 1)
    assert caught.value.code == "not-attached"
    user.do("detach", grant)
    user.do("disconnect")
    assert all_come_back(running, "small", 1)


def test_a_child_of_fork_holds_nothing_and_can_attach_for_itself(
    shared: RunningBroker, program: StartProgram
) -> None:
    user = program()
    user.connect(shared.socket)
    grant = user.attach("vault", slots=2)
    lease = user.take(grant)
    user.call(lease, "empty")
    for words in (
        ("ping",),
        ("attach", "vault", 1, 100),
        ("take", grant, 0),
        ("acquire", grant, 1, 0),
        ("call", lease, "empty", "-", -1, 0),
        ("raw", lease, 0, 0, 0, -1),
        ("event", 0),
    ):
        with pytest.raises(Refused) as caught:
            user.do("fork", *words)
        assert caught.value.code == "not-attached"
    assert user.do("fork", "mapped") == ["0"]
    user.do("fork", "disconnect")
    user.do("fork", "detach", grant)
    user.do("fork", "give", lease)
    assert user.call(lease, "echo", b"the parent's") == b"the parent's"
    user.do("ping")


def test_raw_entries_carry_the_key_and_do_not_show_it(
    broker: StartBroker, images: Images, program: StartProgram
) -> None:
    raw = images.build("raw")
    running = broker(enclave_policy("raw", raw, "require_sdk = false\nslots_per_client = 2"))
    user = program()
    user.connect(running.socket)
    grant = user.attach("raw", slots=2)
    lease = user.take(grant)
    assert user.do("raw", lease, 0, 30, 12, -1) == ["42", "0", "0"]
    with pytest.raises(Refused, match="timeout of 50 ms"):
        user.do("raw", lease, 5, 0, 0, 50)
    with pytest.raises(Refused) as caught:
        user.do("raw", user.take(grant), 3, 0, 0, -1)
    assert (caught.value.code, caught.value.vector) == ("enclave-fault", 6)
