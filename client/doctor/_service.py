"""The broker: its socket, its unit, and enclaves that live without it."""

from __future__ import annotations

import errno
import os
import stat
import time

from teemate._sizes import format_size
from teemate.doctor._check import Check, Group, Status
from teemate.doctor._container import container_signs
from teemate.doctor._host import BrokerAnswer, Host, Mapping
from teemate.doctor._memory import WINDOW_SIZE, WINDOW_START

__all__ = ["DEFAULT_SOCKET", "ask", "check_holders", "check_socket", "check_unit", "socket_path"]

DEFAULT_SOCKET = "/run/teemate/broker.sock"
_WARDEN = "teemate-warden"
UNIT = "teemate-broker.service"
_UNIT_FOLDERS = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)
_START = "start it: teemate-broker --config broker.toml (or the unit, where it is installed)"
_ELSEWHERE = "set TEEMATE_SOCKET to the broker's socket"
_SEARCH_TIME = 0.5
"""Seconds for looking at other processes' mappings."""


def _check(identifier: str, title: str, status: Status, found: str, advice: str = "") -> Check:
    return Check(id=identifier, title=title, group=Group.BROKER, status=status, found=found, advice=advice)


def socket_path(host: Host, given: str | None) -> str:
    """Return the socket that is meant: the one given, TEEMATE_SOCKET, or the default."""
    return given or host.environment.get("TEEMATE_SOCKET") or DEFAULT_SOCKET


def ask(host: Host, path: str) -> BrokerAnswer:
    """Ask whoever listens at `path`, if something is there."""
    what = host.stat(path)
    if isinstance(what, int):
        return BrokerAnswer(errno=what)
    return host.machine.ask_broker(str(host.path(path)))


def check_socket(host: Host, path: str, answer: BrokerAnswer) -> Check:
    """Whether a broker answers at the socket."""

    def made(status: Status, found: str, advice: str = "") -> Check:
        return _check("socket", "socket", status, f"{path}: {found}", advice)

    what = host.stat(path)
    mode = ""
    if not isinstance(what, int):
        mode = host.mode(what)
    if answer.name:
        backend = ""
        if answer.backend:
            backend = f", backend {answer.backend}"
            if answer.wanted == "auto":
                backend += " (taken by auto)"
        count = len(answer.enclaves)
        enclaves = f"{count} enclave{'' if count == 1 else 's'} for you"
        return made(
            Status.OK, f"{answer.name} answers, protocol {answer.version}{backend}, {enclaves} ({mode})"
        )
    if answer.complaint:
        return made(
            Status.PROBLEM,
            f"{answer.complaint} ({mode})",
            "look at the broker's log; if another program listens there, set TEEMATE_SOCKET",
        )
    if answer.errno == errno.ENOENT:
        found = "no such file, so no broker runs here"
        if container_signs(host):
            folder = os.path.dirname(path)
            advice = f"mount its folder into the container (-v {folder}:{folder}), or start one here"
        else:
            advice = f"{_START}, or set TEEMATE_SOCKET to where it listens"
        return made(Status.WARNING, found, advice)
    if answer.errno in (errno.EACCES, errno.EPERM):
        uid, gids = host.machine.identity()
        groups = ", ".join(host.group_name(gid) for gid in sorted(set(gids)))
        return made(
            Status.PROBLEM,
            f"not permitted ({mode or 'a folder above it may not be entered'}; this process has uid {uid} "
            f"and groups {groups})",
            "put the user into the socket's group, or set socket_mode and socket_group in the policy",
        )
    if answer.errno == errno.ECONNREFUSED:
        if isinstance(what, int) or stat.S_ISSOCK(what.st_mode):
            return made(Status.PROBLEM, f"nobody listens ({mode}): a broker was here and has ended", _START)
        return made(Status.PROBLEM, f"this is no socket ({mode})", _ELSEWHERE)
    if answer.errno in (errno.EAGAIN, errno.ETIMEDOUT):
        return made(
            Status.PROBLEM,
            f"somebody listens and accepts nobody ({mode})",
            "the broker hangs or is overloaded: look at its log, then start it anew",
        )
    return made(
        Status.PROBLEM,
        f"{os.strerror(answer.errno)}" + (f" ({mode})" if mode else ""),
        _ELSEWHERE,
    )


def check_unit(host: Host) -> Check:
    """What the service manager knows of the broker."""

    def made(status: Status, found: str, advice: str = "") -> Check:
        return _check("unit", "systemd unit", status, found, advice)

    if not host.exists("/run/systemd/system"):  # sd_booted(3)
        return made(Status.NOT_APPLICABLE, "systemd does not run here")
    installed = [folder for folder in _UNIT_FOLDERS if host.exists(f"{folder}/{UNIT}")]
    unit = host.machine.unit(UNIT)
    if unit is None:
        if not installed:
            return made(Status.OK, f"{UNIT} is not installed")
        return made(Status.UNKNOWN, f"{UNIT} is in {installed[0]}; systemctl does not answer")
    if unit.load == "masked":
        return made(Status.WARNING, f"{UNIT} is masked", f"systemctl unmask {UNIT}, if it should run")
    if unit.load == "not-found":
        if installed:
            return made(
                Status.WARNING, f"{UNIT} is in {installed[0]}, unknown to systemd", "systemctl daemon-reload"
            )
        return made(Status.OK, f"{UNIT} is not installed")
    if unit.load != "loaded":
        return made(Status.PROBLEM, f"{UNIT}: {unit.load}", f"systemctl status {UNIT}; mend what it names")
    state = f"{UNIT} is {unit.active} ({unit.sub}), {unit.file_state or 'no file'}"
    if unit.active == "failed":
        advice = f"journalctl -u {UNIT} -n 50, then systemctl restart {UNIT}"
        return made(Status.PROBLEM, f"{state}, result {unit.result}", advice)
    if unit.active != "active":
        return made(Status.WARNING, state, f"systemctl enable --now {UNIT}")
    return made(Status.OK, state)


def check_holders(host: Host, broker: BrokerAnswer) -> Check:
    """Who has enclaves mapped that no broker stands behind: their memory is taken until they end.

    A broker's enclaves are those that it lists, and those that a warden has mapped: wardens do not
    outlive their broker.
    """

    def made(status: Status, found: str, advice: str = "") -> Check:
        return _check("holders", "other enclaves", status, found, advice)

    held: dict[tuple[int, int], set[str]] = {}
    governed: set[tuple[int, int]] = set()
    unseen = 0
    deadline = time.monotonic() + _SEARCH_TIME
    for pid in host.names("/proc"):
        if not pid.isdigit() or pid == str(os.getpid()):
            continue
        mappings = host.mappings(pid) if time.monotonic() < deadline else None
        if mappings is None:
            unseen += host.exists(f"/proc/{pid}")  # one that has ended hides nothing
            continue
        ranges = {(m.start, m.end) for m in mappings if _is_enclave(m)}
        if ranges:
            name = host.line(f"/proc/{pid}/comm") or "?"
            if name == _WARDEN:
                governed |= ranges
            for each in ranges:
                held.setdefault(each, set()).add(f"{pid} ({name})")
    listed = [(base, base + size) for _, _, base, size, _ in broker.enclaves]
    loose = {
        each: pids
        for each, pids in held.items()
        if each not in governed and not any(start <= each[0] < end for start, end in listed)
    }
    who = "1 process" if unseen == 1 else f"{unseen} processes"
    hidden = f"{who} could not be looked at" + (" (root sees all)" if host.machine.identity()[0] else "")
    hidden = hidden if unseen else ""
    if not loose:
        if hidden:
            return made(Status.UNKNOWN, f"none seen; {hidden}")
        return made(Status.OK, "none")
    holders = sorted({pid for pids in loose.values() for pid in pids})
    shown = ", ".join(holders[:5]) + (f" and {len(holders) - 5} more" if len(holders) > 5 else "")
    size = format_size(sum(end - start for start, end in loose))
    return made(
        Status.WARNING,
        f"{size} mapped by {shown}: private enclaves, or those of a broker that is gone"
        + (f"; {hidden}" if hidden else ""),
        "nothing, if they are meant to be; the memory is free when the last process that maps it ends",
    )


def _is_enclave(mapping: Mapping) -> bool:
    sim = mapping.path.startswith("/memfd:teemate-sim-enclave")
    inside = WINDOW_START <= mapping.start < WINDOW_START + WINDOW_SIZE
    return mapping.path.startswith("/dev/sgx_enclave") or (sim and inside)
