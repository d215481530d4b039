"""The broker's log: one record per line, for people or for programs.

Audit records say who got what, who was refused by which missing rule, and what was taken back.
No record ever holds a key, a MAC or a client's data; what clients sent is not repeated, except
names that were validated.  While all goes well, only audit records and clients that misbehave
are logged, so that the log of a busy host stays readable and writing it costs little.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import TextIO, cast, final

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from teemate.broker.connections.identity import Identity
from teemate.broker.policy.limits import TokenBucket
from teemate.broker.policy.rules import DenialReason, Missing
from teemate.broker.telemetry.journal import Journal, is_journal, render
from teemate.broker.telemetry.log_file import LogFile

__all__ = ["Audit", "Complaints", "Denial", "configure_log"]


def configure_log(
    style: str, file: TextIO | LogFile | None = None, journal: Journal | None = None
) -> FilteringBoundLogger:
    """Return the logger; `style` is "json", "text", "journal", or "auto": the last where there is one."""
    out = file or sys.stderr
    if style == "auto":
        ours = file is None or isinstance(file, LogFile)
        style = "journal" if ours and is_journal(out.fileno()) else "text"
    if style == "journal":
        return _wrap(
            journal or Journal(),
            [structlog.processors.add_log_level, structlog.processors.format_exc_info, render],
        )
    renderer: Processor
    if style == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=out.isatty())
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(
            structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        )
        if style == "json"
        else structlog.processors.format_exc_info,
        renderer,
    ]
    return _wrap(structlog.WriteLogger(cast("TextIO", out)), processors)


def _wrap(sink: object, processors: list[Processor]) -> FilteringBoundLogger:
    logger: FilteringBoundLogger = structlog.wrap_logger(
        sink,
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(20),
        context_class=dict,
    ).bind()
    return logger


_COMPLAINTS_PER_SECOND = 1.0
_COMPLAINTS_AT_ONCE = 100
_USERS_COMPLAINED_OF = 1024


@final
class Complaints:
    """Warnings about clients that misbehave: some of each user, the rest is counted.

    Who is refused a hundred times a second shall not fill the log as well.
    """

    def __init__(self, log: FilteringBoundLogger) -> None:
        self._log = log
        self._users: dict[int | None, tuple[TokenBucket, list[int]]] = {}

    def warning(self, event: str, uid: int | None, **about: object) -> None:
        """Log `event`, unless there was too much of this user; uid None: nobody is to blame."""
        if uid not in self._users and len(self._users) >= _USERS_COMPLAINED_OF:
            del self._users[next(iter(self._users))]
        bucket, unlogged = self._users.setdefault(
            uid, (TokenBucket(_COMPLAINTS_PER_SECOND, _COMPLAINTS_AT_ONCE), [0])
        )
        if not bucket.take_if_there():
            unlogged[0] += 1
            return
        if unlogged[0]:
            about["not_logged_before"], unlogged[0] = unlogged[0], 0
        if uid is not None:
            about["uid"] = uid
        self._log.warning(event, **about)


_DENIALS_REMEMBERED = 256


@final
@dataclass(slots=True)
class Denial:
    """Denials that are alike: who, where, what and why; `pid` is the last one's."""

    uid: int
    cgroup: str
    operation: str
    rule: str
    pid: int
    count: int
    at: float
    """When the last one was, by the monotonic clock."""


class Audit:
    """Records of decisions; every record has ``audit`` and says whom it is about."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        self._log = log
        self.granted_count = 0
        self.denied_count = 0
        self.revoked_count = 0
        self.denied_by: Counter[tuple[str, DenialReason]] = Counter()
        """Denials by operation and reason."""
        self.recent_denials: dict[tuple[int, str, str, str], Denial] = {}
        """The newest last, for who asks without a log at hand."""

    def granted(self, identity: Identity, *, client: int, enclave: str, grant: int, slots: list[int]) -> None:
        """Slots were handed out, with a new grant or for an old one."""
        self.granted_count += 1
        self._log.info(
            "granted", audit="grant", client=client, pid=identity.pid, uid=identity.uid, gid=identity.gid,
            cgroup=identity.cgroup_text, enclave=enclave, grant=grant, slots=slots,
        )  # fmt: skip

    def ended(self, identity: Identity, *, client: int, enclave: str, grant: int, why: str) -> None:
        """A grant is over."""
        self._log.info(
            "grant ended", audit="end", client=client, pid=identity.pid, uid=identity.uid, enclave=enclave,
            grant=grant, why=why,
        )  # fmt: skip

    def denied(self, identity: Identity, *, client: int, operation: str, missing: Missing) -> None:
        """The policy has no rule that allows it."""
        self.denied_count += 1
        self.denied_by[operation, missing.reason] += 1
        self._remember(identity, operation, missing.rule)
        self._log.warning(
            "denied", audit="denial", client=client, pid=identity.pid, uid=identity.uid, gid=identity.gid,
            groups=sorted(identity.groups), label=identity.label, cgroup=identity.cgroup_text,
            operation=operation, missing_rule=missing.rule,
        )  # fmt: skip

    def _remember(self, identity: Identity, operation: str, rule: str) -> None:
        key = (identity.uid, identity.cgroup_text, operation, rule)
        before = self.recent_denials.pop(key, None)
        count = 1 if before is None else before.count + 1
        self.recent_denials[key] = Denial(*key, identity.pid, count, time.monotonic())
        if len(self.recent_denials) > _DENIALS_REMEMBERED:
            del self.recent_denials[next(iter(self.recent_denials))]

    def revoked(
        self, identity: Identity, *, client: int, enclave: str, grant: int, by: str, why: str
    ) -> None:
        """A grant was taken back."""
        self.revoked_count += 1
        self._log.warning(
            "revoked", audit="revocation", client=client, pid=identity.pid, uid=identity.uid, enclave=enclave,
            grant=grant, by=by, why=why,
        )  # fmt: skip

    def changed(self, identity: Identity, *, client: int, operation: str, enclave: str) -> None:
        """An administrator made or destroyed an enclave."""
        self._log.info(
            "changed", audit="change", client=client, pid=identity.pid, uid=identity.uid, operation=operation,
            enclave=enclave,
        )  # fmt: skip
