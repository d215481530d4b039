"""A broker whose enclave runs functions, with the examples in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from example_programs import EXAMPLES, NAMES, Failed
from function_enclaves import functions_image
from running_broker import RunningBroker, run_broker

import teemate
from teemate import wasm
from teemate.functions import FunctionFailed, Functions

ASSEMBLYSCRIPT = "assemblyscript@0.28.20"


def module(name: str, folder: Path) -> bytes:
    """The example `name`, compiled as `teemate fn build` does; skipped where there is no compiler."""
    try:
        return wasm.build_module([EXAMPLES / f"{name}.c"], folder / f"{name}.wasm").path.read_bytes()
    except teemate.BuildFailed as error:
        if error.detail["reason"] != "compiler":
            raise
        pytest.skip(str(error))


def assemblyscript_module(name: str, folder: Path) -> bytes:
    """The example `name` in AssemblyScript, whose compiler npm installs; skipped where that cannot be."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm (Debian: npm), which installs AssemblyScript's compiler")
    install = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), ASSEMBLYSCRIPT]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm could not install {ASSEMBLYSCRIPT}: {done.stderr.strip()[-300:]}")
    output = folder / f"{name}.wasm"
    options = ["-O", "--exportStart", "_start", "--use", f"abort={name}/abort"]
    source = shutil.copy(EXAMPLES / f"{name}.ts", folder)
    command = [str(folder / "node_modules/.bin/asc"), Path(source).name, "-o", output.name, *options]
    subprocess.run(command, check=True, timeout=300, cwd=folder)
    return output.read_bytes()


@contextlib.contextmanager
def run_functions(
    settings: str = "slots_per_client = 4\nclients_per_uid = 16", *, expect_errors: bool = False
) -> Iterator[RunningBroker]:
    """Run a broker that lends an enclave with functions to this user."""
    attach = f"[[enclave.attach]]\nuid = {os.geteuid()}\n"
    image = functions_image()
    policy = f'[[enclave]]\nname = "functions"\nimage = "{image}"\n{settings}\n{attach}'
    with run_broker(policy, expect_errors=expect_errors) as running:
        yield running


@dataclass(frozen=True)
class Deployed:
    """The examples in an enclave; each is compiled and deployed when it is first asked for."""

    functions: Functions
    folder: Path

    def __call__(self, name: str, payload: bytes = b"", args: Sequence[str] = ()) -> bytes:
        assert name in NAMES
        if not (self.folder / f"{name}.wasm").exists():
            self.functions.list()  # the first compilation takes longer than a broker waits for hello
            self.functions.deploy(name, module(name, self.folder))
        try:
            return self.functions.invoke(name, payload, args=args)
        except FunctionFailed as error:
            raise Failed(error.exit_code, error.stderr.decode(errors="replace")) from error


def free_slots(running: RunningBroker) -> tuple[int, int]:
    """How many slots of the enclave are free, and how many there are."""
    with teemate.connect(running.socket) as broker:
        (enclave,) = broker.enclaves()
    return enclave.slots.free, enclave.slots.total
