"""The conformance table: what the SDM's pseudo-code says, and how it is seen.

One row for every fault and error branch of EENTER, ERESUME, EEXIT, AEX, EREPORT, EGETKEY, EINIT,
EACCEPT, EACCEPTCOPY and EMODPE, in `table/*.toml`; and of the driver's mmap and SGX2 calls.
A row is exactly one of

* *tested*: `case` (the language of runner.c), and `expect` (what a caller sees) or `check` (the
  name of a function below, where the expected bytes are computed);
* *not reachable* from user mode, with the reason in `unreachable`;
* and of the tested ones, *not shown* by the backends that `not_shown` names, each with a reason.

`needs` names what the machine must be like: `sgx1` (a processor without SGX2), `provision` (this process
may open /dev/sgx_provision; without it, it may not).

`guards` names the branches of the sim (SIM_CHECK ids) whose absence makes the row fail.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import cmac
from cryptography.hazmat.primitives.ciphers import algorithms

HERE = Path(__file__).parent
LIB = HERE.parents[1] / "native" / "lib"
INSTRUCTIONS = frozenset(
    [
        "AEX",
        "EACCEPT",
        "EACCEPTCOPY",
        "EENTER",
        "EEXIT",
        "EGETKEY",
        "EINIT",
        "EMODPE",
        "EREPORT",
        "ERESUME",
        "ACCESS",
        "MAP",
        "SGX2",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One branch of the pseudo-code."""

    id: str
    instruction: str
    condition: str
    result: str
    case: str | None = None
    expect: str | None = None
    check: str | None = None
    guards: tuple[str, ...] = ()
    needs: str | None = None
    unreachable: str | None = None
    not_shown: Mapping[str, str] = field(default_factory=dict)

    def tested_on(self, backend: str) -> bool:
        """Is this backend held to the row?  What sgx does not show, sgx-machine does not either."""
        names = {backend, backend.partition("-")[0]}
        return self.case is not None and not names & set(self.not_shown)

    def passes(self, seen: str, images: Path) -> bool:
        """Is this what a caller must see?"""
        if self.check is not None:
            return CHECKS[self.check](seen.split("; "), images)
        return seen == self.expect


def read_row(instruction: str, raw: dict[str, Any]) -> Row:
    """Read one row; a row that claims nothing, or two things at once, is an error."""
    row = Row(instruction=instruction, **(raw | {"guards": tuple(raw.get("guards", ()))}))
    if (row.case is None) == (row.unreachable is None):
        raise ValueError(f"{row.id} must be tested, or not reachable with a reason")
    if row.case is not None and (row.expect is None) == (row.check is None):
        raise ValueError(f"{row.id} must have an expected result")
    if not all([row.condition, row.result, *row.not_shown.values()]) or row.unreachable == "":
        raise ValueError(f"{row.id} has an empty text")
    return row


def read_table() -> list[Row]:
    """Read the whole table, in the order of files and rows."""
    rows = []
    for path in sorted((HERE / "table").glob("*.toml")):
        data = tomllib.loads(path.read_text())
        rows += [read_row(data["instruction"], raw) for raw in data["row"]]
    return rows


def sim_branches() -> list[str]:
    """The ids of all branches that the sim's sources name."""
    pattern = re.compile(r'SIM_(?:CHECK|STEP)\(\s*"([^"]+)"')
    sources = sorted([*LIB.glob("*.c"), *LIB.glob("*.S")])
    return [branch for path in sources for branch in pattern.findall(path.read_text())]


# What cannot be a fixed string: each takes what the steps saw, and the folder of images.


def differ(seen: list[str], images: Path) -> bool:
    return len(seen) == 2 and all(len(key) == 32 for key in seen) and seen[0] != seen[1]


def equal(seen: list[str], images: Path) -> bool:
    return len(seen) == 2 and len(seen[0]) == 32 and seen[0] == seen[1]


def mac_of(seen: list[str]) -> tuple[bytes, bytes]:
    """The MAC in the report, and the one that the report key gives."""
    report, key = (bytes.fromhex(text) for text in seen)
    context = cmac.CMAC(algorithms.AES(key))
    context.update(report[:384])
    return report[416:432], context.finalize()


def report_mac(seen: list[str], images: Path) -> bool:
    in_report, computed = mac_of(seen)
    return in_report == computed


def report_mac_differs(seen: list[str], images: Path) -> bool:
    in_report, computed = mac_of(seen)
    return in_report != computed and any(in_report)


def report_identity(seen: list[str], images: Path) -> bool:
    report = bytes.fromhex(seen[0])
    return (
        report[48:64] == (5).to_bytes(8, "little") + (3).to_bytes(8, "little")  # INIT, MODE64BIT; x87 and SSE
        and report[64:96] == (images / "plain.mrenclave").read_bytes()
        and report[128:160] == (images / "plain.mrsigner").read_bytes()
        and report[256:260] == bytes([7, 0, 5, 0])  # ISVPRODID, ISVSVN
    )


def repeated(n: int) -> int:
    return 0x1111_1111_1111_1111 * n


PATTERN_R15 = 0x0123_4567_89AB_CDEF


def words(text: str) -> list[int]:
    data = bytes.fromhex(text)
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]


def pattern(seen: list[str], images: Path) -> bool:
    if seen[0] != "exit":
        return False
    found = words(seen[1])
    registers = [repeated(n) for n in range(1, 15)] + [PATTERN_R15]
    flags = found[16] & 0xCD5
    return (
        found[:15] == registers
        and found[15] == PATTERN_R15
        and flags == 0x4D5
        and found[17:] == [0xF5F5, 0x6060]
    )


def gprs(seen: list[str], images: Path) -> bool:
    if seen[0] != "#UD(0)":
        return False
    found = words(seen[1])
    # RAX RCX RDX RBX, RSP, RBP RSI RDI, R8 to R15
    saved = [repeated(n) for n in (1, 3, 4, 2, 7, 5, 6)] + [repeated(n) for n in range(8, 15)] + [PATTERN_R15]
    return found[:4] + found[5:] == saved and seen[2:] == ["00b0", "0080"]


CHECKS: dict[str, Callable[[list[str], Path], bool]] = {
    check.__name__: check
    for check in (differ, equal, report_mac, report_mac_differs, report_identity, pattern, gprs)
}
