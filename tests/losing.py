"""Take an enclave's EPC away under everybody who uses it, as a suspend or a migrated machine does."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from backends import BACKEND

from teemate import Enclave
from teemate._native import lib

LOSE_EPC = Path("/run/teemate-machine/lose-epc")
"""Where the emulated machine takes the word for it (tests/machine)."""

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
    if not LOSE_EPC.exists():
        pytest.skip("this machine cannot lose its EPC on command: tests/machine/run boots one that can")
    LOSE_EPC.write_text("1")
