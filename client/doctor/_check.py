"""What a look at the host gives: frozen values, for the text and the JSON alike."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

__all__ = ["SCHEMA", "Check", "Diagnosis", "Group", "Status"]

SCHEMA = 1
"""Of the JSON: raised when something that was there means something else or is gone."""


class Status(enum.Enum):
    """How a check came out; the values are those of the JSON."""

    OK = "ok"
    WARNING = "warning"
    """Works, with a limit or a risk that `found` names."""
    PROBLEM = "problem"
    """Something does not work because of this."""
    UNKNOWN = "unknown"
    """Could not be looked at, or the kernel does not tell."""
    NOT_APPLICABLE = "not-applicable"
    """Not on this host, or another check has said already why."""


class Group(enum.Enum):
    """What a check is about."""

    SGX = "sgx"
    SIM = "sim"
    HOST = "host"
    """Both backends."""
    BROKER = "broker"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at.

    `id` is for programs and does not change.  `advice` says what to do, in the imperative; it is
    there for every problem.
    """

    id: str
    title: str
    group: Group
    status: Status
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, object]:
        """Return it as the JSON has it."""
        return {
            "id": self.id,
            "title": self.title,
            "group": self.group.value,
            "status": self.status.value,
            "found": self.found,
            "advice": self.advice,
        }


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All of it.

    `backends` says of each whether an enclave could be created, mapped, entered and left.  `auto`
    is the backend that "auto" takes here, `auto_reason` why that is not sgx.
    """

    backends: Mapping[str, bool]
    auto: str
    auto_reason: str = ""
    checks: tuple[Check, ...] = field(default=())

    @property
    def good(self) -> bool:
        """Whether at least one backend works."""
        return any(self.backends.values())

    def check(self, identifier: str) -> Check:
        """Return the check of that id; KeyError when there is none."""
        for check in self.checks:
            if check.id == identifier:
                return check
        raise KeyError(identifier)

    def as_json(self) -> dict[str, object]:
        """Return it as `teemate doctor --json` prints it (see ``teemate.doctor``)."""
        return {
            "schema": SCHEMA,
            "backends": dict(self.backends),
            "auto": self.auto,
            "auto_reason": self.auto_reason,
            "checks": [check.as_json() for check in self.checks],
        }
