"""Making enclaves through Linux's driver: interrupted, too large, provisioned, not permitted."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TESTS))

from sgxs_writer import PAGE, REG, R, Stream, W, X, eadd, sign, small_image  # noqa: E402

from teemate._native import ffi, lib  # noqa: E402
from teemate.image import shipped  # noqa: E402

PROVISION = Path("/dev/sgx_provision")
ENCLAVE = Path("/dev/sgx_enclave")
NOBODY = 65534


def epc_bytes() -> int:
    nodes = Path("/sys/devices/system/node").glob("node*/x86/sgx_total_bytes")
    return sum(int(path.read_text()) for path in nodes)


@contextmanager
def created(content: bytes, sigstruct: bytes, backend: int = lib.TEEMATE_SGX) -> Iterator[Any]:
    """Yield a struct teemate_enclave_info of an enclave that lives as long as this context."""
    enclave, diag = ffi.new("struct teemate_enclave **"), ffi.new("struct teemate_diag *")
    fd = os.memfd_create("image")
    try:
        os.write(fd, content)
        result = lib.teemate_create(backend, 0, 0, fd, sigstruct, enclave, diag)
    finally:
        os.close(fd)
    if result < 0:
        raise OSError(-result, ffi.string(diag.text).decode())
    try:
        info = ffi.new("struct teemate_enclave_info *")
        assert lib.teemate_enclave_describe(enclave[0], info) == 0
        yield info
    finally:
        lib.teemate_close(enclave[0])


@contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    before = stat.S_IMODE(path.stat().st_mode)
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(before)


PROLOGUE = """
import os
import teemate, teemate.doctor._machine
from sgxs_writer import sign, small_image
from teemate._native import ffi, lib
image = small_image()
plain, provisioned = (sign(image.mrenclave(), attributes=bits) for bits in (4, 4 | 0x10))
os.setgroups([])
os.setgid({nobody})
os.setuid({nobody})  # not before: the interpreter may lie where only root can read
"""


def as_nobody(code: str) -> str:
    """Run Python as a user without any rights; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE.format(nobody=NOBODY) + textwrap.dedent(code)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(TESTS)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["vault", "bare"])
def test_a_shipped_image_has_one_measurement_on_both_backends(name: str) -> None:
    image = shipped(name)
    content, sigstruct = image.sgxs.read_bytes(), image.sigstruct.read_bytes()
    with (
        created(content, sigstruct, lib.TEEMATE_SIM) as sim,
        created(content, sigstruct, lib.TEEMATE_SGX) as sgx,
    ):
        assert bytes(sim.mrenclave) == bytes(sgx.mrenclave) != bytes(32)
        assert bytes(sim.mrsigner) == bytes(sgx.mrsigner)
        for field in ("size", "pages", "attributes", "xfrm", "miscselect", "ssa_frame_pages", "tcs_count"):
            assert getattr(sim, field) == getattr(sgx, field)


def test_signals_while_pages_are_added_do_not_change_the_measurement() -> None:
    """The driver stops between two pages, or says EINTR before the first: EINIT compares MRENCLAVE."""
    image = Stream(size=16 << 20)
    for page in range(400):
        image.page(page * PAGE, REG | R | X, page.to_bytes(4, "little") * 1024)
    image.records += [eadd(page * PAGE, REG | R | W) for page in range(400, 4000)]
    content, sigstruct = image.to_bytes(), sign(image.mrenclave())
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, True)
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        with created(content, sigstruct) as info:
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert info.pages == 4000
            assert bytes(info.mrenclave) == image.mrenclave()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGALRM, before)
        os.close(writing)
        arrived = len(os.read(reading, 65536))
        os.close(reading)
    assert arrived > 5


def test_an_enclave_may_be_larger_than_the_epc() -> None:
    size = epc_bytes()
    if size > 128 << 20:
        pytest.skip(f"this would add {size >> 20} MiB of pages: it is for machines with 128 MiB of EPC")
    pages = size // PAGE + 500
    image = Stream(size=1 << (pages * PAGE - 1).bit_length())
    image.records += [eadd(page * PAGE, REG | R | W) for page in range(pages)]
    with created(image.to_bytes(), sign(image.mrenclave())) as info:
        assert info.pages == pages


def test_epc_that_is_full_is_an_error_that_says_so_and_it_is_free_again() -> None:
    """Every enclave has two pages that Linux does not swap out while it is being built."""
    if epc_bytes() > 4 << 20:
        pytest.skip("needs an EPC of 4 MiB at most: tests/machine/run --epc 2M pytest ...")
    image = Stream()
    content, sigstruct = image.to_bytes(), sign(image.mrenclave())
    enclaves = []
    refused: OSError | None = None
    try:
        while refused is None:
            enclave = created(content, sigstruct)
            try:
                enclave.__enter__()
                enclaves.append(enclave)
            except OSError as error:
                refused = error
    finally:
        for enclave in enclaves:
            enclave.__exit__(None, None, None)
    assert refused.errno == errno.ENOMEM
    assert "(EPC) is full" in str(refused)
    assert len(enclaves) > 50
    with created(content, sigstruct):
        pass


def test_who_may_open_the_provision_device_gets_the_provision_key() -> None:
    image = small_image()
    with created(image.to_bytes(), sign(image.mrenclave(), attributes=4 | 0x10)) as info:
        assert info.attributes == 4 | 0x10 | 1


def test_who_may_not_is_told_which_device_and_group() -> None:
    with mode(ENCLAVE, 0o666), mode(PROVISION, 0o600):
        said = as_nobody("""
            try:
                teemate.create_enclave(image.to_bytes(), provisioned, "sgx")
            except teemate.Denied as error:
                print(error.message)
                print(error.detail["step"], error.detail["offset"], error.detail["code"])
        """)
    assert "/dev/sgx_provision" in said
    assert "sgx_prv" in said
    assert said.splitlines()[-1] == "einit 928 0"


def test_a_device_that_may_not_be_opened_names_the_group_and_auto_takes_the_sim() -> None:
    with mode(ENCLAVE, 0o600):
        said = as_nobody("""
            try:
                teemate.create_enclave(image.to_bytes(), plain, "sgx")
            except teemate.Error as error:
                print(type(error).__name__, error.message)
            diag = ffi.new("struct teemate_diag *")
            print(lib.teemate_backend_choose(lib.TEEMATE_AUTO, diag), ffi.string(diag.text).decode())
            print(lib.teemate_backend_choose(lib.TEEMATE_SGX, diag))
        """)
    lines = said.splitlines()
    assert lines[0].startswith("Unsupported ")  # with the doctor's words
    assert "/dev/sgx_enclave" in lines[0]
    assert lines[1].startswith(f"{lib.TEEMATE_SIM} ")
    assert "/dev/sgx_enclave" in lines[1]
    assert "group" in lines[1]
    assert lines[2] == str(-errno.EACCES)


def test_auto_takes_sgx_where_it_works() -> None:
    diag = ffi.new("struct teemate_diag *")
    assert lib.teemate_backend_choose(lib.TEEMATE_AUTO, diag) == lib.TEEMATE_SGX
    assert ffi.string(diag.text) == b""


def test_a_page_of_somebody_elses_unfinished_enclave_is_never_opened() -> None:
    enclave, diag = ffi.new("struct teemate_enclave **"), ffi.new("struct teemate_diag *")
    fd = os.open(ENCLAVE, os.O_RDWR)
    result = lib.teemate_open(lib.TEEMATE_SGX, fd, 0x4000_0000_0000, 0x10000, ffi.NULL, 0, enclave, diag)
    assert result == -errno.ESTALE
    assert b"EINIT has not been done" in ffi.string(diag.text)


def test_an_enclave_of_the_other_backend_is_refused() -> None:
    image = small_image()
    enclave, other = ffi.new("struct teemate_enclave **"), ffi.new("struct teemate_enclave **")
    fd = os.memfd_create("image")
    os.write(fd, image.to_bytes())
    for made, asked in ((lib.TEEMATE_SIM, lib.TEEMATE_SGX), (lib.TEEMATE_SGX, lib.TEEMATE_SIM)):
        assert lib.teemate_create(made, 0, 0, fd, sign(image.mrenclave()), enclave, ffi.NULL) == 0
        info = ffi.new("struct teemate_enclave_info *")
        lib.teemate_enclave_describe(enclave[0], info)
        duplicate = os.dup(lib.teemate_enclave_fd(enclave[0]))
        result = lib.teemate_open(asked, duplicate, info.base, info.size, ffi.NULL, 0, other, ffi.NULL)
        assert result == -errno.ENODEV
        lib.teemate_close(enclave[0])
    os.close(fd)
