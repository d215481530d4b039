"""The attendant (native/door) with sanitizers, and messages that are nearly what it answers."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_fuzzing import LIB, ROOT, compile_with_sanitizers

from teemate import wire
from teemate.broker.connections.requests import Arguments, Attach, Hello, parse_request

DOOR = ROOT / "native" / "door"
DOOR_PARTS = ("attendant", "door", "greet", "guests", "peer", "plain", "prompt")
DOOR_PARTS += ("seats", "shelves", "turn_away")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both programs, with the attendant compiled once."""
    folder = tmp_path_factory.mktemp("attendant")
    parts = [DOOR / f"{part}.c" for part in DOOR_PARTS] + [LIB / f"{part}.c" for part in ("hmac", "sha256")]
    mains = [Path(__file__).with_name(f"{name}.c") for name in ("fuzz_attendant", "fuzz_greeting")]
    compiled = {source.stem: folder / f"{source.stem}.o" for source in (*parts, *mains)}
    with ThreadPoolExecutor(max_workers=2) as pool:
        lines = ([f"-I{DOOR}", "-c", str(s), "-o", str(compiled[s.stem])] for s in (*parts, *mains))
        list(pool.map(compile_with_sanitizers, lines))
    programs = {main.stem: folder / main.stem for main in mains}
    for name, program in programs.items():
        objects = [str(compiled[source.stem]) for source in parts]
        compile_with_sanitizers([str(compiled[name]), *objects, "-lpthread", "-lm", "-o", str(program)])
    return programs


@pytest.fixture
def target(programs: dict[str, Path]) -> Path:
    return programs["fuzz_attendant"]


@pytest.fixture
def greeter(programs: dict[str, Path]) -> Path:
    return programs["fuzz_greeting"]


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
