"""The backend on which the tests make enclaves; the one place that reads TEEMATE_TEST_BACKEND.

``TEEMATE_TEST_BACKEND=sgx`` runs the same tests against Linux's driver: on a host with SGX, or in the
emulated machine (tests/machine).  Without it they run on the sim, whatever the host has.
"""

from __future__ import annotations

import os
from typing import Literal

import pytest


def _chosen() -> Literal["sim", "sgx"]:
    name = os.environ.get("TEEMATE_TEST_BACKEND", "sim")
    if name not in ("sim", "sgx"):
        raise pytest.UsageError(f"TEEMATE_TEST_BACKEND is sim or sgx, not {name!r}")
    if name == "sgx" and not os.path.exists("/dev/sgx_enclave"):
        raise pytest.UsageError(
            "TEEMATE_TEST_BACKEND=sgx, and this host has no /dev/sgx_enclave: "
            "tests/machine/run boots a machine that has one"
        )
    if name == "sgx":
        return "sgx"
    return "sim"


BACKEND = _chosen()
"""``sim`` or ``sgx``, as the Python API, the command line and the protocol spell it."""

NUMBER = {"sim": 1, "sgx": 2}[BACKEND]
"""The same as enum teemate_backend, for tests of the C library and the warden's protocol."""

OTHER = {"sim": "sgx", "sgx": "sim"}[BACKEND]
"""The backend that is not the chosen one."""

SHARING = {"sim": "insecure_sim_sharing = true", "sgx": 'share_between_owners = "unfenced"'}[BACKEND]
"""The line of a policy's [[enclave]] that lets other users than the owner in."""


PATIENCE = 10 if "TEEMATE_IN_MACHINE" in os.environ else 1
"""By how much limits that end a test which hangs are longer: processors of the emulated machine are slow."""


def sim_only(reason: str) -> pytest.MarkDecorator:
    """Mark a test that is about the sim's inner life; `reason` says what hardware has instead."""
    return pytest.mark.skipif(BACKEND != "sim", reason=f"about the sim: {reason}")


def sgx_only(reason: str) -> pytest.MarkDecorator:
    """Mark a test of what only the driver has; `reason` says what that is."""
    return pytest.mark.skipif(BACKEND != "sgx", reason=f"about Linux's SGX driver: {reason}")
