"""All checks in their order, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from teemate.doctor._check import Check, Diagnosis, Group, Status
from teemate.doctor._container import check_container
from teemate.doctor._driver import (
    check_device,
    check_exec,
    check_fsgsbase,
    check_kernel,
    check_provision,
    check_vdso,
)
from teemate.doctor._host import BrokerAnswer, Choice, Host, ProbeResult
from teemate.doctor._memory import check_epc, check_memory, check_window, check_xsave
from teemate.doctor._processor import (
    Processor,
    check_firmware,
    check_launch_control,
    check_processor,
    check_sgx2,
)
from teemate.doctor._service import ask, check_holders, check_socket, check_unit, socket_path

__all__ = ["diagnose", "this_host", "why_not_sgx"]

BACKENDS = ("sgx", "sim")


def this_host() -> Host:
    """Return the host that this process runs on."""
    from teemate.doctor._machine import ThisMachine  # late: tests of other hosts need no libteemate

    return Host(ThisMachine())


def diagnose(host: Host | None = None, *, socket: str | None = None) -> Diagnosis:
    """Look at everything.  Takes a second or two, changes nothing, and needs no rights.

    Parameters
    ----------
    host
        None: the one that this process runs on.
    socket
        Of the broker; None takes ``TEEMATE_SOCKET``, else ``/run/teemate/broker.sock``.

    """
    host = this_host() if host is None else host
    path = socket_path(host, socket)
    processor = Processor.of(host)
    choices = {name: host.machine.choose(name) for name in (*BACKENDS, "auto")}
    # What libteemate would not even try needs no trial: its reason is the answer.
    trials = host.machine.probe([name for name in BACKENDS if choices[name].backend])
    works = {name: name in trials and trials[name].works for name in BACKENDS}
    broker = ask(host, path)
    checks = (
        *_sgx_checks(host, processor, broker),
        _works("sgx", Group.SGX, choices, trials),
        check_xsave(host),
        check_memory(host),
        _works("sim", Group.SIM, choices, trials),
        *_host_checks(host),
        check_container(host),
        check_socket(host, path, broker),
        check_unit(host),
        check_holders(host, broker),
    )
    auto = choices["auto"].backend or ""
    reason = "" if auto == "sgx" else _sgx_reason(checks, choices["sgx"].reason)
    return Diagnosis(backends=works, auto=auto, auto_reason=reason, checks=checks)


def _sgx_checks(host: Host, processor: Processor, broker: BrokerAnswer) -> tuple[Check, ...]:
    """In the order in which one thing needs the other: the first problem is the reason."""
    return (
        check_processor(processor),
        check_firmware(host, processor),
        check_launch_control(host, processor),
        check_sgx2(processor),
        check_kernel(host, processor),
        check_device(host),
        check_exec(host),
        check_vdso(host),
        check_epc(host, processor, broker),
        check_provision(host),
    )


def _host_checks(host: Host) -> tuple[Check, ...]:
    return (check_fsgsbase(host), check_window(host))


def _works(
    name: str, group: Group, choices: Mapping[str, Choice], trials: Mapping[str, ProbeResult]
) -> Check:
    trial = trials.get(name)
    status, advice = Status.OK, ""
    found = f"not tried: {choices[name].reason}" if trial is None else trial.text
    if trial is None or not trial.works:
        status, advice = Status.PROBLEM, "mend what the other checks name"
        if trial is not None and choices["auto"].backend == name:
            others = [other for other, result in trials.items() if result.works]
            advice += '; until then "auto" takes this backend and fails'
            advice += f': say backend = "{others[0]}"' if others else ""
    return Check(
        id=f"{name}-works", title="an enclave runs", group=group, status=status, found=found, advice=advice
    )


def _sgx_reason(checks: Sequence[Check], reason: str) -> str:
    """One sentence: the first problem and what to do, else what libteemate says."""
    for check in checks:
        if (
            check.group in (Group.SGX, Group.HOST)
            and check.status is Status.PROBLEM
            and check.id != "sgx-works"
        ):
            return f"{check.title}: {check.found}; {check.advice}"
    return reason


def why_not_sgx(reason: str = "", host: Host | None = None) -> str:
    """Return why this host has no backend sgx, and what to do: for whoever refuses to go on without.

    `reason` is what libteemate said; it counts where the checks find nothing wrong.  Nothing is run
    for it, so it takes some milliseconds.
    """
    host = this_host() if host is None else host
    checks = (*_sgx_checks(host, Processor.of(host), BrokerAnswer()), *_host_checks(host))
    return _sgx_reason(checks, reason) + " (`teemate doctor` shows all)"
