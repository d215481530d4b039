"""Build what reads images with AddressSanitizer and UBSan, and feed it mutated images."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from sgxs_writer import PAGE, REG, R, Stream, W, eadd, eextend, sdk_image, sign, small_image, unmeasured

ROOT = Path(__file__).parents[2]
LIB = ROOT / "native" / "lib"
SOURCES = ["sgxs", "image", "sigstruct", "loader", "enclave", "diag", "sha256", "hmac", "rsa3072"]
ITERATIONS = 20_000


def build_target(folder: Path, **replaced: Path) -> Path:
    """Compile target and driver; `replaced` gives another file for a source of native/lib."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "the tests need a C compiler"
    sources = [replaced.get(name, LIB / f"{name}.c") for name in SOURCES]
    sources += [Path(__file__).with_name("fuzz_image.c"), Path(__file__).with_name("fuzz_driver.c")]
    command = [compiler, "-std=gnu17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    command += [f"-I{ROOT / 'native' / 'include'}", f"-I{LIB}", *map(str, sources)]
    subprocess.run([*command, "-o", str(folder / "fuzz")], check=True)
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


def test_mutated_images_do_no_harm(tmp_path: Path, corpus: Path) -> None:
    done = run_target(build_target(tmp_path), corpus, seed=1, iterations=ITERATIONS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{ITERATIONS} inputs")


@pytest.mark.parametrize(
    ("check", "gone"),
    [
        ("if (offset >= info->size)", "if (0)"),
        ("if (offset % SGX_PAGE)", "if (0)"),
        ("if (info->pages && offset == reader->page.offset)", "if (0)"),
        ("if (reader->end - reader->at >= length)", "if (reader->end >= length)"),
    ],
    ids=["range", "alignment", "overlap", "end of the buffer"],
)
def test_a_check_that_is_missing_is_found(tmp_path: Path, corpus: Path, check: str, gone: str) -> None:
    """The target itself can fail: the reader without one of its checks does."""
    source = (LIB / "sgxs.c").read_text()
    assert check in source
    broken = tmp_path / "broken.c"
    broken.write_text(source.replace(check, gone))
    done = run_target(build_target(tmp_path, sgxs=broken), corpus, seed=1, iterations=ITERATIONS)
    assert done.returncode != 0
    assert (tmp_path / "crash-input").exists()
