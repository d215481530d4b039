"""What the demonstration measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Figures", "Quantiles", "quantiles"]


class Quantiles(NamedTuple):
    """Of times in milliseconds."""

    p50: float
    p99: float


def quantiles(values: Sequence[float]) -> Quantiles:
    """Return the quantiles of `values`, each a value that was measured (nearest rank)."""
    ordered = sorted(values)

    def rank(percent: int) -> float:
        return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]

    return Quantiles(round(rank(50), 3), round(rank(99), 3))


class Figures(NamedTuple):
    """The result of one run; times are milliseconds, pages have 4096 bytes."""

    backend: str
    image: str
    mrenclave: str
    clients: int
    calls: int
    """That each program was asked to do in the shared enclave."""
    calls_total: int
    """That were done, both ways."""
    failures: int
    counter_expected: int
    """Increments that the programs were told had succeeded."""
    counter: int
    """What the enclave says afterwards."""
    attach_ms: Quantiles
    """From before connect() to the first reply from inside."""
    conventional_ms: Quantiles
    """From before opening the image to the first reply from inside."""
    floor_ms: Quantiles
    """To allocate and touch the same pages and hash the same bytes, and nothing else."""
    latency_ratio: float
    epc_pages_shared: int
    epc_pages_conventional: int
    memory_ratio: float
    pss_mib_shared: float
    pss_mib_conventional: float
    heap_bytes: int
    errors: tuple[str, ...]
    """The first few failures."""
    private_counters_match: bool
    """Whether each private enclave counted what its program was told."""
    seconds: float

    @property
    def good(self) -> bool:
        """Whether nothing failed and every counter is right."""
        return not self.failures and self.counter == self.counter_expected and self.private_counters_match

    def as_json(self) -> dict[str, object]:
        """Return it for json.dumps."""
        return {
            key: value._asdict() if isinstance(value, Quantiles) else value
            for key, value in self._asdict().items()
        }
