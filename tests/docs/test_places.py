"""Files that pages and comments name are where they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
FOLDERS = ("broker", "client", "docs", "man", "native", "systemd", "tests", ".ci")
ENDINGS = "py|pyi|c|h|S|rs|md|toml|cddl|json|yml|example|catalog|service|socket|rules|conf"
NAMED = re.compile(rf"(?<![\w./}}-])(?:{'|'.join(FOLDERS)})/[\w./-]*\.(?:{ENDINGS})(?![\w.]*\w)")
SYSTEMDS = {"docs/JOURNAL_NATIVE_PROTOCOL.md"}
"""Of systemd's sources."""


def pages() -> Iterator[Path]:
    """What people read."""
    yield PROJECT / "README.md"
    for folder in FOLDERS:
        yield from (path for path in (PROJECT / folder).rglob("*.md") if "@" not in str(path))


def texts() -> Iterator[Path]:
    """Everything that may name a file: sources and pages."""
    yield PROJECT / "README.md"
    for folder in FOLDERS:
        for path in (PROJECT / folder).rglob("*"):
            if path.is_file() and re.fullmatch(rf".*\.(?:{ENDINGS}|[1-8]|build)", path.name):
                yield path


def missing(text: str) -> set[str]:
    """Files that `text` names by their place in the repository, and that are not there."""
    return {name for name in NAMED.findall(text) if not (PROJECT / name).exists()} - SYSTEMDS


def test_every_file_that_is_named_by_its_place_is_there() -> None:
    found = {str(path.relative_to(PROJECT)): missing(path.read_text()) for path in texts()}
    assert len(found) > 500
    assert {path: names for path, names in found.items() if names} == {}


def test_a_file_that_has_moved_is_found() -> None:
    moved = "broker/" + "requests.py"
    assert missing(f"as in {moved}, or broker/connections/requests.py.") == {moved}


def test_every_link_of_a_page_leads_to_a_file() -> None:
    links = 0
    for page in pages():
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not target.startswith(("http:", "https:")):
                links += 1
                assert (page.parent / target).exists(), f"{page.relative_to(PROJECT)}: {target}"
    assert links >= 8
