"""Cases for runner.c that nobody thought of, the same for the same seed.

What they do to a caller is not known; two backends must agree on it.  So they keep to what both
show: no keys, no SSA frames (interrupts write them), no busy TCSs, and no reads of a page that may
only be executed (a host without protection keys has no such mapping for the sim).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

#: Without those whose SSA is a page of data: interrupts write there, at any time.
TCSS = ["t0", "t1", "t_one", "t_none", "newtcs", "t_entry", "t_ssa_hole"]
DATA = ["data", "data2", "ro", "dump", "rwx", "notcs", "newtcs", "hole", "hole+4096"]
PAGES = [*DATA, "rx", "xo", "badtcs", "t1", "t_one", "unmapped", "end-4096"]
OPERANDS = [*PAGES, *PAGES, "host", "end", "data+64", "data+8", "hole-64"]
RETURNS = ["rx", "xo", "rwx", "hole"]
REG, TCS, TRIM = 2, 1, 4

Draw = random.Random


def _secinfo(draw: Draw) -> str:
    """SECINFO.FLAGS, most of them what one of the leaves takes."""
    page_type = draw.choice([REG, REG, REG, REG, TCS, TRIM, TRIM, draw.randrange(8)])
    state = {REG: [0x00, 0x08, 0x20, 0x28], TCS: [0x10], TRIM: [0x10]}.get(page_type, [0])
    bits = draw.choice([*state, *state, draw.randrange(8) << 3])
    rwx = 0 if page_type in (TCS, TRIM) and draw.random() < 0.8 else draw.choice([0, 1, 2, 3, 3, 3, 4, 5, 7])
    flags = page_type << 8 | bits | rwx
    if draw.random() < 0.05:
        flags ^= 1 << draw.randrange(6, 64)
    return flags.to_bytes(8, "little").hex()


def _leaf(draw: Draw) -> str:
    name = draw.choice(["eaccept", "eaccept", "eaccept", "emodpe", "emodpe", "eacceptcopy", "eacceptcopy"])
    secinfo = "data" if draw.random() < 0.85 else draw.choice(OPERANDS)
    target = draw.choice(PAGES) if draw.random() < 0.85 else draw.choice(OPERANDS)
    source = draw.choice(PAGES) if draw.random() < 0.85 else draw.choice(OPERANDS)
    return f"poke data {_secinfo(draw)}; enclu {name} rbx={secinfo} rcx={target} rdx={source}"


def _accepted(draw: Draw) -> str:
    """A change of the EPCM with the EACCEPT that goes with it."""
    page = draw.choice(DATA)
    rwx = draw.choice([0, 1, 3, 5, 7])
    accept = f"enclu eaccept rbx=data rcx={page}"
    return draw.choice(
        [
            f"read {page}; poke data 0b02000000000000; {accept}",
            f"restrict {page} 0x1000 {rwx}; poke data 2{rwx}02000000000000; {accept}",
            f"types {page} 0x1000 4; poke data 1004000000000000; {accept}; remove {page} 0x1000",
            "types newtcs 0x1000 1; poke data 1001000000000000; enclu eaccept rbx=data rcx=newtcs; "
            "enter newtcs",
        ]
    )


def _ioctl(draw: Draw) -> str:
    page = draw.choice([*PAGES, "ssa2", "ssa3"])
    size = draw.choice(["0x1000", "0x1000", "0x1000", "0x2000", "0", "0x800"])
    verb = draw.choice(["restrict", "types", "remove"])
    argument = {"restrict": draw.randrange(9), "types": draw.choice([1, 4, 4, 2, 0]), "remove": ""}[verb]
    return f"{verb} {page} {size} {argument}"


def _access(draw: Draw) -> str:
    if draw.random() < 0.3:
        return f"exec {draw.choice(RETURNS)}"
    pages = [page for page in [*PAGES, "host"] if page != "xo"]
    offset = draw.choice(["", "+1", "+4095"])
    return f"{draw.choice(['read', 'write'])} {draw.choice(pages)}{offset}"


def _entry(draw: Draw) -> str:
    return draw.choice(
        [
            f"enter {draw.choice(TCSS)}",
            f"resume {draw.choice(TCSS)}",
            f"via {draw.choice(OPERANDS)}",
            f"via {draw.choice(OPERANDS)} resume",
            f"fault {draw.choice(['ud', 'de', 'gp'])} tcs={draw.choice(['t0', 't1', 't_one'])}",
            "state tcs=t1",
        ]
    )


def _report(draw: Draw) -> str:
    good = ["data", "data2", "dump"]
    output = ["dump", "unmapped", "host", "t1", "ro", "dump+8", "data+8"]  # where nobody peeks
    rbx, rcx = (draw.choice(good if draw.random() < 0.8 else OPERANDS) for _ in range(2))
    rdx = "dump" if draw.random() < 0.8 else draw.choice(output)
    if draw.random() < 0.5:
        return f"enclu ereport rbx={rbx} rcx={rcx} rdx={rdx}"
    name = draw.choice([0, 1, 2, 3, 4, 4, 4, 5, 255])
    fields = ["", "", f"; poke data+{draw.randrange(2, 80)} 01", f"; poke data+{draw.randrange(80, 512)} 80"]
    return f"poke data {name:02x}00{draw.choice(fields)}; enclu egetkey rbx={rbx} rcx={rdx}"


def _peek(draw: Draw) -> str:
    return f"peek {draw.choice(['data2', 'hole', 'notcs', 'rwx', 'ro'])}+{draw.choice([0, 8, 4088])} 8 tcs=t1"


STEPS: list[tuple[Callable[[Draw], str], int]] = [
    (_leaf, 6),
    (_accepted, 5),
    (_ioctl, 4),
    (_access, 5),
    (_entry, 3),
    (_report, 1),
    (_peek, 1),
]


def case(seed: int) -> str:
    """One case.  Its TCSs are entered first: mapping a page that is a TCS no more is no case of this."""
    draw = random.Random(seed)
    start = draw.choice(["create", "create", "create sig=exinfo", "create debug=1"])
    makers, weights = zip(*STEPS, strict=True)
    chosen = draw.choices(makers, weights, k=draw.randrange(4, 11))
    entered = "; ".join(f"enter {name}" for name in TCSS if name != "newtcs")
    return "; ".join([start, entered, *(maker(draw) for maker in chosen)])


def comparable(seen: str) -> str:
    """What both backends show: of a page fault by the mapping, whether the kernel had filled in the page
    table before (the bit P) is its own business."""

    def without_present(match: re.Match[str]) -> str:
        code = int(match[1], 16)
        return f"#PF({code if code & 0x8000 else code & ~1:#x})"

    return re.sub(r"#PF\((0x[0-9a-f]+)\)", without_present, seen)
