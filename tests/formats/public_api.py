"""The functions of teemate.h that take images, as Python sees them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from backends import NUMBER

from teemate._native import ffi, lib


@dataclass(eq=False)
class RefusalError(Exception):
    """What a function said when it failed."""

    error: int
    step: int
    code: int
    offset: int
    text: str


@contextmanager
def file_of(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        yield fd
    finally:
        os.close(fd)


def _check(result: int, diag: Any) -> None:
    if result < 0:
        text = ffi.string(diag.text).decode()
        raise RefusalError(-result, diag.step, diag.code, diag.offset, text)


def measure(content: bytes) -> Any:
    """Return struct teemate_image_info of `content`."""
    info, diag = ffi.new("struct teemate_image_info *"), ffi.new("struct teemate_diag *")
    with file_of(content) as fd:
        _check(lib.teemate_image_measure(fd, info, diag), diag)
    return info


def refusal_of(content: bytes) -> RefusalError | None:
    """Return why `content` is not measured, or None when it is."""
    try:
        measure(content)
    except RefusalError as refusal:
        return refusal
    return None


def verify(sigstruct: bytes, mrenclave: bytes | None = None) -> bytes:
    """Return MRSIGNER of a SIGSTRUCT that is right."""
    diag, mrsigner = ffi.new("struct teemate_diag *"), ffi.new("uint8_t[32]")
    expected = ffi.NULL if mrenclave is None else mrenclave
    assert len(sigstruct) == 1808
    _check(lib.teemate_sigstruct_verify(sigstruct, expected, mrsigner, diag), diag)
    return bytes(mrsigner)


@contextmanager
def created(content: bytes, sigstruct: bytes, *, base: int = 0, attributes: int = 0) -> Iterator[Any]:
    """Yield a struct teemate_enclave of the chosen backend, and close it."""
    enclave, diag = ffi.new("struct teemate_enclave **"), ffi.new("struct teemate_diag *")
    assert len(sigstruct) == 1808
    with file_of(content) as fd:
        result = lib.teemate_create(NUMBER, base, attributes, fd, sigstruct, enclave, diag)
    _check(result, diag)
    try:
        yield enclave[0]
    finally:
        lib.teemate_close(enclave[0])
