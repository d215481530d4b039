"""Who has no right to a database holds nobody up who opens it, whatever is done to its process."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from running_broker import RunningBroker
from strangers import REQUESTS, stopped_stranger
from users import needs_root

from teemate import db

pytestmark = needs_root


@pytest.fixture
def again(begin: Callable[..., RunningBroker]) -> RunningBroker:
    """A broker whose enclave has a database of an earlier life, which nobody has opened in this one."""
    first = begin()
    with contextlib.closing(db.connect("db", "ledger")) as connection:
        connection.executescript("CREATE TABLE t(v); INSERT INTO t VALUES (7)")
    os.kill(first.pid, signal.SIGTERM)
    return begin()


@pytest.mark.parametrize("what", REQUESTS)
def test_a_stranger_that_is_stopped_while_it_asks_for_a_database_holds_nothing_of_it(
    again: RunningBroker, what: str, tmp_path: Path
) -> None:
    with stopped_stranger(again, what, tmp_path) as stranger:
        with contextlib.closing(db.connect("db", "ledger", create=False)) as connection:
            assert connection.execute("SELECT v FROM t").fetchall() == [(7,)]
        stranger.send_signal(signal.SIGCONT)
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == ("DatabaseExists\n" if what == "import" else "Denied\n")
