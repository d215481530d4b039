"""`teemate fn build`: C to WebAssembly, and what it says when that cannot be."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from example_programs import EXAMPLES

import teemate
from teemate import wasm
from teemate.cli.main import cli
from teemate.functions._wire import MODULE_MAX

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None and shutil.which("zig") is None,
    reason="needs the compiler of the extra teemate[fn]",
)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["fn", "build", *map(str, arguments)], catch_exceptions=True)


def imports(module: bytes) -> set[tuple[str, str]]:
    """What a module wants from its host (core specification, 5.5.5)."""
    assert module[:8] == b"\0asm\1\0\0\0"

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = module[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at

    def name(at: int) -> tuple[str, int]:
        length, at = number(at)
        return module[at : at + length].decode(), at + length

    found, at = set(), 8
    while at < len(module):
        kind, (size, start) = module[at], number(at + 1)
        if kind == 2:
            count, place = number(start)
            for _ in range(count):
                space, place = name(place)
                what, place = name(place)
                assert module[place] == 0  # a function
                _, place = number(place + 1)
                found.add((space, what))
        at = start + size
    return found


@needs_compiler
def test_a_function_is_compiled_against_wasi_alone_and_the_same_again(tmp_path: Path) -> None:
    first, again = tmp_path / "one.wasm", tmp_path / "elsewhere" / "two.wasm"
    again.parent.mkdir()
    told: dict[str, Any] = json.loads(invoke(EXAMPLES / "sha256.c", "-o", first, "--json").output)
    module = first.read_bytes()
    assert told == {
        "module": str(first),
        "size": len(module),
        "sha256": hashlib.sha256(module).hexdigest(),
        "said": "",
    }
    found = imports(module)
    assert {space for space, _ in found} == {"wasi_snapshot_preview1"}
    assert {"fd_read", "fd_write", "proc_exit"} <= {what for _, what in found}
    assert len(module) < 64 << 10
    for file in EXAMPLES.iterdir():
        if file.suffix in (".c", ".h"):
            shutil.copy(file, again.parent)
    result = invoke(again.parent / "sha256.c", "-o", again)
    assert result.exit_code == 0, result.output
    assert told["sha256"] in result.output
    assert again.read_bytes() == module


@needs_compiler
def test_a_mistake_is_told_as_the_compiler_has_it_and_no_module_is_touched(tmp_path: Path) -> None:
    source, output = tmp_path / "wrong.c", tmp_path / "wrong.wasm"
    source.write_text("int main(void) { return undeclared; }\n")
    output.write_bytes(b"the last one that was right")
    with pytest.raises(teemate.BuildFailed, match="undeclared") as failed:
        wasm.build_module([source], output)
    assert failed.value.detail["reason"] == "compile"
    assert output.read_bytes() == b"the last one that was right"
    assert sorted(tmp_path.iterdir()) == [source, output]


def test_what_is_to_be_installed_is_told_where_there_is_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = invoke(EXAMPLES / "sha256.c", "-o", tmp_path / "x.wasm")
    assert isinstance(result.exception, teemate.BuildFailed)
    assert result.exception.detail == {"reason": "compiler"}
    assert "pip install 'teemate[fn]'" in str(result.exception)


@pytest.mark.parametrize("name", ["function.rs", "missing.c"])
def test_what_is_no_source_is_not_given_to_the_compiler(tmp_path: Path, name: str) -> None:
    with pytest.raises(teemate.BuildFailed, match=name) as failed:
        wasm.build_module([tmp_path / name], tmp_path / "x.wasm")
    assert failed.value.detail["reason"] == "source"


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zig, told = tmp_path / "zig", tmp_path / "told"
    os.mkfifo(told)
    # The linker holds the pipe's only other end: reading its end means that it has ended too.
    zig.write_text(f"#!/bin/sh\nsleep 1000 > {told} &\nwait\n")
    zig.chmod(0o755)
    monkeypatch.setattr(wasm, "find_compiler", lambda: zig)
    reader = os.open(told, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(teemate.BuildFailed, match="--timeout") as failed:
            wasm.build_module([EXAMPLES / "sha256.c"], tmp_path / "x.wasm", timeout=1.0)
        assert failed.value.detail["reason"] == "timeout"
        os.set_blocking(reader, True)
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)


def test_what_a_compiler_says_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zig = tmp_path / "zig"
    zig.write_text("#!/bin/sh\nhead -c 1000000 /dev/zero | tr '\\0' x\nexit 1\n")
    zig.chmod(0o755)
    monkeypatch.setattr(wasm, "find_compiler", lambda: zig)
    with pytest.raises(teemate.BuildFailed, match="status 1") as failed:
        wasm.build_module([EXAMPLES / "sha256.c"], tmp_path / "x.wasm")
    assert len(str(failed.value)) < 40_000


def test_a_module_that_could_not_be_deployed_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zig = tmp_path / "zig"
    zig.write_text(f'#!/bin/sh\nfor made; do :; done\nhead -c {MODULE_MAX + 1} /dev/zero > "$made"\n')
    zig.chmod(0o755)
    monkeypatch.setattr(wasm, "find_compiler", lambda: zig)
    with pytest.raises(teemate.BuildFailed, match=str(MODULE_MAX)) as failed:
        wasm.build_module([EXAMPLES / "sha256.c"], tmp_path / "x.wasm")
    assert failed.value.detail["reason"] == "size"
    assert not (tmp_path / "x.wasm").exists()
