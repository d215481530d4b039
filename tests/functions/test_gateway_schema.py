"""schemathesis asks the gateway whatever its OpenAPI document allows, and what it does not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys

import pytest
from running_gateway import DEADLINE, run_gateway


@pytest.mark.parametrize(
    "options",
    [
        # Deadlines are the client's choice, and one of a microsecond is kept by answering 504.
        pytest.param(["--header", "TeeMate-Timeout: 30"], id="with time"),
        pytest.param(["--exclude-checks", "not_a_server_error"], id="with any deadline"),
    ],
)
def test_schemathesis_finds_nothing_between_the_document_and_the_gateway(
    request: pytest.FixtureRequest, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("takes half a minute: pytest --full tests/functions")
    if importlib.util.find_spec("hypercorn") is None:
        pytest.skip("needs hypercorn: pip install 'teemate[gateway]'")
    program = shutil.which("schemathesis", path=f"{sys.prefix}/bin:{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("needs schemathesis: pip install schemathesis, anywhere on PATH")
    if "--exclude-checks" in options:
        # A stream that its deadline breaks off is no answer for schemathesis: test_gateway_contract.py asks.
        monkeypatch.setenv("NO_STREAMS", "1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with run_gateway("--workers", "1", "--listen", f"127.0.0.1:{port}"):
        done = subprocess.run(
            [
                program, "run", f"http://127.0.0.1:{port}/openapi.json",
                "--max-examples", "100", "--seed", "8", "--no-color", *options,
            ],
            capture_output=True,
            text=True,
            timeout=10 * DEADLINE,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
