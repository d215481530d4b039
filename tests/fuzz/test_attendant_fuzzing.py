"""The attendant (native/door) with sanitizers, and messages that are nearly what it answers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_fuzzing import LIB, ROOT, compile_with_sanitizers

from teemate import wire
from teemate.broker.connections.requests import Arguments, Attach, Hello, parse_request

DOOR = ROOT / "native" / "door"
DOOR_PARTS = ("attendant", "door", "greet", "guests", "peer", "plain", "prompt")
DOOR_PARTS += ("seats", "shelves", "turn_away")


def build(folder: Path, name: str) -> Path:
    """Compile a program of that name with the attendant."""
    program = folder / name
    sources = [Path(__file__).with_name(f"{name}.c")]
    sources += [DOOR / f"{part}.c" for part in DOOR_PARTS]
    sources += [LIB / f"{part}.c" for part in ("hmac", "sha256")]
    compile_with_sanitizers([f"-I{DOOR}", *map(str, sources), "-lpthread", "-lm", "-o", str(program)])
    return program


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("attendant"), "fuzz_attendant")


@pytest.fixture(scope="module")
def greeter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("greeting"), "fuzz_greeting")


def test_what_is_answered_is_what_the_broker_would_take_and_the_rest_is_left_to_it(
    target: Path, request: pytest.FixtureRequest
) -> None:
    count = 2_000_000 if request.config.getoption("--full") else 30_000
    done = subprocess.run([target, "7", str(count)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answered = {bytes.fromhex(line) for line in done.stdout.split()}
    assert len(answered) > 20, "the messages are good enough"
    for message in answered:
        asked = parse_request(wire.decode(message))
        attach = Attach.parse(Arguments(asked.operation, asked.untrusted_args))
        assert (asked.operation, attach.enclave, attach.slots) == ("attach", "vault", 1)


def test_what_is_taken_away_while_the_thread_answers_is_given_or_not_but_never_both(target: Path) -> None:
    done = subprocess.run([target, "7", "20000", "race"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_who_is_greeted_said_what_the_broker_would_take_and_everybody_else_is_at_the_door(
    greeter: Path, request: pytest.FixtureRequest
) -> None:
    count = 1_000_000 if request.config.getoption("--full") else 15_000
    done = subprocess.run([greeter, "7", str(count)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    greeted = {bytes.fromhex(line) for line in done.stdout.split()}
    assert len(greeted) > 20, "the messages are good enough"
    for message in greeted:
        said = parse_request(wire.decode(message))
        hello = Hello.parse(Arguments(said.operation, said.untrusted_args))
        assert (said.operation, hello.version, hello.resume) == ("hello", 1, None)
        assert set(said.untrusted_args) <= {"version", "counters", "client", "session"}


def test_who_comes_while_the_places_are_taken_away_is_greeted_or_at_the_door_but_never_both(
    greeter: Path,
) -> None:
    done = subprocess.run([greeter, "7", "5000", "race"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
