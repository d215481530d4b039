"""The program behind call_figures.py works; what it measures is judged there, not here."""

from __future__ import annotations

from pathlib import Path

from backends import BACKEND
from call_figures import build_call_floor, call_figures
from images import Images


def test_a_call_is_measured_beside_what_it_is_compared_with(tmp_path: Path, images: Images) -> None:
    figures = call_figures(build_call_floor(tmp_path), images, rounds=1, backend=BACKEND)
    assert set(figures) == {"getppid_ns", "bare_ns", "call_ns", "ratio", "getppids_more"}
    assert all(figures[name] > 0 for name in ("getppid_ns", "bare_ns", "call_ns"))
