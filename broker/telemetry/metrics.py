"""The broker's statistics as metrics, with names and units as Prometheus has them.

Nothing is counted here: every number is read from the ``statistics()`` of the parts when somebody asks.  They
are read in the thread that serves clients, which is a matter of microseconds for each enclave; whatever takes
longer, families and text, is made of that reading in another thread.
What users can choose makes no label without a bound: enclaves that the policy does not name are added up
once there are many, denials are counted by kind, and nothing is told apart by process or control group
(`teemate slots` and `teemate usage` do that).  No key, token or content of a message is in any statistic.

Imported by who serves them (metrics_server.py) and by nothing else, since prometheus-client is large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple, final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from teemate.broker.enclaves.enclave import EnclaveState
from teemate.broker.enclaves.epc import epc_bytes
from teemate.broker.telemetry.durations import DurationStatistics

if TYPE_CHECKING:
    from teemate.broker.enclaves.enclave import Enclave, EnclaveStatistics
    from teemate.broker.enclaves.generations import GenerationStatistics
    from teemate.broker.policy.reloading import ReloadingStatistics
    from teemate.broker.policy.rules import DenialReason
    from teemate.broker.restart.resumption import ResumptionStatistics
    from teemate.broker.restart.state import StateStatistics
    from teemate.broker.service import ServerStatistics, Service
    from teemate.broker.slots.intruders import IntruderStatistics
    from teemate.broker.slots.revocation import RevocationStatistics

__all__ = ["NAMED_ENCLAVES", "OTHERS", "Collected", "Reading", "families", "read", "render"]

NAMED_ENCLAVES = 100
"""So many enclaves have a name in the metrics, those of the policy first."""
OTHERS = "(others)"
_SLOT_STATES = ("free", "assigned", "arming", "withheld", "quarantined")
_VERSION = version("teemate")


class _Pages(NamedTuple):
    """What an enclave, or an old generation of one, takes."""

    name: str
    owner: int
    backend: str
    pages: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What all parts said at one moment; nothing of it changes any more."""

    backend: str
    started_at: float
    state: StateStatistics
    resumption: ResumptionStatistics
    reloading: ReloadingStatistics
    clients: int
    grants: int
    server: ServerStatistics | None
    refused: dict[str, int]
    denied: dict[tuple[str, DenialReason], int]
    attaches: DurationStatistics
    enclaves: tuple[tuple[_Pages, EnclaveStatistics], ...]
    retired: tuple[_Pages, ...]
    in_policy: frozenset[str]
    revocations: RevocationStatistics
    generations: GenerationStatistics
    intruders: IntruderStatistics


def _pages(enclave: Enclave) -> _Pages:
    return _Pages(enclave.name, enclave.policy.owner, enclave.backend, enclave.built.pages)


def read(service: Service) -> Reading:
    """Read every part's statistics; waits for nothing."""
    service.attendant.settle()
    return Reading(
        backend=service.backend,
        started_at=service.started_at,
        state=service.state.statistics(),
        resumption=service.resumption.statistics(),
        reloading=service.reloading.statistics(),
        clients=len(service.clients),
        grants=len(service.grants),
        server=service.server_statistics() if service.server_statistics is not None else None,
        refused=service.ledger.refusals(),
        denied=dict(service.audit.denied_by),
        attaches=service.granting.statistics().attaches,
        enclaves=tuple((_pages(enclave), enclave.statistics()) for enclave in service.enclaves.values()),
        retired=tuple(map(_pages, service.generations.retired)),
        in_policy=frozenset(policy.name for policy in service.policy.enclaves),
        revocations=service.revocation.statistics(),
        generations=service.generations.statistics(),
        intruders=service.intruders.statistics(),
    )


@final
class Collected:
    """Families of one reading, as the encoders want them."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return them."""
        return self._families


def families(reading: Reading) -> Collected:
    """Make the metrics of a reading; not in the thread that serves clients."""
    return Collected([*_broker(reading), *_clients(reading), *_enclaves(reading), *_ends(reading)])


def render(reading: Reading, accept: str) -> tuple[bytes, str]:
    """Return the text in the format that `accept` asks for, OpenMetrics or the older one, and its type."""
    encoder, content_type = choose_encoder(accept)
    return encoder(families(reading)), content_type


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _counters(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in values:
        family.add_metric([key], value)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _add_durations(family: HistogramMetricFamily, labels: list[str], found: DurationStatistics) -> None:
    buckets: list[tuple[str, float]] = []
    so_far = 0
    bounds = [repr(float(bound)) for bound in found.bounds]
    for bound, count in zip([*bounds, "+Inf"], found.counts, strict=True):
        so_far += count
        buckets.append((bound, so_far))
    family.add_metric(labels, buckets, sum_value=found.total)


# ---- the broker itself ------------------------------------------------------------------------


def _broker(reading: Reading) -> Iterator[Metric]:
    info = {"version": _VERSION, "backend": reading.backend}
    yield InfoMetricFamily("teemate_broker", "The version, and the backend of new enclaves.", value=info)
    yield _gauge(
        "teemate_broker_start_time_seconds", "When this broker process started, in Unix time.",
        reading.started_at,
    )  # fmt: skip
    yield _counter(
        "teemate_broker_starts", "Brokers that were started over the state that is kept, this one included.",
        reading.state.starts,
    )  # fmt: skip
    resumption = reading.resumption
    yield _counter(
        "teemate_grants_resumed", "Grants that went on after a restart of the broker.", resumption.grants
    )
    yield _counters(
        "teemate_clients_suspended", "What became of clients that the last broker had, so far.", "outcome",
        [("resumed", resumption.resumed), ("ended", resumption.ended), ("expired", resumption.expired)],
    )  # fmt: skip
    yield _gauge(
        "teemate_clients_to_resume", "Clients that have not come back after a restart yet.",
        resumption.suspended,
    )  # fmt: skip
    reloading = reading.reloading
    yield _counters(
        "teemate_policy_reloads", "Policies that were read again, taken or refused.", "outcome",
        [("taken", reloading.taken), ("refused", reloading.refused)],
    )  # fmt: skip
    epc = epc_bytes()
    if epc is not None:
        yield _gauge("teemate_host_epc_bytes", "Enclave memory (EPC) of this host.", epc)


# ---- clients ------------------------------------------------------------------------------------


def _clients(reading: Reading) -> Iterator[Metric]:
    yield _gauge("teemate_clients", "Processes that are connected.", reading.clients)
    yield _gauge("teemate_grants", "Grants that are held.", reading.grants)
    server = reading.server
    if server is not None:
        turned_away = server.door.turned_away if server.door is not None else 0
        waiting = server.door.waiting if server.door is not None else 0
        outcomes = [("accepted", server.accepted), ("refused", server.refused), ("turned_away", turned_away)]
        yield _counters("teemate_connections", "Connections, by what became of them.", "outcome", outcomes)
        yield _counter(
            "teemate_protocol_breaches", "Connections that ended since the client broke the protocol.",
            server.breaches,
        )  # fmt: skip
        yield _gauge("teemate_connections_waiting", "Connections that wait to be let in.", waiting)
    yield _counters(
        "teemate_limit_refusals", "How often each key of [limits] said no to a user.", "limit",
        reading.refused.items(),
    )  # fmt: skip
    denials = CounterMetricFamily(
        "teemate_denials",
        "What the policy did not allow, by operation and kind of the missing rule.",
        labels=["operation", "reason"],
    )
    for (operation, reason), count in sorted(
        reading.denied.items(), key=lambda item: (item[0][0], item[0][1].value)
    ):
        denials.add_metric([operation, reason.value], count)
    yield denials
    attach = HistogramMetricFamily(
        "teemate_attach_duration_seconds",
        "Attaches that succeeded, from when the request was read until its reply was sent.",
        labels=[],
    )
    _add_durations(attach, [], reading.attaches)
    yield attach


# ---- enclaves -----------------------------------------------------------------------------------


@final
class _Sums:
    """Values by labels; what comes twice under the same is added up."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def add(self, labels: tuple[str, ...], value: float) -> None:
        self.values[labels] = self.values.get(labels, 0) + value


def _named(reading: Reading) -> dict[str, tuple[str, str]]:
    """Return each enclave's label and its owner's: of `NAMED_ENCLAVES` their own, of the rest one for all."""
    known = reading.in_policy
    owners = {pages.name: pages.owner for pages, _ in reading.enclaves}
    names = sorted(owners, key=lambda name: (name not in known, name))
    labels = {name: (name, str(owners[name])) for name in names[:NAMED_ENCLAVES]}
    return labels | dict.fromkeys(names[NAMED_ENCLAVES:], (OTHERS, OTHERS))


def _enclaves(reading: Reading) -> Iterator[Metric]:
    labels = _named(reading)
    slots, waiting, attaches, repairs, recycled, wardens, held, generations = (_Sums() for _ in range(8))
    pages = _Sums()
    states = dict.fromkeys((state.value for state in EnclaveState), 0)
    waits: dict[str, DurationStatistics] = {}
    for taken, found in reading.enclaves:
        name, owner = labels[taken.name]
        states[found.state] += 1
        for state in _SLOT_STATES:
            slots.add((name, state), getattr(found.slots, state))
        waiting.add((name,), found.slots.waiting)
        held.add((name,), found.slots.held_seconds)
        attaches.add((name,), found.attaches)
        repairs.add((name,), found.repaired)
        recycled.add((name,), found.recycled)
        pages.add((name, owner, taken.backend), taken.pages)
        generations.add((name,), found.generation)
        if found.warden is not None:
            for outcome in ("started", "killed", "failed"):
                wardens.add((name, outcome), getattr(found.warden, outcome))
        waits[name] = _together(waits.get(name), found.waits)
    for taken in reading.retired:
        name, owner = labels.get(taken.name, (OTHERS, OTHERS))
        pages.add((name, owner, taken.backend), taken.pages)
    yield _gauges("teemate_enclaves", "Enclaves by state.", ("state",), {(k,): v for k, v in states.items()})
    yield _gauges(
        "teemate_epc_pages", "Pages of 4096 bytes of each enclave, those of old generations with them.",
        ("enclave", "owner", "backend"), pages.values,
    )  # fmt: skip
    yield _gauges("teemate_slots", "Slots by state.", ("enclave", "state"), slots.values)
    yield _gauges(
        "teemate_slot_requests_waiting", "Requests that wait for slots.", ("enclave",), waiting.values
    )
    wait = HistogramMetricFamily(
        "teemate_slot_wait_seconds",
        "How long requests waited for slots that were not free, also in vain.",
        labels=["enclave"],
    )
    for name, durations in waits.items():
        _add_durations(wait, [name], durations)
    yield wait
    named = (
        ("teemate_slot_held_seconds", "Slot time: from each assignment until the slot was back.", held),
        ("teemate_attaches", "Attaches that succeeded.", attaches),
        ("teemate_slot_repairs", "Slots that came back with a call in them and were repaired.", repairs),
        ("teemate_slots_recycled", "Slots that came back and were armed anew.", recycled),
    )
    for metric, text, sums in named:
        yield _counters(metric, text, "enclave", [(key, value) for (key,), value in sums.values.items()])
    family = CounterMetricFamily(
        "teemate_wardens", "Wardens that were started, killed, or failed.", labels=["enclave", "outcome"]
    )
    for key, value in wardens.values.items():
        family.add_metric(list(key), value)
    yield family
    yield _gauges(
        "teemate_enclave_generation", "How often it was built, of others than named ones together.",
        ("enclave",), generations.values,
    )  # fmt: skip


def _gauges(name: str, text: str, labels: tuple[str, ...], values: dict[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


def _together(one: DurationStatistics | None, other: DurationStatistics) -> DurationStatistics:
    if one is None:
        return other
    return DurationStatistics(
        bounds=one.bounds,
        counts=tuple(a + b for a, b in zip(one.counts, other.counts, strict=True)),
        total=one.total + other.total,
    )


# ---- what was taken back, and what went wrong ---------------------------------------------------


def _ends(reading: Reading) -> Iterator[Metric]:
    revoked = reading.revocations
    yield _counters(
        "teemate_revocations", "Revoked grants, by how their holders took it.", "outcome",
        revoked.outcomes.items(),
    )  # fmt: skip
    yield _counters(
        "teemate_revoked_slots", "Slots of revoked grants, by what became of them.", "outcome",
        [(how, getattr(revoked, how)) for how in ("cleared", "quarantined", "leaked", "busy")],
    )  # fmt: skip
    yield _counter("teemate_clients_killed", "Clients that did not give a revoked grant up.", revoked.killed)
    yield _gauge(
        "teemate_leaked_mappings", "Revoked grants whose holder lives and can map the slots still.",
        revoked.mapped,
    )  # fmt: skip
    generations = reading.generations
    yield _counters(
        "teemate_enclave_rebuilds", "Next generations that were built, failed, or were given up.", "outcome",
        [
            ("rebuilt", generations.rebuilt),
            ("failed", generations.failed),
            ("given_up", generations.given_up),
        ],
    )  # fmt: skip
    intruders = reading.intruders
    yield _counters(
        "teemate_intrusions", "Entries into a warden's slot, and calls that another process resumed.", "kind",
        [("contended", intruders.contended), ("stolen", intruders.stolen)],
    )  # fmt: skip
