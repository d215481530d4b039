"""Take an enclave's EPC away under everybody who uses it, as a suspend or a migrated machine does."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest
from backends import BACKEND

from teemate import Enclave
from teemate._native import lib

BREAKER = Path(__file__).resolve().parent / "machine" / "guest" / "epc"
"""Takes the emulated machine's EPC away, or poisons a page of it."""

# native/lib/sim.h: header and TCS table follow the pages; then the EPCM, a word for each page.
_SIM_EPOCH = 228
_SIM_EPCM = 4096 + 4096 * 64


def lose_epc(enclave: Enclave) -> None:
    """Make every page of `enclave` invalid; on sgx, where the machine loses all of it, of every enclave."""
    if BACKEND == "sim":
        fd = lib.teemate_enclave_fd(enclave._handle())
        os.pwrite(fd, bytes(enclave.size // 4096 * 8), enclave.size + _SIM_EPCM)
        (epoch,) = struct.unpack("<I", os.pread(fd, 4, enclave.size + _SIM_EPOCH))
        os.pwrite(fd, struct.pack("<I", epoch + 1), enclave.size + _SIM_EPOCH)
        return
    break_epc("lose")


def break_epc(*arguments: str) -> None:
    """Do what tests/machine/guest/epc does; skips the test where there is a real processor."""
    if "TEEMATE_IN_MACHINE" not in os.environ:
        pytest.skip("no real processor breaks its EPC on command: tests/machine/run boots one that does")
    subprocess.run([BREAKER, *arguments], check=True)
