"""A database in an enclave that a broker shares, opened by the enclave's name."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from connections import database_image
from processes import DEADLINE, wait_until
from raw_client import raw_client
from running_broker import RunningBroker

import teemate
from teemate import db
from teemate._grant import GrantedEnclave

Brokers = Callable[..., RunningBroker]
PAGE = Path(__file__).parents[2] / "docs" / "database.md"


@pytest.fixture
def shared(broker: Brokers, monkeypatch: pytest.MonkeyPatch) -> RunningBroker:
    """A broker whose enclave "db" this user may attach to."""
    attach = f"[[enclave.attach]]\nuid = {os.geteuid()}\n"
    attach += f"[administrators]\nuids = [{os.geteuid()}]\n"
    running = broker(f'[[enclave]]\nname = "db"\nimage = "{database_image()}"\n{attach}')
    monkeypatch.setenv("TEEMATE_SOCKET", running.socket)
    return running


def test_the_readmes_example_prints_what_it_says(
    shared: RunningBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"<!-- database -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(example, str(PAGE), "exec"), {})
    assert capsys.readouterr().out == "Ada 1815\n"


LEAVES = """
from teemate import db
connection = db.connect("db")
connection.execute("SELECT 1")
connection._slot._enclave._connection._lock.acquire()
"""


def test_a_program_ends_without_waiting_for_what_its_threads_held(shared: RunningBroker) -> None:
    """Python ends threads at its end wherever they are, as the listener with the connection's lock."""
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_connections_by_name_give_back_what_they_took(shared: RunningBroker) -> None:
    one, two = db.connect("db"), db.connect("db")
    one.execute("CREATE TABLE t(n)")
    with pytest.raises(db.OperationalError, match="no such table"):
        two.execute("SELECT * FROM t")
    two.close()
    for _ in range(40):  # more than there are slots
        db.connect("db").close()
    assert one.execute("SELECT count(*) FROM t").fetchone() == (0,)
    one.close()
    with teemate.connect() as broker, broker.attach("db"):  # where nothing is mapped any more
        pass


def test_an_enclave_that_was_taken_back_is_attached_anew(shared: RunningBroker) -> None:
    old = db.connect("db")
    with teemate.connect() as broker:
        (client,) = [client for client in broker.clients() if client.name == "teemate.db"]
        broker.revoke(client=client.client)
        with pytest.raises(db.OperationalError) as gone:
            old.execute("SELECT 1")
        assert isinstance(gone.value.__cause__, teemate.Revoked)
    new = db.connect("db")
    assert new.execute("SELECT 1").fetchone() == (1,)
    old.close()
    assert new.execute("SELECT 2").fetchone() == (2,)
    new.close()


def test_a_connection_that_waits_for_a_slot_gets_the_one_of_a_connection_that_closes(
    shared: RunningBroker,
) -> None:
    def open_and_ask() -> object:
        with contextlib.closing(db.connect("db")) as connection:
            return connection.execute("SELECT 1").fetchone()

    one = db.connect("db")
    with contextlib.ExitStack() as held, ThreadPoolExecutor(1) as other:
        admin = held.enter_context(teemate.connect())
        while free := admin.enclaves()[0].slots.free:
            others = held.enter_context(raw_client(shared.socket))
            others.ok("attach", enclave="db", slots=min(free, 16))
        asked = other.submit(open_and_ask)
        wait_until(lambda: asked.done() or admin.enclaves()[0].slots.waiting, "it waits for a slot")
        one.close()
        assert asked.result() == (1,)


def test_who_opens_while_the_last_one_detaches_comes_after_it(
    shared: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    detach = GrantedEnclave.detach
    opened: list[Future[None]] = []

    def open_meanwhile(enclave: GrantedEnclave) -> None:
        if not opened:
            opened.append(other.submit(lambda: db.connect("db").close()))
            wait(opened, timeout=0.3)  # as long as who does not come after it gets to be the first
        detach(enclave)

    monkeypatch.setattr(GrantedEnclave, "detach", open_meanwhile)
    with ThreadPoolExecutor(1) as other:
        db.connect("db").close()
        opened[0].result()


def test_an_enclave_that_there_is_not_is_said_by_teemate(shared: RunningBroker) -> None:
    with pytest.raises(teemate.NotFound):
        db.connect("nothing")


def test_a_slot_that_was_taken_back_is_an_operational_error_with_its_cause(shared: RunningBroker) -> None:
    with teemate.connect() as broker, broker.attach("db") as enclave:
        connection = db.connect(enclave)
        connection.execute("CREATE TABLE t(n)")
        enclave.detach()
        with pytest.raises(db.OperationalError) as gone:
            connection.execute("INSERT INTO t VALUES (1)")
        assert isinstance(gone.value.__cause__, teemate.NotAttached)
        connection.close()
