"""`teemate-floor` does the least that it claims to do, and says when it cannot."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from backends import BACKEND

from teemate.bench._measured import Measured
from teemate.bench._setting import FLOOR
from teemate.errors import InternalError
from teemate.image import shipped


def answers(words: list[str], what: str, count: int) -> list[int]:
    with Measured("floor", [str(FLOOR), *words]) as floor:
        return floor.ask(what, count)


def test_each_round_of_creating_is_timed() -> None:
    rounds = answers(["create", "4096", str(1 << 20)], "create", 3)
    assert len(rounds) == 3
    assert all(ns > 0 for ns in rounds)


def test_attaching_is_timed_with_and_without_connecting(tmp_path: Path) -> None:
    with Measured("floor", [str(FLOOR), "attach", str(tmp_path / "socket"), str(1 << 20)]) as floor:
        assert [len(floor.ask(what, 5, pause)) for what in ("warm", "cold") for pause in (0, 10)] == [5] * 4


def test_a_call_is_timed_beside_what_it_is_compared_with() -> None:
    bare, vault = shipped("bare"), shipped("vault")
    words = ["call", str(bare.sgxs), str(bare.sigstruct), str(vault.sgxs), str(vault.sigstruct), BACKEND]
    with Measured("floor", [str(FLOOR), *words]) as floor:
        for what in ("getppid", "bare", "empty"):
            assert all(ns > 0 for ns in floor.ask(what, 3))


def test_more_memory_than_the_machine_has_is_refused_before_it_is_taken() -> None:
    with pytest.raises(InternalError, match="more than half"):
        answers(["create", str(1 << 40), "0"], "create", 1)


def test_what_a_floor_cannot_do_ends_it() -> None:
    with pytest.raises(InternalError, match="status 1"):
        answers(["hash"], "create", 1)


@pytest.mark.parametrize("words", [[], ["nothing"], ["create"], ["attach", "x"], ["call"], ["hash", "x"]])
def test_wrong_words_are_told(words: list[str]) -> None:
    assert subprocess.run([str(FLOOR), *words], check=False, capture_output=True).returncode == 2
