"""A client without rights to a database that is stopped while it asks for it."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from processes import wait_for_stop, wait_until
from raw_client import raw_client
from running_broker import RunningBroker

__all__ = ["REQUESTS", "stopped_stranger"]

REQUESTS = {
    "delete": "_copying.delete_by(connection, 'ledger')",
    "import": "_copying.import_by(connection, Path(sys.argv[1]), 'ledger', progress=None)",
    "open": "connection.close(); db.connect('db', 'ledger')",
}
_PROGRAM = """
import os, sys
from pathlib import Path
from teemate import db
from teemate.db import _copying
os.setresgid(4002, 4002, 4002); os.setresuid(4002, 4002, 4002)
connection = db.connect("db")
print("ready", flush=True)
sys.stdin.readline()
try:
    {request}
except db.Error as error:
    print(type(error).__name__)
"""
_FUTEX = "202"
# Where arenas are: right above their enclaves (teemate_abi.h).
_LOWEST, _HIGHEST = 0x4000_0000_0000, 0x4100_0000_0000


def _waits_for_its_file(pid: int) -> bool:
    """Whether the call inside has asked for something of a file and sleeps at a word of the arena."""
    number, *arguments = Path(f"/proc/{pid}/syscall").read_text().split()
    return number == _FUTEX and _LOWEST <= int(arguments[0], 16) < _HIGHEST


@contextlib.contextmanager
def stopped_stranger(running: RunningBroker, request: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Have a client of uid 4002 stand still from its first request of a file on."""
    plain = folder / "plain"
    with contextlib.closing(sqlite3.connect(plain)) as connection, connection:
        connection.execute("CREATE TABLE t(v)")
    for path in (plain, *plain.parents):
        with contextlib.suppress(PermissionError):
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
    with raw_client(running.socket) as administrator:
        warden = administrator.ok("stats")["stats"]["enclaves"][0]["warden"]["pid"]
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM.format(request=REQUESTS[request]), plain],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as stranger:
        assert stranger.stdin is not None
        assert stranger.stdout is not None
        try:
            assert stranger.stdout.readline() == "ready\n"
            os.kill(warden, signal.SIGSTOP)
            try:
                stranger.stdin.write("\n")
                stranger.stdin.flush()
                wait_until(lambda: _waits_for_its_file(stranger.pid), "the stranger waits for its file")
                stranger.send_signal(signal.SIGSTOP)
                wait_for_stop(stranger.pid)
            finally:
                os.kill(warden, signal.SIGCONT)
            yield stranger
        finally:
            stranger.send_signal(signal.SIGCONT)
            stranger.kill()
