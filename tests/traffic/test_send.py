"""`teemate send` sends what it is told, in order or not, and prints what comes back; shells complete it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
from commands import teemate
from recorder import OK_RULES
from running_broker import RunningBroker

from teemate.cli.main import COMMANDS, cli
from teemate.traffic.schema import arguments_of, operations

StartBroker = Callable[..., RunningBroker]


def test_a_request_and_its_answer_are_printed(broker: StartBroker, policy: str) -> None:
    where = ("--socket", broker(policy).socket)
    assert teemate("send", "ping", *where) == '-> {"id": 1, "op": "ping"}\n<- {"id": 1 /ping/, "ok": {}}\n'
    said = teemate("send", "attach", "enclave=vault", "slots=2", "wait=0.5", *where)
    assert '"args": {"enclave": "vault", "slots": 2, "wait": 0.5}' in said
    assert said.count("/secret of 16 bytes/") == 2
    assert "with memfd" in said or "with device" in said
    told = [json.loads(line) for line in teemate("send", "ping", "--json", *where).splitlines()]
    assert [line["from"] for line in told] == ["client", "broker"]
    assert told[1]["message"] == {"id": 1, "ok": {}}


def test_every_field_can_be_what_it_must_not(broker: StartBroker, policy: str) -> None:
    where = ("--socket", broker(policy).socket)
    wrong: list[tuple[tuple[str, ...], str]] = [
        (("ping", "--field", "id=-1"), "a request has an id"),
        (("ping", "--without", "id"), "a request has an id"),
        (("--field", "op=5"), "a request has an op"),
        (("ping", "--field", "args=[]"), "args are a map"),
        (("ping", "--field", 'args={"a": [[[[[[[[1]]]]]]]]}'), "nested deeper"),
        (("ping", "x=1(2)"), "a tag"),
        (("--raw", "a1ff"), "more items announced"),
        (("ping", "--no-hello"), "first message on a connection is hello"),
        (("ping", "--fd", "/dev/null"), "descriptors came with"),
        (("attach", "enclave=vault", 'slots="2"'), "whole number"),
    ]
    for arguments, reason in wrong:
        said = teemate("send", *arguments, *where, status=1)
        assert reason in said, said
        assert '"code": "protocol-error"' in said
    assert '"code": "not-found"' in teemate("send", "attach", "enclave=nowhere", *where, status=1)
    assert '"code": "unsupported"' in teemate("send", "no.such", *where, status=1)
    assert '"code": "denied"' in teemate(
        "send", "create", "name=x", f"sigstruct=h'{'00' * 1808}'", "--fd", "/dev/null", *where, status=4
    )
    assert "version 1" in teemate("send", "ping", "--hello", "version=2", *where, status=1)


def test_what_was_typed_wrong_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    where = ("--socket", str(tmp_path / "nobody"))
    for arguments in (("ping", "x"), ("ping", "x=[1"), ("--raw", "zz"), ("ping", "--raw", "a0"), ()):
        teemate("send", *arguments, *where, status=2)
    assert "no broker answers" in teemate("send", "ping", *where, status=5)


def test_events_are_printed_for_as_long_as_is_asked(broker: StartBroker, policy: str) -> None:
    where = ("--socket", broker(policy).socket)
    said = teemate("send", "monitor", "op=no-such", "--listen", "0.1", *where)
    assert said.endswith('<- {"id": 1 /monitor/, "ok": {}}\n')
    # It has asked for its own traffic, which is there at once.
    said = teemate("send", "enclaves", "--listen", "0", *where)
    assert said.count("<- ") == 1


# ---- completion ------------------------------------------------------------------------------------


def complete(words: str) -> list[str]:
    """What a shell is offered for the last of `words`, by what it calls."""
    *before, last = words.split(" ")
    completer = BashComplete(cli, {}, "teemate", "_TEEMATE_COMPLETE")
    return [item.value for item in completer.get_completions(before, last)]


def test_commands_options_enclaves_and_operations_are_completed(
    broker: StartBroker, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEEMATE_SOCKET", broker(policy).socket)
    assert complete("") == list(COMMANDS)
    assert complete("undr") == ["undrain"]
    assert complete("monitor --e") == ["--enclave", "--error"]
    assert complete("image b") == ["build"]
    for command in ("slots", "drain", "undrain", "call", "upgrade", "destroy", "revoke --enclave"):
        assert complete(f"{command} v") == ["vault"], command
    assert complete("monitor --enclave v") == ["vault"]
    assert complete("send slots.") == ["slots.acquire", "slots.release"]
    assert complete("send attach ") == ["enclave=", "slots=", "wait="]
    assert complete("send attach enclave=v") == ["enclave=vault"]
    monkeypatch.setenv("TEEMATE_SOCKET", "/nowhere")
    assert complete("drain v") == []


def test_completing_a_command_imports_none_of_them() -> None:
    code = "import sys; from teemate.cli.main import cli; import click\n"
    code += "found = cli.shell_complete(click.Context(cli), 'd')\n"
    code += "print([item.value for item in found], 'teemate.cli.drain' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names = [name for name in COMMANDS if name.startswith("d")]
    assert said == f"{names} False\n"


def test_bash_takes_the_script_and_completes_with_it(tmp_path: Path) -> None:
    (tmp_path / "teemate").write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from teemate.cli.main import main; main()' \"$@\"\n"
    )
    (tmp_path / "teemate").chmod(0o755)
    script = 'eval "$(teemate completion bash)"; COMP_WORDS=(teemate undr); COMP_CWORD=1; '
    script += '_teemate_completion teemate undr teemate; echo "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "undrain\n"
    for shell, word in (("zsh", "#compdef teemate"), ("fish", "complete --no-files --command teemate")):
        assert word in teemate("completion", shell)
    teemate("completion", "tcsh", status=2)


def test_the_schema_has_every_operation_with_what_it_takes() -> None:
    assert operations() == sorted(OK_RULES)
    assert arguments_of("attach") == ["enclave", "slots", "wait"]
    assert {"version", "client", "session", "resume"} <= set(arguments_of("hello"))
    assert arguments_of("create") == ["name", "sigstruct", "backend", "debug", "owner"]
    assert arguments_of("ping") == arguments_of("no-such") == []
    assert all(re.fullmatch("[a-z_]+", key) for op in operations() for key in arguments_of(op))
