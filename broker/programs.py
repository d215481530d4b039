"""Where the programs lie that the broker starts: beside the package, or where the environment says."""

from __future__ import annotations

import os
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

__all__ = ["warden_program"]


@cache
def warden_program() -> Path:
    """Return the ``teemate-warden`` program: TEEMATE_WARDEN, else the one installed with the package.

    Raises
    ------
    FileNotFoundError
        There is none.

    """
    override = os.environ.get("TEEMATE_WARDEN")
    if override:
        return Path(override)
    with as_file(files("teemate") / "libexec" / "teemate-warden") as path:
        if not path.is_file():
            raise FileNotFoundError(
                2, "the package has no libexec/teemate-warden: install it again", str(path)
            )
        return path
