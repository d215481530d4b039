"""The numbers of docs/functions.md are those of native/enclaves/functions/functions.h."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
HEADER = (PROJECT / "native/enclaves/functions/functions.h").read_text()
PAGE = " ".join((PROJECT / "docs/functions.md").read_text().split())


def number(name: str) -> int:
    """What the header defines `name` as."""
    found = re.search(rf"^#define {name} (.*?)(?: +/\*|$)", HEADER, re.MULTILINE)
    assert found is not None, name
    return eval(re.sub(r"(?<=\d)u(?:ll)?\b", "", found[1]), {})  # arithmetic of our own header


@pytest.mark.parametrize(
    ("name", "unit", "told"),
    [
        ("FN_DEFAULT_MEMORY", 1 << 20, "| memory | {} MiB |"),
        ("FN_DEFAULT_FUEL", 1, "| fuel | {:,} |"),
        ("FN_DEFAULT_TIME", 10**9, "| time | {} s |"),
        ("FN_DEFAULT_OUTPUT", 1 << 20, "| output | {} MiB |"),
        ("FN_OUTPUT_MAX", 1 << 20, "| 1 MiB | {} MiB |"),
        ("FN_NAME_MAX", 1, "1 to {} letters"),
        ("FN_MODULE_MAX", 1 << 20, "A module has at most {} MiB"),
        ("FN_PAYLOAD_MAX", 1 << 20, "a payload {} MiB"),
        ("FN_STRINGS_MAX", 1 << 10, "have {} KiB each"),
        ("FN_OWNER_FUNCTIONS", 1, "at most {} functions"),
        ("FN_LOGS_COUNT", 1, "the last {} invocations"),
        ("FN_LOG_MAX", 1 << 10, "of each the last {} KiB"),
        ("FN_LOGS_BYTES", 1 << 10, "stderr is kept, the last {} KiB of a function"),
    ],
)
def test_the_page_tells_the_headers_number(name: str, unit: int, told: str) -> None:
    whole, rest = divmod(number(name), unit)
    assert rest == 0
    assert told.format(whole) in PAGE


def test_the_page_tells_the_headers_shares() -> None:
    words = {2: "half", 4: "a quarter", 8: "an eighth"}
    assert f"fill {words[number('FN_OWNER_SHARE')]} of the heap" in PAGE
    assert f"all users together {words[number('FN_ALL_SHARE')]} of it" in PAGE
    assert f"| {words[number('FN_MEMORY_SHARE')]} of the enclave's heap |" in PAGE
