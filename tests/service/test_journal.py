"""Records as systemd's journal takes them; the journal is played by the test."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from teemate.broker.connections.identity import Identity
from teemate.broker.policy.rules import DenialReason, Missing
from teemate.broker.telemetry.audit import Audit, configure_log
from teemate.broker.telemetry.journal import MESSAGE_IDS, Journal, is_journal, render

WHO = Identity(
    pid=42, uid=1000, gid=100, groups=frozenset({4, 100}), label="", cgroup="/system.slice/a\nMESSAGE=forged"
)


def parse(record: bytes) -> dict[str, list[str]]:
    """Return the fields, as journald reads them."""
    fields: dict[str, list[str]] = {}
    while record:
        line, _, rest = record.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + size], rest[8 + size + 1 :]
        fields.setdefault(name.decode(), []).append(value.decode())
        record = rest
    return fields


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "journal"))
    sock.settimeout(30)
    yield sock
    sock.close()


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Journal]:
    sink = Journal(str(tmp_path / "journal"))
    yield sink
    sink.close()


def test_who_was_denied_what_and_why_are_fields(journald: socket.socket, sink: Journal) -> None:
    log = configure_log("journal", journal=sink)
    missing = Missing(DenialReason.ATTACH_RULE, "enclave vault: no [[enclave.attach]] matches")
    Audit(log).denied(WHO, client=7, operation="attach", missing=missing)
    fields = parse(journald.recv(65536))
    assert fields["TEEMATE_AUDIT"] == ["denial"]
    assert fields["TEEMATE_CLIENT"] == ["7"]
    assert fields["TEEMATE_CLIENT_UID"] == ["1000"]
    assert fields["TEEMATE_CLIENT_PID"] == ["42"]
    assert fields["TEEMATE_OPERATION"] == ["attach"]
    assert fields["TEEMATE_REASON"] == ["enclave vault: no [[enclave.attach]] matches"]
    assert fields["MESSAGE_ID"] == [MESSAGE_IDS["denied"]]
    assert fields["PRIORITY"] == ["4"]
    assert fields["SYSLOG_IDENTIFIER"] == ["teemate-broker"]


def test_each_slot_of_a_grant_can_be_asked_for(journald: socket.socket, sink: Journal) -> None:
    Audit(configure_log("journal", journal=sink)).granted(
        WHO, client=7, enclave="vault", grant=3, slots=[4, 9]
    )
    fields = parse(journald.recv(65536))
    assert fields["TEEMATE_SLOT"] == ["4", "9"]
    assert fields["TEEMATE_ENCLAVE"] == ["vault"]
    assert fields["MESSAGE"][0].startswith("granted ")


def test_what_a_user_can_choose_makes_no_field_of_its_own(journald: socket.socket, sink: Journal) -> None:
    log = configure_log("journal", journal=sink)
    Audit(log).granted(WHO, client=7, enclave="vault", grant=3, slots=[4])
    log.info("event", reason="two\nlines\nPRIORITY=0", text=b"\xff".decode("utf-8", "surrogateescape"))
    first, second = parse(journald.recv(65536)), parse(journald.recv(65536))
    assert len(first["MESSAGE"]) == len(second["MESSAGE"]) == 1
    assert first["TEEMATE_CLIENT_CGROUP"] == ["/system.slice/a\\nMESSAGE=forged"]
    assert second["PRIORITY"] == ["6"]
    assert second["TEEMATE_REASON"] == ["two\nlines\nPRIORITY=0"]


def test_a_process_that_is_no_client_is_not_called_one() -> None:
    fields = parse(render(None, "warning", {"event": "warden killed", "level": "warning", "pid": 5}))
    assert fields["TEEMATE_PID"] == ["5"]
    assert "TEEMATE_CLIENT_PID" not in fields


def test_a_traceback_goes_into_a_field_and_its_end_is_kept(journald: socket.socket, sink: Journal) -> None:
    log = configure_log("journal", journal=sink)
    try:
        os.stat("x" * 40000)
    except OSError:
        log.exception("internal error")
    fields = parse(journald.recv(1 << 20))
    assert fields["TEEMATE_TRACEBACK"][0].endswith("xxx'")
    assert len(fields["TEEMATE_TRACEBACK"][0]) <= 16384
    assert "Traceback" not in fields["MESSAGE"][0]


def test_a_journal_that_does_not_read_holds_nobody_up_and_hears_how_much_it_missed(
    journald: socket.socket, sink: Journal
) -> None:
    record = render(None, "info", {"event": "ready", "level": "info"})
    sent = 0
    while not sink.dropped:  # the kernel takes a few: net.unix.max_dgram_qlen
        sink.msg(record)
        sent += 1
    sink.msg(record)
    assert sink.dropped == 2
    for _ in range(sent - 1):
        assert parse(journald.recv(65536))["TEEMATE_EVENT"] == ["ready"]
    sink.msg(record)
    told = parse(journald.recv(65536))
    assert told["TEEMATE_EVENT"] == ["records dropped"]
    assert told["TEEMATE_COUNT"] == ["2"]
    assert parse(journald.recv(65536))["TEEMATE_EVENT"] == ["ready"]


def test_a_journal_that_was_started_again_is_found(sink: Journal, tmp_path: Path) -> None:
    sink.msg(render(None, "info", {"event": "ready", "level": "info"}))
    assert sink.dropped == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "journal"))
        sink.msg(render(None, "info", {"event": "ready", "level": "info"}))
        assert parse(sock.recv(65536))["TEEMATE_EVENT"] == ["records dropped"]
        assert parse(sock.recv(65536))["TEEMATE_EVENT"] == ["ready"]


def test_the_journal_is_recognised_by_device_and_inode_and_a_redirection_is_not() -> None:
    read_end, write_end = os.pipe()
    try:
        found = os.fstat(write_end)
        assert is_journal(write_end, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
        assert not is_journal(read_end, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"})
        assert not is_journal(write_end, {})
    finally:
        os.close(read_end)
        os.close(write_end)
