from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from image_sources import BARE, SAMPLE

from teemate.errors import ImageError
from teemate.image import LayoutOptions, Symbols, build_elf, build_image, layout_image, sdk_paths
from teemate.image.elf import load_elf

SMALL = LayoutOptions(slots=2, stack=16 << 10, heap=64 << 10)


def line_of(mark: str) -> int:
    return next(n for n, line in enumerate(SAMPLE.splitlines(), 1) if mark in line)


def test_the_same_source_gives_the_same_bytes_wherever_whenever_and_whoever_builds_it(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "a"
    second = tmp_path / "somewhere" / "else, with a space" / "and a longer name"
    for folder in (first, second):
        folder.mkdir(parents=True)
        shutil.copy(sample, folder / "sample.c")
    built = [build_image([first / "sample.c"], first / "out.sgxs", SMALL)]
    for name, value in {
        "LC_ALL": "tr_TR.UTF-8",
        "TZ": "Asia/Kathmandu",
        "SOURCE_DATE_EPOCH": "1234567890",
        "HOME": str(second),
        "TMPDIR": str(second),
        "C_INCLUDE_PATH": str(second),
        "CPATH": str(second),
    }.items():
        monkeypatch.setenv(name, value)
    os.utime(second / "sample.c", (1, 1))
    monkeypatch.chdir(second)
    before = os.umask(0o077)
    try:
        built.append(build_image([Path("sample.c")], Path("other-name.sgxs"), SMALL))
    finally:
        os.umask(before)
    assert built[0].mrenclave == built[1].mrenclave
    assert (first / "out.sgxs").read_bytes() == (second / "other-name.sgxs").read_bytes()
    assert (first / "out.elf").read_bytes() == (second / "other-name.elf").read_bytes()
    assert [path.name for path in second.iterdir() if path.name.startswith(".")] == []


def test_the_sdk_may_lie_anywhere_too(sample: Path, sample_elf: Path, tmp_path: Path) -> None:
    native = tmp_path / "moved" / "native"
    shutil.copytree(sdk_paths().native, native)
    build_elf([sample], tmp_path / "moved.elf", sdk=type(sdk_paths())(native=native))
    assert (tmp_path / "moved.elf").read_bytes() == sample_elf.read_bytes()


def test_objects_that_another_build_takes_away_are_made_again(
    sample: Path, sample_elf: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "objects"
    kept.mkdir()
    (kept / "gone.o").symlink_to("nowhere")  # listed, and not there when it is looked at
    for number in range(2):
        output = tmp_path / f"{number}.elf"
        build_elf([sample], output, objects_kept=kept)
        assert output.read_bytes() == sample_elf.read_bytes()
        made = next(path for path in kept.iterdir() if not path.is_symlink())
        made.unlink()
        made.symlink_to("nowhere")


def test_another_source_gives_another_measurement(sample: Path, sample_elf: Path, tmp_path: Path) -> None:
    changed = tmp_path / "sample.c"
    changed.write_text(SAMPLE.replace('"two"', '"2.."'))
    one = layout_image(sample_elf, tmp_path / "one.sgxs", SMALL)
    assert build_image([changed], tmp_path / "two.sgxs", SMALL).mrenclave != one.mrenclave


def test_laying_out_a_ready_elf_needs_no_compiler(
    sample_elf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    built = layout_image(sample_elf, tmp_path / "x.sgxs", SMALL)
    assert built.layout.elf.sdk
    assert built.layout.header.rela_count >= 3  # texts[] and the table of ECALLs
    with pytest.raises(ImageError, match=r"no C compiler .*--elf"):
        build_elf([sample_elf.with_suffix(".c")], tmp_path / "y.elf")


def test_an_address_is_found_as_function_and_line(sample_elf: Path) -> None:
    symbols = Symbols(sample_elf)
    start = symbols.address("divide")
    assert start is not None
    output = subprocess.run(
        ["objdump", "-d", "--disassemble=divide", str(sample_elf)], check=True, capture_output=True, text=True
    ).stdout
    at = next(int(line.split(":")[0], 16) for line in output.splitlines() if "\tdiv " in line)
    found = symbols.at(at)
    assert found.function == "divide"
    assert found.file is not None
    assert found.file.endswith("sample.c")
    assert found.line == line_of("LINE: divide")
    assert str(found) == f"divide ({found.file}:{found.line})"


def test_an_address_that_is_nowhere_is_unknown_and_no_error(sample_elf: Path) -> None:
    symbols = Symbols(sample_elf)
    for offset in (0, 1 << 40, (1 << 64) - 1):
        found = symbols.at(offset)
        assert (found.function, found.file, found.line) == (None, None, None)
        assert str(found) == "unknown"


def test_without_debug_information_the_function_is_still_known(sample_elf: Path, tmp_path: Path) -> None:
    stripped = tmp_path / "x.elf"
    subprocess.run(["strip", "--strip-debug", "-o", str(stripped), str(sample_elf)], check=True)
    address = Symbols(stripped).address("divide")
    assert address is not None
    found = Symbols(stripped).at(address)
    assert (found.function, found.line) == ("divide", None)


def test_what_the_compiler_says_reaches_the_author(tmp_path: Path) -> None:
    source = tmp_path / "broken.c"
    source.write_text('#include "tmsdk.h"\nint x = ;\n')
    with pytest.raises(ImageError, match=r"broken\.c:2:9: error") as caught:
        build_elf([source], tmp_path / "x.elf")
    assert caught.value.detail["step"] == "build"
    assert list(tmp_path.iterdir()) == [source]


def test_an_undefined_function_is_a_build_error(tmp_path: Path) -> None:
    source = tmp_path / "lost.c"
    source.write_text('#include "tmsdk.h"\nint nowhere(void);\nTM_ECALL(f) { (void)rq; return nowhere(); }\n')
    with pytest.raises(ImageError, match="nowhere"):
        build_elf([source], tmp_path / "x.elf")


@pytest.mark.parametrize(("name", "reason"), [("x.txt", "neither C"), ("missing.c", "not there")])
def test_a_source_that_is_none_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ImageError, match=reason):
        build_elf([tmp_path / name], tmp_path / "x.elf")


def compiled(tmp_path: Path, source: str, *flags: str, suffix: str = ".c") -> Path:
    path = tmp_path / f"own{suffix}"
    path.write_text(source)
    output = tmp_path / "own.elf"
    subprocess.run(["cc", *flags, "-o", str(output), str(path)], check=True)
    return output


STATIC = ("-static-pie", "-nostdlib", "-fPIE", "-Wl,--no-dynamic-linker", "-Wl,-z,norelro")


@pytest.mark.parametrize(
    ("source", "flags", "reason"),
    [
        ("int main(void) { return 0; }", ("-pie", "-fPIE"), "interpreter|shared libraries"),
        ("int _start(void) { return 0; }", ("-c",), "not linked"),
        ("_Thread_local int x; int *_start(void) { return &x; }", STATIC, "thread-local"),
        ("int _start(void) { return 0; }", (*STATIC, "-Wl,-N"), "writable and executable|share a page"),
        ("int _start(void) { return 0; }", ("-m32", "-ffreestanding", "-c"), "not for x86-64"),
    ],
)
def test_an_elf_that_no_enclave_can_be_made_of_is_refused_with_the_reason(
    tmp_path: Path, source: str, flags: tuple[str, ...], reason: str
) -> None:
    elf = compiled(tmp_path, source, *flags)
    with pytest.raises(ImageError, match=reason) as caught:
        load_elf(elf)
    assert caught.value.detail["step"] == "elf"


def test_a_file_that_is_no_elf_is_refused(tmp_path: Path, sample_elf: Path) -> None:
    for content in (b"", b"\x7fELF", b"no elf", sample_elf.read_bytes()[:200]):
        path = tmp_path / "x.elf"
        path.write_bytes(content)
        with pytest.raises(ImageError):
            load_elf(path)


def test_a_damaged_elf_is_an_image_error_and_nothing_else(tmp_path: Path, sample_elf: Path) -> None:
    good = bytearray(sample_elf.read_bytes())
    refused = 0
    for at in range(64 + 5 * 56):  # the ELF header and the program headers
        bad = bytearray(good)
        bad[at] ^= 0xFF
        path = tmp_path / "x.elf"
        path.write_bytes(bad)
        try:
            layout_image(path, tmp_path / "x.sgxs", SMALL)
        except ImageError:
            refused += 1
    assert refused > 20


def test_a_bare_enclave_is_built_without_the_sdk(bare_elf: Path) -> None:
    elf = load_elf(bare_elf)
    assert not elf.sdk
    assert elf.rela_count == 1
    assert Symbols(bare_elf).address("_start") == elf.entry
    assert "enclu" in BARE
