"""A warden that is killed at any instruction of a control ECALL leaves what its successor can repeat."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from images import Images


def test_control_ecalls_can_be_done_again_after_a_death_at_any_instruction(images: Images) -> None:
    image = images.faults
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("dying_wardens.py")),
            str(image.sgxs),
            str(image.sigstruct),
            "10",
        ],
        env=os.environ | {"TEEMATE_TICK": "2us-20us", "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, running = map(int, done.stdout.split())
    assert running > 0  # how soon they come is up to the machine
