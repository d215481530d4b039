"""How much enclave memory (EPC) this host has, and what the broker's enclaves take of it.

Linux lends out more EPC than there is: what does not fit is encrypted and swapped out page by page, which
works and is slow.  Nobody tells a process how much is free, so all that can be said is whether the
broker's own enclaves fit.
"""

from __future__ import annotations

from pathlib import Path

from structlog.typing import FilteringBoundLogger

from teemate._sizes import format_size

__all__ = ["epc_bytes", "warn_when_full"]

_NODES = Path("/sys/devices/system/node")
_PAGE = 4096


def epc_bytes(nodes: Path = _NODES) -> int | None:
    """Return the EPC of all NUMA nodes in bytes; None where the kernel does not tell (before 5.17)."""
    total = 0
    for file in nodes.glob("node*/x86/sgx_total_bytes"):
        try:
            total += int(file.read_text())
        except (OSError, ValueError):
            return None
    return total or None


def warn_when_full(log: FilteringBoundLogger, *, enclave: str, pages: int, others: int) -> None:
    """Log that `pages` of a new enclave and those of `others` are more than the host has, when they are."""
    total = epc_bytes()
    if total is None or (pages + others) * _PAGE <= total:
        return
    log.warning(
        "enclaves are larger than the EPC: the kernel swaps their pages, which is slow; destroy enclaves,"
        " build images with less --heap, or give SGX more memory in the firmware",
        enclave=enclave,
        size=format_size(pages * _PAGE),
        others=format_size(others * _PAGE),
        epc=format_size(total),
    )
