"""A SIGSTRUCT for the test enclave of tests/sim/c, which EINIT of a processor wants to see.

The harness adds the pages without EEXTEND, so MRENCLAVE is that of the layout: it does not change
with the code, and the masks let a test choose ATTRIBUTES, XFRM and MISCSELECT.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from sgxs_writer import REG, TCS, R, Stream, W, X, sign

PAGE = 4096


def layout() -> dict[str, int]:
    """The numbers of enclave.h."""
    text = (Path(__file__).parent / "c" / "enclave.h").read_text()
    return {name: int(value, 0) for name, value in re.findall(r"^#define (\w+) (\w+)", text, re.MULTILINE)}


def sigstruct() -> bytes:
    """Sign the layout with a key made on the spot."""
    at = layout()
    data_end = at["SSA"] + at["TCS_COUNT"] * at["SSA_STRIDE"]
    stream = Stream(size=at["SIZE"])
    for offset in range(at["CODE"], at["CODE"] + at["CODE_SIZE"], PAGE):
        stream.page(offset, REG | R | X)
    for offset in range(at["DATA"], data_end, PAGE):
        stream.page(offset, REG | R | W)
    for index in range(at["TCS_COUNT"]):
        stream.page(at["TCS"] + index * PAGE, TCS)
    return sign(stream.mrenclave(), attribute_mask=0, attributes=0, xfrm=0, xfrm_mask=0, misc_mask=0)
