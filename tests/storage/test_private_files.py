"""Files of a private enclave: done by the calling thread, in a folder or by the program itself."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backends import BACKEND
from files_image import CREATE, EINVAL, EIO, ELOOP, ENOENT, ENOSPC, ENOSYS, MOST, READ_ONLY, Files
from images import BuiltImage

import teemate
from teemate._native import ffi, lib

OPEN, READ, WRITE, SYNC, SIZE, TRUNCATE, DELETE = range(1, 8)
_REQUEST = struct.Struct("<IIQQ64s")


def create_enclave(image: BuiltImage, **options: Any) -> Any:
    return teemate.create_enclave(image.sgxs, image.sigstruct, BACKEND, **options)


@pytest.fixture
def private(files_image: BuiltImage) -> Iterator[Callable[..., Any]]:
    """Create private enclaves that end with the test."""
    with contextlib.ExitStack() as made:

        def create(**options: Any) -> Any:
            return made.enter_context(create_enclave(files_image, **options))

        yield create


def test_its_files_lie_in_the_folder_that_it_was_given(private: Callable[..., Any], tmp_path: Path) -> None:
    enclave = private(storage=tmp_path)
    (tmp_path / "link").symlink_to("/etc/passwd")
    with enclave.slot() as slot:
        files = Files(slot)
        assert files.open("a", READ_ONLY) == -ENOENT
        handle = files.open("a", CREATE)
        block = os.urandom(MOST)
        assert files.write(handle, 5, block) == MOST
        assert files.read(handle, 5, MOST) == block
        assert files.read(handle, 5 + MOST - 3, 10) == block[-3:]
        assert files.read(handle, 0, MOST + 1) == -EINVAL
        assert files.write(handle, 1 << 63, b"x") == -EINVAL
        assert files.sync(handle) == 0
        assert files.open("link") == -ELOOP
        reader = files.open("a", READ_ONLY)
        assert files.write(reader, 0, b"x") == -errno.EBADF
        assert files.truncate(reader, 0) == -errno.EBADF
        assert [files.close(reader), files.close(reader)] == [0, -errno.EBADF]
    assert (tmp_path / "a").read_bytes() == bytes(5) + block


def test_handles_run_out_in_a_slot_and_not_in_the_host(private: Callable[..., Any], tmp_path: Path) -> None:
    """More files than the host keeps open: which of them it has is nothing that anybody sees."""
    enclave = private(storage=tmp_path)
    with enclave.slot() as first, enclave.slot() as second:
        slots = [Files(first), Files(second)]
        for n, files in enumerate(slots):
            handles = [files.open(f"{n}-{i}") for i in range(64)]
            assert handles == list(range(64))
            assert files.open("one-more") == -errno.EMFILE
        for files in slots:
            assert [files.write(i, 0, b"%d" % i) for i in range(64)] == [len(str(i)) for i in range(64)]
        for files in slots:
            assert [files.read(i, 0, 9) for i in range(64)] == [b"%d" % i for i in range(64)]


def test_without_a_folder_it_has_none(private: Callable[..., Any], tmp_path: Path) -> None:
    with private().slot() as slot:
        assert Files(slot).open("a") == -ENOSYS
    with pytest.raises(teemate.NotFound, match="storage="):
        private(storage=tmp_path / "missing")


class Disk:
    """A disk in this program, which answers what the test says."""

    def __init__(self, enclave: Any) -> None:
        self.requests: list[tuple[int, str, int, bytes]] = []
        self.answers: dict[int, int] = {}

        @ffi.callback("teemate_disk")  # type: ignore[misc]
        def do(_context: Any, request: Any, data: Any) -> int:
            op, _, offset, length, name = _REQUEST.unpack(bytes(ffi.buffer(request, _REQUEST.size)))
            written = bytes(ffi.buffer(data, length)) if op == WRITE else b""
            self.requests.append((op, name.rstrip(b"\0").decode(), offset, written))
            return self.answers.get(op, length)

        self._do = do
        assert lib.teemate_private_disk(enclave._native, do, ffi.NULL) == 0


def test_the_program_can_be_the_disk_and_its_failures_come_back(private: Callable[..., Any]) -> None:
    enclave = private()
    disk = Disk(enclave)
    with enclave.slot() as slot:
        files = Files(slot)
        disk.answers = {OPEN: -errno.EMFILE}
        assert files.open("a") == -errno.EMFILE
        disk.answers = {OPEN: 0, SYNC: -EIO, SIZE: 12}
        handle = files.open("a")
        assert files.write(handle, 7, b"torn") == 4
        assert files.sync(handle) == -EIO
        assert files.size(handle) == 12
        disk.answers = {WRITE: 3, READ: 5}
        assert files.write(handle, 0, b"torn") == -EIO
        assert files.read(handle, 0, 4) == -EIO
        disk.answers = {WRITE: -ENOSPC, READ: 0}
        assert files.write(handle, 0, b"torn") == -ENOSPC
        assert files.read(handle, 0, 4) == b""
    assert disk.requests[2] == (WRITE, "a", 7, b"torn")


def test_a_disk_that_is_full_is_told_as_such(files_image: BuiltImage, tmp_path: Path) -> None:
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small file system takes root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(tmp_path)], check=False)
    if done.returncode != 0:
        pytest.skip("this container mounts nothing")
    try:
        with create_enclave(files_image, storage=tmp_path) as enclave, enclave.slot() as slot:
            files = Files(slot)
            handle = files.open("a")
            assert files.write(handle, 0, bytes(MOST)) == -ENOSPC
            assert files.truncate(handle, 0) == 0
            assert files.write(handle, 0, bytes(4096)) == 4096
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
