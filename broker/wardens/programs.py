"""Where the programs lie that the broker starts: beside the package, or where the environment says."""

from __future__ import annotations

import os
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

__all__ = ["closer_program", "spawner_program", "warden_program"]


@cache
def warden_program() -> Path:
    """Return the ``teemate-warden`` program: TEEMATE_WARDEN, else the one installed with the package.

    Raises
    ------
    FileNotFoundError
        There is none.

    """
    override = os.environ.get("TEEMATE_WARDEN")
    return Path(override) if override else _installed("teemate-warden")


@cache
def closer_program() -> Path:
    """Return the ``teemate-closer`` program that is installed with the package.

    Raises
    ------
    FileNotFoundError
        There is none.

    """
    return _installed("teemate-closer")


@cache
def spawner_program() -> Path:
    """Return the ``teemate-spawner`` program that is installed with the package.

    Raises
    ------
    FileNotFoundError
        There is none.

    """
    return _installed("teemate-spawner")


def _installed(name: str) -> Path:
    with as_file(files("teemate") / "libexec" / name) as path:
        if not path.is_file():
            raise FileNotFoundError(2, f"the package has no libexec/{name}: install it again", str(path))
        return path
