"""Start an enclave project from the SDK's template.

Everything of ``sdk/template`` is copied; ``@NAME@`` stands for the project's name, in files and in
their names, and ``@CNAME@`` for the name as a C identifier.
"""

from __future__ import annotations

import re
from pathlib import Path

from ._problem import problem
from .build import sdk_paths

__all__ = ["new_project"]

_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
_MAX_NAME = 40


def new_project(name: str, folder: Path) -> list[Path]:
    """Make the project `name` in the new folder `folder`; return the files that were written.

    Raises :class:`~teemate.errors.ImageError` (step ``project``) for a name that is no name, or when
    `folder` exists and is not empty; OSError when something cannot be written.
    """
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise problem(
            "project",
            f"{name!r} cannot be a project's name: small letters, digits, - and _, at most {_MAX_NAME}, "
            "with a letter first",
            name=name,
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise problem("project", f"{folder} is already there: choose another place", folder=str(folder))
    template = sdk_paths().template
    found = sorted(path for path in template.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    if not found:
        raise problem("project", f"the template is not at {template}: install TeeMate anew")
    words = {"@NAME@": name, "@CNAME@": name.replace("-", "_")}
    written = []
    for source in found:
        target = folder / _filled(str(source.relative_to(template)), words)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_filled(source.read_text(encoding="utf-8"), words), encoding="utf-8")
        if source.stat().st_mode & 0o100:
            mode = target.stat().st_mode
            target.chmod(mode | (mode & 0o444) >> 2)  # for whom the umask lets read
        written.append(target)
    return written


def _filled(text: str, words: dict[str, str]) -> str:
    for mark, word in words.items():
        text = text.replace(mark, word)
    return text
