"""Enclaves with functions for the tests: the installed image, and owners that are played at its gate."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from backends import PATIENCE
from elves import compile_elf
from images import BuiltImage, Images, image_table, layout_options, sources

import teemate
from teemate._enclave import Enclave
from teemate._faults import status_error
from teemate.functions import Functions
from teemate.functions import _wire as wire
from teemate.image import SigParams, layout_image, sign_with_key

sys.path.append(str(Path(__file__).parents[1] / "sdk"))
from gate import (  # the tests of the SDK have it
    ARGUMENT,
    CLEAR,
    ECALL,
    ERESUME,
    OK,
    PAUSED,
    RESET,
    UNWIND,
    Call,
    Gate,
    Holder,
)


def functions_image() -> Path:
    """The image that is installed with the package; without cargo there is none."""
    image = Path(teemate.__file__).parent / "images" / "functions.sgxs"
    if not image.exists():
        pytest.skip("the functions enclave was not built: there was no cargo (build log)")
    return image


def installed() -> BuiltImage:
    """The same, as tests that play the warden take it."""
    image = functions_image()
    layout = layout_options("functions")
    return BuiltImage(
        name="functions",
        sgxs=image,
        sigstruct=image.with_suffix(".sig"),
        elf=image.with_suffix(".elf"),
        mrenclave=bytes(32),
        slots=layout.slots,
    )


def engine_module() -> ModuleType:
    """What compiles the engine, as a module."""
    folder = Path(__file__).parents[2] / "native" / "enclaves" / "functions"
    spec = importlib.util.spec_from_file_location("engine_library", folder / "engine_library.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weakened(images: Images, folder: Path, *defines: str, **layout: object) -> BuiltImage:
    """The image with protections switched off: what guards them has to go red here."""
    functions_image()
    library = engine_module().engine_library()
    elf = folder / "functions.elf"
    compile_elf(sources("functions"), elf, defines=list(defines), archives=[library])
    options = layout_options("functions", **({"slots": 4} | layout))
    assert image_table("functions")["library"] == "engine_library.py"
    built = layout_image(elf, elf.with_suffix(".sgxs"), options)
    signature = sign_with_key(SigParams().unsigned(built.mrenclave), images.key)
    sigstruct = elf.with_suffix(".sig")
    sigstruct.write_bytes(signature.to_bytes())
    return BuiltImage(
        name="functions", sgxs=built.sgxs, sigstruct=sigstruct, elf=elf, mrenclave=built.mrenclave,
        slots=options.slots,
    )  # fmt: skip


__all__ = [
    "ARGUMENT",
    "CLEAR",
    "ECALL",
    "ERESUME",
    "OK",
    "PAUSED",
    "RESET",
    "UNWIND",
    "Call",
    "Gate",
    "Holder",
]


def leave_inside(gate: Gate, holder: Holder, name: str) -> Call:
    """Interrupt an invocation that does not end, and leave it where it is."""
    slot = holder.slot
    call = Call(b"invoke", wire.invoke(name, b"", (), None, None), wire.room_for(1 << 20))
    left = gate.interrupt(slot, holder.key, ECALL, call.address)
    begin = time.thread_time()
    while time.thread_time() - begin < 0.1 * PATIENCE:  # of its own: it has begun long before
        assert left.outcome == PAUSED
        left = gate.enter(slot, bytes(16), function=ERESUME, pause_after_ns=10_000_000, finish=False)
    return call


def kill(gate: Gate, holder: Holder) -> None:
    """Have the slot of a call that was left inside repaired, as when its client was killed."""
    slot, generation = holder.slot, holder.generation
    assert gate.control(CLEAR, slot, generation=generation).status == OK
    assert gate.enter(slot, gate.key, UNWIND, generation).nonce == 1
    gate.enter(slot, bytes(16), function=ERESUME)
    assert gate.control(RESET, slot).status == OK


class Owner:
    """A slot's holder in the place of an attached enclave: what :class:`Functions` needs of one."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        self.gone = None

    def _take(self, _wait: float, _check: object) -> Owner:
        return self

    def _give_back(self, _slot: Owner) -> None:
        pass

    def _run(
        self,
        name: str,
        payload: bytes,
        _timeout: float | None,
        _ocalls: Mapping[str, Any] | None,
        room: int,
        _check: object,
    ) -> bytes:
        status, output = self.holder.call(name.encode(), payload, room)
        if status:
            raise status_error(status, "functions", name, len(output), output)
        return output


def owner(gate: Gate, slot: int, uid: int, *, generation: int = 1) -> Functions:
    """The functions of user `uid`, who has `slot`."""
    return functions_of(gate.assign(slot, generation, uid=uid))


def functions_of(holder: Holder) -> Functions:
    """The functions of who holds a slot."""
    return Functions.of(cast(Enclave, Owner(holder)))


def principal(uid: int) -> str:
    """As the gate's `bind` asserts it, in hexadecimal."""
    return hashlib.sha256(f"uid={uid}".encode()).hexdigest()


def names(functions: Functions) -> Sequence[str]:
    """Of the functions that are there."""
    return [info.name for info in functions.list()]
