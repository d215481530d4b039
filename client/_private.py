"""Private enclaves: built, mapped and entered by this process alone, the conventional way."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from teemate._backend import choose_backend
from teemate._enclave import Enclave, map_enclave, new_handle
from teemate._faults import native_error, new_diag
from teemate._native import ffi, lib
from teemate._slot import Slot
from teemate._types import SlotGrant
from teemate.errors import Denied, ImageError, NotFound, Unsupported

__all__ = ["create_enclave"]

_BACKENDS = {"auto": lib.TEEMATE_AUTO, "sim": lib.TEEMATE_SIM, "sgx": lib.TEEMATE_SGX}
_ATTRIBUTE_DEBUG = 2
_WARDEN_SLOTS = 2
_SIGSTRUCT_SIZE = 1808
_CTL_SSA = 6
_CONTROL_SIZE = 352
_RESULT_SIZE = 512

ImageSource = str | os.PathLike[str] | bytes


class PrivateEnclave(Enclave):
    """An enclave of this process's own; its warden is the C library."""

    _elf: Path | None = None

    def _place(self, slot: Slot) -> tuple[int, str] | None:
        return interrupted_at(self._native, slot.index, self._elf)


def create_enclave(
    image: ImageSource,
    sigstruct: ImageSource,
    backend: str = "auto",
    *,
    debug: bool = False,
    name: str | None = None,
    storage: str | os.PathLike[str] | None = None,
) -> Enclave:
    """Build an enclave that belongs to this process alone, and map it.

    Parameters
    ----------
    image, sigstruct
        Path of the SGXS file and of its SIGSTRUCT, or their bytes.  Where the image's unstripped
        ELF lies beside it (``.elf``), faults are shown as function and line.
    backend
        ``sgx``, ``sim``, or ``auto``: sgx where it works.
    debug
        Set the DEBUG attribute, if the SIGSTRUCT allows it.
    name
        For messages and ``repr``; the image's file name without its ending unless set.
    storage
        A folder that exists, for the files of the enclave's code, which this process then reads
        and writes for it; None: it has none.  Files are made with mode 0600.  Whoever can write there
        can change them: what they are worth is for the enclave's code to check.

    Raises
    ------
    ImageError
        With the step that failed, and the offset of the record at fault.
    AddressInUse, Denied, LimitReached, NotFound, Unsupported
        As the message says; NotFound is about `storage`.

    """
    if backend not in _BACKENDS:
        raise Unsupported(f"no backend {backend!r}: it is auto, sim or sgx", {"backend": backend})
    label = name or (Path(os.fspath(image)).stem if not isinstance(image, bytes) else "private")
    signature = sigstruct if isinstance(sigstruct, bytes) else _read(sigstruct)
    if len(signature) != _SIGSTRUCT_SIZE:
        raise ImageError(
            f"a SIGSTRUCT has {_SIGSTRUCT_SIZE} bytes, this one {len(signature)}",
            {"step": "sigstruct", "offset": len(signature)},
        )
    handle = new_handle()
    diag = new_diag()
    fd = _image_fd(image)
    try:
        error = lib.teemate_create(
            _BACKENDS[backend], 0, _ATTRIBUTE_DEBUG if debug else 0, fd, signature, handle, diag
        )
    finally:
        os.close(fd)
    if error:
        if backend != "auto" and -error in (errno.ENODEV, errno.EACCES, errno.EPERM):
            choose_backend(backend)  # raises with all that is known, when the backend is what is missing
        raise native_error(error, diag, f"creating enclave {label!r}")
    native = handle[0]
    info = ffi.new("struct teemate_enclave_info *")
    map_enclave(native, label)
    try:
        _start(native, info, label)
        if storage is not None:
            _give_storage(native, info, Path(storage), label)
        enclave = PrivateEnclave(
            native,
            name=label,
            base=info.base,
            size=info.size,
            mrenclave=bytes(ffi.buffer(info.mrenclave)),
            pages=info.pages,
            slots=_sdk_slots(native, info) if info.sdk else _raw_slots(native, info),
        )
    except BaseException:  # Ctrl-C among them
        lib.teemate_close(native)
        raise
    if not isinstance(image, bytes):
        elf = Path(os.fspath(image)).with_suffix(".elf")
        enclave._elf = elf if elf.is_file() else None
    return enclave


def _start(native: Any, info: Any, label: str) -> None:
    diag = new_diag()
    error = lib.teemate_enclave_describe(native, info)
    if not error and info.sdk:
        error = lib.teemate_private_start(native, diag)
    if error:
        raise native_error(error, diag, f"starting enclave {label!r}")


def _give_storage(native: Any, info: Any, folder: Path, label: str) -> None:
    """Let the enclave's code keep its files in `folder`."""
    if not info.sdk:
        raise Unsupported(f"enclave {label!r}: storage is for images that were built with the SDK")
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        kind = Denied if isinstance(error, PermissionError) else NotFound
        raise kind(
            f"enclave {label!r}: storage={str(folder)!r}: {error.strerror}:"
            " name a folder that this process may write to",
            {"storage": str(folder)},
        ) from error
    try:
        status = lib.teemate_private_storage(native, fd, 0)
    finally:
        os.close(fd)
    if status:
        raise native_error(status, new_diag(), f"giving enclave {label!r} its storage {str(folder)!r}")


def interrupted_at(native: Any, index: int, elf: Path | None) -> tuple[int, str] | None:
    """Ask the enclave where slot `index` was interrupted; None when it does not tell (release images)."""
    control = ffi.new("uint64_t[]", _CONTROL_SIZE // 8)
    result = ffi.new("uint64_t[]", _RESULT_SIZE // 8)
    control[0] = _CTL_SSA  # struct tm_control: op, slot, generation, argument
    control[1] = index
    control[3] = 0
    status = ffi.new("int32_t *")
    if lib.teemate_private_control(native, control, result, status) or status[0] or not result[4]:
        return None
    offset = int(result[4])
    return offset, locate(elf, offset)


def locate(elf: Path | None, offset: int) -> str:
    """Return ``function (file:line)`` of an offset from the base, or "" when the ELF is not at hand."""
    if elf is None:
        return ""
    from teemate.image.elf import Symbols  # late: parsing ELF is for those who have a fault

    try:
        place = Symbols(elf).at(offset)
    except (ImageError, OSError):
        return ""  # the fault is the news, not that its name is not known
    return str(place) if place.function or place.file else ""


def _sdk_slots(native: Any, info: Any) -> list[SlotGrant]:
    args = ffi.new("struct teemate_slot_args *")
    slots = []
    for number in range(info.tcs_count - _WARDEN_SLOTS):
        if lib.teemate_private_slot(native, number, args):
            break
        slots.append(
            SlotGrant(
                args.index,
                args.tcs_offset,
                args.generation,
                bytes(ffi.buffer(args.key)),
                bytes(ffi.buffer(args.bind)),
            )
        )
    return slots


def _raw_slots(native: Any, info: Any) -> list[SlotGrant]:
    offsets = ffi.new("uint64_t[]", info.tcs_count)
    count = lib.teemate_enclave_tcs(native, offsets, info.tcs_count)
    return [SlotGrant(number, offsets[number], 0, bytes(16), bytes(88)) for number in range(count)]


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(os.fspath(path)).read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read {os.fspath(path)}: {error.strerror}", {"step": "read"}) from None


def _image_fd(image: ImageSource) -> int:
    """Return a descriptor of the image; the caller owns it."""
    if not isinstance(image, bytes):
        try:
            return os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(
                f"cannot open image {os.fspath(image)}: {error.strerror}", {"step": "read"}
            ) from None
    fd = os.memfd_create("teemate-image", os.MFD_CLOEXEC)
    try:
        view = memoryview(image)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
