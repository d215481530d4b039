"""`teemate db shell` does what it reads, and prints what comes back."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable

import click
import pytest
from connections import database_image
from running_broker import RunningBroker

import teemate
from teemate import db
from teemate.cli.db import _converse, shown, split

SHELL = [sys.executable, "-c", "from teemate.cli.main import main; main()", "db", "shell", "db"]


@pytest.fixture
def environment(broker: Callable[..., RunningBroker]) -> dict[str, str]:
    """Of a program that may attach to the enclave "db"."""
    attach = f"[[enclave.attach]]\nuid = {os.geteuid()}\n"
    running = broker(f'[[enclave]]\nname = "db"\nimage = "{database_image()}"\n{attach}')
    return {**os.environ, "TEEMATE_SOCKET": running.socket, "TERM": "dumb", "COLUMNS": "80"}


def test_statements_from_a_pipe_are_done_and_columns_separated_by_tabs(environment: dict[str, str]) -> None:
    script = """CREATE TABLE t(a, b); INSERT INTO t VALUES (1, 'x;y'),
        (NULL, x'00ff');
    .tables
    SELECT *
    FROM t;
    SELECT count(*) FROM t"""
    script = "\n".join(line.strip() for line in script.splitlines())
    done = subprocess.run(SHELL, input=script, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "t\n1\tx;y\nNULL\tx'00ff'\n2\n"


def test_the_first_error_in_a_pipe_is_the_end(environment: dict[str, str]) -> None:
    script = "SELECT 1;\nSELECT nope;\nSELECT 2;\n"
    done = subprocess.run(SHELL, input=script, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (1, "1\n")
    assert "no such column: nope" in done.stderr


def test_at_a_terminal_results_are_tables_and_errors_are_not_the_end(environment: dict[str, str]) -> None:
    above, below = pty.openpty()
    os.write(above, b"SELECT nope;\nSELECT 12 AS number, 'text' AS word;\n.quit\n")
    done = subprocess.run(SHELL, stdin=below, capture_output=True, timeout=60, env=environment)
    os.close(above)
    os.close(below)
    assert done.returncode == 0
    assert "no such column: nope" in done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    assert any("number" in line and "word" in line for line in lines)
    assert any("12" in line and "text" in line and "|" in line.replace("│", "|") for line in lines)


def test_statements_are_told_apart_where_their_semicolons_are_their_own() -> None:
    trigger = "CREATE TRIGGER g AFTER INSERT ON t BEGIN DELETE FROM t; END;"
    assert split(f"SELECT ';'; -- ;\n{trigger} SELECT") == (["SELECT ';';", f" -- ;\n{trigger}"], " SELECT")
    assert split("SELECT 1;\n") == (["SELECT 1;"], "")


def test_nothing_of_a_value_is_a_command_to_the_terminal() -> None:
    assert shown("a\x1b[31m\n") == "a\\x1b[31m\\n"
    assert shown("äß") == "äß"


def test_nothing_of_a_name_or_an_error_is_a_command_to_the_terminal(environment: dict[str, str]) -> None:
    name = "\x1b]0;owned\x07"
    script = f'CREATE TABLE "{name}"(\n\ta);\n.tables\n.schema\nSELECT * FROM "{name}!";\n'
    done = subprocess.run(SHELL, input=script, capture_output=True, text=True, timeout=60, env=environment)
    escaped = "\\x1b]0;owned\\x07"
    assert done.stdout == f'{escaped}\nCREATE TABLE "{escaped}"(\n\ta);\n'
    assert f"no such table: {escaped}!" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("text", ["SELECT n FROM t;", ".tables"])
def test_ctrl_c_while_rows_are_printed_is_their_end(
    enclave: teemate.Enclave, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    printed = []

    def echo(line: str) -> None:
        printed.append(line)
        if len(printed) == 3:
            signal.raise_signal(signal.SIGINT)

    with contextlib.closing(db.connect(enclave, isolation_level=None)) as connection:
        for number in range(9):
            connection.execute(f"CREATE TABLE t{number or ''}(n)")
        connection.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(1000)])
        monkeypatch.setattr(click, "echo", echo)
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{text}\nSELECT 'next';\n"))
        with pytest.raises(click.ClickException, match="interrupted"):
            _converse(connection)
        assert len(printed) == 3
