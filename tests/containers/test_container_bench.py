"""``teemate bench container``; how fast anything is, is judged nowhere here."""

from __future__ import annotations

import os

import pytest
from backends import BACKEND

from teemate.bench._oci import runc_program
from teemate.bench._run import run_bench
from teemate.errors import Unsupported


class Silence:
    def phase(self, text: str, total: int = 0) -> None:
        """Say nothing."""

    def progress(self, done: int) -> None:
        """Say nothing."""


def test_a_container_that_attaches_is_compared_with_one_that_builds_and_one_that_does_nothing() -> None:
    report = run_bench("container", Silence(), backend=BACKEND, quick=True, scale=0.02)
    rows = {row.figure: row for row in report.result.rows}
    assert {"container_empty", "container_conventional", "container_attach", "container_ratio"} <= set(rows)
    assert rows["container_attach"].relative_to == "container_conventional"
    assert rows["container_empty"].value > 0


def test_who_cannot_make_containers_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(Unsupported, match="install it"):
        runc_program()
    monkeypatch.setattr("shutil.which", lambda *_, **__: "/usr/sbin/runc")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unsupported, match="as root"):
        runc_program()
