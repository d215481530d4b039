"""What a storm came to."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["StormFigures"]


class StormFigures(NamedTuple):
    """The result of one storm; the names are those of its JSON."""

    seed: int
    seconds: float
    client_kills: int
    client_kills_inside: int
    """Of programs that had a call in the enclave: on a processor, interrupted, or in an OCALL."""
    kills_by_state: dict[str, int]
    slots_repaired: int
    """In which a call was found and undone."""
    slots_lost: int
    """That were neither free nor in quarantine when everybody had left."""
    slots_quarantined: int
    quarantined_with_reason: int
    wrong_values: int
    counter_expected: int
    """Increments that were done, by the journals of those who did them."""
    counter: int
    broker_kills: int
    failed_calls: int
    repeated_calls: int
    """That the enclave or the broker did more than once."""
    lost_grants: int
    resume_ms_p50: float | None
    """From the kill of a broker to the next new attach; None when none was killed."""
    warden_kills: int = 0
    keeper_kills: int = 0
    errors: tuple[str, ...] = ()
    """The first few things that went wrong, for people."""

    @property
    def good(self) -> bool:
        """Whether nothing was lost."""
        return (
            not self.slots_lost
            and self.slots_quarantined == self.quarantined_with_reason
            and not self.wrong_values
            and self.counter == self.counter_expected
            and not self.failed_calls
            and not self.repeated_calls
            and not self.lost_grants
        )

    def as_json(self) -> dict[str, object]:
        """Return it for json.dumps; kills of wardens and keepers are there when some were asked for."""
        value: dict[str, object] = self._asdict()
        del value["errors"]
        for key in ("warden_kills", "keeper_kills"):
            if not value[key]:
                del value[key]
        return value
