"""What the warden and private enclaves do with a request for a file, whoever made it up."""

from __future__ import annotations

import errno
import gc
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI
from native_library import build_library

OPEN, READ, WRITE, SYNC, SIZE, TRUNCATE, DELETE = range(1, 8)
CREATE, AGAIN = 1, 2
MOST = 65536


class Folder:
    """files.h for Python."""

    def __init__(self, library: Path, folder: Path, limit: int = 0) -> None:
        self._ffi = FFI()
        self._ffi.cdef(
            "int files_open(int directory, uint64_t limit, void **files);"
            "void files_close(void *files);"
            "int64_t files_do(void *files, const void *request, void *data);"
        )
        self._lib: Any = self._ffi.dlopen(str(library))
        self.descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        pointer = self._ffi.new("void **")
        assert self._lib.files_open(self.descriptor, limit, pointer) == 0
        self._files = pointer[0]
        self.data = self._ffi.new("uint8_t[]", MOST)

    def close(self) -> None:
        self._lib.files_close(self._files)
        os.close(self.descriptor)

    def ask(
        self,
        op: int,
        name: bytes = b"a",
        *,
        flags: int = 0,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
    ) -> int:
        """Do one request; `name` may have 64 bytes, which is one too many."""
        self._ffi.memmove(self.data, data, len(data))
        request = struct.pack("<IIQQ64s", op, flags, offset, length or len(data), name)
        return int(self._lib.files_do(self._files, request, self.data))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(["files.c"], tmp_path_factory.mktemp("files") / "files.so", [])


@pytest.fixture
def make(library: Path, tmp_path: Path) -> Iterator[Callable[..., Folder]]:
    made: list[Folder] = []

    def open_folder(limit: int = 0) -> Folder:
        made.append(Folder(library, tmp_path / "files", limit))
        return made[-1]

    (tmp_path / "files").mkdir()
    yield open_folder
    for folder in made:
        folder.close()


def test_what_a_dead_warden_may_have_done_already_is_no_failure(make: Callable[..., Folder]) -> None:
    ask = make().ask
    assert ask(OPEN, flags=CREATE) == 0
    assert ask(DELETE) == 0
    assert ask(DELETE) == -errno.ENOENT
    assert ask(DELETE, flags=AGAIN) == 0
    assert ask(OPEN, flags=CREATE | AGAIN) == 0
    assert ask(OPEN, flags=CREATE | AGAIN) == 0
    assert ask(OPEN, b"b", flags=AGAIN) == -errno.ENOENT


def test_a_delete_that_is_repeated_is_on_the_disk_too(make: Callable[..., Folder], tmp_path: Path) -> None:
    folder = make()
    path = os.open(tmp_path / "files", os.O_PATH)
    os.dup2(path, folder.descriptor)  # a folder in which one can look and which cannot be synced
    os.close(path)
    assert folder.ask(DELETE, b"gone") == -errno.ENOENT
    assert folder.ask(DELETE, b"gone", flags=AGAIN) == -errno.EBADF


@pytest.mark.parametrize(
    "name",
    [
        b"",
        b".",
        b"..",
        b"../outside",
        b"/etc/passwd",
        b"a/../../outside",
        b"a/b",
        b".a",
        b"_a",
        b"\xc3\xa4",
        b"n" * 64,
    ],
)
def test_no_name_leads_out_of_the_folder(make: Callable[..., Folder], tmp_path: Path, name: bytes) -> None:
    (tmp_path / "outside").write_text("untouched")
    ask = make().ask
    assert ask(OPEN, name, flags=CREATE) == -errno.EINVAL
    assert ask(WRITE, name, data=b"x") == -errno.EINVAL
    assert ask(DELETE, name) == -errno.EINVAL
    assert (tmp_path / "outside").read_text() == "untouched"
    assert not any((tmp_path / "files").iterdir())


def test_links_and_what_is_no_file_are_refused(make: Callable[..., Folder], tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("untouched")
    (tmp_path / "files" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "files" / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "files" / "pipe")
    ask = make().ask
    for name in (b"link", b"dangling"):
        assert ask(OPEN, name, flags=CREATE) == -errno.ELOOP
        assert ask(WRITE, name, data=b"x") == -errno.ELOOP
    assert ask(READ, b"pipe", length=1) == -errno.EACCES
    assert [ask(DELETE, name) for name in (b"link", b"pipe")] == [-errno.EACCES] * 2
    assert (tmp_path / "outside").read_text() == "untouched"
    assert not (tmp_path / "nowhere").exists()


def test_requests_that_cannot_be_are_refused(make: Callable[..., Folder]) -> None:
    ask = make().ask
    assert ask(OPEN, flags=CREATE) == 0
    for op in (0, 8, 0xFFFFFFFF):
        assert ask(op) == -errno.EINVAL
    for op in (READ, WRITE):
        assert ask(op, length=MOST + 1) == -errno.EINVAL
        assert ask(op, length=(1 << 64) - 1) == -errno.EINVAL
        assert ask(op, offset=(1 << 64) - 1, length=2) == -errno.EINVAL
    assert ask(TRUNCATE, offset=1 << 63) == -errno.EINVAL
    assert ask(SIZE) == 0


def test_the_limit_counts_blocks_of_every_file_also_of_those_that_were_there(
    make: Callable[..., Folder], tmp_path: Path
) -> None:
    (tmp_path / "files" / "before").write_bytes(bytes(4097))
    ask = make(4 * 4096).ask
    assert ask(OPEN, flags=CREATE) == 0  # an empty one counts as one block
    assert ask(WRITE, offset=4095, data=b"x") == 1
    assert ask(WRITE, offset=8192, data=b"x") == -errno.ENOSPC
    assert ask(WRITE, offset=8191, data=b"x") == 1
    assert ask(OPEN, b"b", flags=CREATE) == -errno.ENOSPC
    assert ask(TRUNCATE, offset=1) == 0
    assert ask(OPEN, b"b", flags=CREATE) == 0
    assert ask(DELETE, b"before") == 0
    assert ask(TRUNCATE, offset=12288) == 0
    assert ask(TRUNCATE, offset=12289) == -errno.ENOSPC
    assert ask(SIZE) == 12288


def test_more_files_than_it_keeps_open_are_no_matter(make: Callable[..., Folder]) -> None:
    ask = make().ask
    gc.collect()  # what tests before this one have left goes now
    before = len(os.listdir("/proc/self/fd"))
    names = [b"f%d" % n for n in range(150)]
    for name in names:
        assert ask(OPEN, name, flags=CREATE) == 0
        assert ask(WRITE, name, offset=10, data=name) == len(name)
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    for name in names:
        assert ask(SIZE, name) == 10 + len(name)
        assert ask(SYNC, name) == 0
        assert ask(DELETE, name) == 0
    assert len(os.listdir("/proc/self/fd")) == before
