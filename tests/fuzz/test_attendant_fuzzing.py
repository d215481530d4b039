"""The attendant (native/door) with sanitizers, and messages that are nearly what it answers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_fuzzing import LIB, ROOT, compile_with_sanitizers

from teemate import wire
from teemate.broker.connections.requests import Arguments, Attach, parse_request

DOOR = ROOT / "native" / "door"
DOOR_PARTS = ("attendant", "door", "greet", "peer", "plain", "prompt", "seats", "shelves", "turn_away")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("attendant") / "fuzz"
    sources = [Path(__file__).with_name("fuzz_attendant.c")]
    sources += [DOOR / f"{name}.c" for name in DOOR_PARTS]
    sources += [LIB / f"{name}.c" for name in ("hmac", "sha256")]
    compile_with_sanitizers([f"-I{DOOR}", *map(str, sources), "-lpthread", "-lm", "-o", str(program)])
    return program


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
