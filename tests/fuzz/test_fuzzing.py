"""Build what reads images with AddressSanitizer and UBSan, and feed it mutated images."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sgxs_writer import PAGE, REG, R, Stream, W, eadd, eextend, sdk_image, sign, small_image, unmeasured

ROOT = Path(__file__).parents[2]
LIB = ROOT / "native" / "lib"
SOURCES = ["sgxs", "image", "sigstruct", "loader", "enclave", "diag", "sha256", "hmac", "rsa3072"]
ENOUGH = 1_000
"""Inputs among which what is wrong is mostly found."""


@pytest.fixture(scope="module")
def iterations(request: pytest.FixtureRequest) -> int:
    return 20_000 if request.config.getoption("--full") else 6_000


def compile_with_sanitizers(arguments: list[str]) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "the tests need a C compiler"
    command = [compiler, "-std=gnu17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    command += [f"-I{ROOT / 'native' / 'include'}", f"-I{LIB}", *arguments]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Target, driver and the sources of native/lib, compiled once."""
    folder = tmp_path_factory.mktemp("objects")
    sources = [LIB / f"{name}.c" for name in SOURCES]
    sources += [Path(__file__).with_name("fuzz_image.c"), Path(__file__).with_name("fuzz_driver.c")]
    compiled = {source.stem: folder / f"{source.stem}.o" for source in sources}
    with ThreadPoolExecutor(max_workers=2) as pool:
        lines = (["-c", str(source), "-o", str(compiled[source.stem])] for source in sources)
        list(pool.map(compile_with_sanitizers, lines))
    return compiled


def link_target(folder: Path, objects: dict[str, Path], **replaced: Path) -> Path:
    """Link target and driver; `replaced` gives another file for a source of native/lib."""
    files = {**objects, **replaced}
    compile_with_sanitizers([*map(str, files.values()), "-o", str(folder / "fuzz")])
    return folder / "fuzz"


def run_target(target: Path, corpus: Path, *, seed: int, iterations: int) -> subprocess.CompletedProcess[str]:
    seeds = sorted(map(str, corpus.iterdir()))
    command = [str(target), str(seed), str(iterations), *seeds]
    # Leaks count as well: a refused image must leave nothing behind.
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=1:abort_on_error=0")
    environment.pop("LD_PRELOAD", None)
    return subprocess.run(
        command, cwd=target.parent, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good images of every kind; the driver makes them bad."""
    folder = tmp_path_factory.mktemp("corpus")
    mixed = Stream()
    mixed.records += [eadd(0, REG | R), eextend(512, b"c"), eextend(0, b"a"), unmeasured(256, b"b")]
    mixed.page(PAGE, REG | R | W, b"later", measured=False).page(3 * PAGE, REG | R | W)
    long = Stream(size=1 << 20)
    for page in range(70):
        long.page(page * PAGE, REG | R | W, bytes([page]) * PAGE)
    images = {"small": small_image(), "mixed": mixed, "sdk": sdk_image(), "long": long}
    for name, image in images.items():
        (folder / name).write_bytes(sign(image.mrenclave()) + image.to_bytes())
    return folder


def test_mutated_images_do_no_harm(
    tmp_path: Path, corpus: Path, objects: dict[str, Path], iterations: int
) -> None:
    done = run_target(link_target(tmp_path, objects), corpus, seed=1, iterations=iterations)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{iterations} inputs")


@pytest.mark.parametrize(
    ("check", "gone", "seed"),
    [
        ("if (offset >= info->size)", "if (0)", 5),
        ("if (offset % SGX_PAGE)", "if (0)", 3),
        ("if (info->pages && offset == reader->page.offset)", "if (0)", 2),
        ("if (reader->end - reader->at >= length)", "if (reader->end >= length)", 1),
    ],
    ids=["range", "alignment", "overlap", "end of the buffer"],
)
def test_a_check_that_is_missing_is_found(
    tmp_path: Path, corpus: Path, objects: dict[str, Path], check: str, gone: str, seed: int
) -> None:
    """The target itself can fail: the reader without one of its checks does.  `seed` is one that shows it."""
    source = (LIB / "sgxs.c").read_text()
    assert check in source
    broken = tmp_path / "broken.c"
    broken.write_text(source.replace(check, gone))
    target = link_target(tmp_path, objects, sgxs=broken)
    for other in range(20):
        if run_target(target, corpus, seed=seed + other, iterations=ENOUGH).returncode != 0:
            break
    assert (tmp_path / "crash-input").exists()
