"""What a guest that did not end in time was doing: its processors, as QEMU has them, and its console."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path

_PROMPT = b"(qemu) "
_QUESTIONS = ("info status", "info registers -a", "info lapic")
_PATIENCE = 20
"""Seconds for all answers: the host may be full of work, and that may be the reason."""
_LINES = 40
"""Of the console."""
_UNINTERESTING = re.compile("FPR|FCW|XMM|YMM|DR|[A-Z]S =|[LGI]DT|TR =")


def _ask(monitor: socket.socket, question: str, until: float) -> str:
    """Send a command to QEMU's monitor (HMP) and return what it prints up to its next prompt."""
    if question:
        monitor.sendall(question.encode() + b"\n")
    answer = b""
    while not answer.endswith(_PROMPT):
        monitor.settimeout(max(until - time.monotonic(), 0.1))
        data = monitor.recv(65536)
        if not data:
            break
        answer += data
    return answer.removesuffix(_PROMPT).decode(errors="backslashreplace").replace("\r", "")


def post_mortem(monitor: Path, console: Path) -> str:
    """Ask a QEMU that runs; what it does not say in time is left out.

    :param monitor: the socket of its monitor.
    """
    answers = []
    until = time.monotonic() + _PATIENCE
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_PATIENCE)
            sock.connect(str(monitor))
            _ask(sock, "", until)
            for question in _QUESTIONS:
                # The line editor echoes what it was sent, a letter at a time.
                lines = _ask(sock, question, until).splitlines()[1:]
                answers += [f"-- {question}", *(line for line in lines if not _UNINTERESTING.match(line))]
    except OSError as error:
        answers.append(f"-- QEMU's monitor: {error}")
    last = console.read_text(errors="backslashreplace").splitlines()[-_LINES:]
    return "\n".join([*answers, "-- the console's last lines", *last])
