"""REPORTs: what an enclave says of itself to another one on the same computer (local attestation).

EREPORT makes a report for one target enclave, under a key that only that enclave can derive, so only
enclaves verify reports: here the vault does (:meth:`teemate.vault.Vault.verify`), in an enclave of
one's own ``tm_report_verify`` does.  The structures are those of the SDM, volume 3D::

    with broker.attach("vault") as enclave, enclave.slot() as slot:
        vault = Vault(slot)
        target = Report.parse(vault.report()).target()       # of who is to be convinced
        report = vault.verify(other_vault.report(nonce, target))
        assert report.mrenclave == expected and not report.debug and report.data == nonce

A report that verifies on the sim convinces of nothing: its keys are public.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

from teemate.errors import CallFailed, ProtocolError

__all__ = ["REPORT_SIZE", "TARGET_SIZE", "Rejection", "Report", "ReportRejected"]

REPORT_SIZE = 432
TARGET_SIZE = 512

# CPUSVN MISCSELECT ISVEXTPRODID ATTRIBUTES XFRM MRENCLAVE MRSIGNER CONFIGID ISVPRODID ISVSVN CONFIGSVN
# ISVFAMILYID REPORTDATA KEYID MAC
_REPORT = struct.Struct("<16sI12x16sQQ32s32x32s32x64sHHH42x16s64s32s16s")
# MEASUREMENT ATTRIBUTES XFRM (CET_ATTRIBUTES) CONFIGSVN MISCSELECT CONFIGID
_TARGET = struct.Struct("<32sQQ2xHI8x64s384x")
_DEBUG = 2
_SIM_CPUSVN = b"sim".ljust(16, b"\0")


class Rejection(Enum):
    """Why a report convinces nobody."""

    FORGED = "forged"
    """Made for another enclave or on another computer, or changed on the way."""
    FOREIGN = "foreign"
    """The same, and it does not even claim this platform: a report of the sim on SGX, or the reverse."""


class ReportRejected(CallFailed):
    """The enclave that verified a report rejected it; ``reason`` says why."""

    def __init__(self, message: str, status: int, reason: Rejection) -> None:
        super().__init__(message, status, detail={"reason": reason.value})
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Report:
    """The fields of a REPORT.  Reading them verifies nothing."""

    cpusvn: bytes
    miscselect: int
    attributes: int
    xfrm: int
    mrenclave: bytes
    mrsigner: bytes
    isvprodid: int
    isvsvn: int
    configid: bytes
    configsvn: int
    isvextprodid: bytes
    isvfamilyid: bytes
    data: bytes
    """REPORTDATA: 64 bytes of the enclave's choice."""
    keyid: bytes
    mac: bytes

    @classmethod
    def parse(cls, report: bytes) -> Report:
        """Read the 432 bytes; ProtocolError when they are not as many."""
        if len(report) != REPORT_SIZE:
            raise ProtocolError(f"a REPORT has {REPORT_SIZE} bytes, this one {len(report)}")
        (
            cpusvn, miscselect, isvextprodid, attributes, xfrm, mrenclave, mrsigner, configid, isvprodid,
            isvsvn, configsvn, isvfamilyid, data, keyid, mac,
        ) = _REPORT.unpack(report)  # fmt: skip
        return cls(
            cpusvn=cpusvn,
            miscselect=miscselect,
            attributes=attributes,
            xfrm=xfrm,
            mrenclave=mrenclave,
            mrsigner=mrsigner,
            isvprodid=isvprodid,
            isvsvn=isvsvn,
            configid=configid,
            configsvn=configsvn,
            isvextprodid=isvextprodid,
            isvfamilyid=isvfamilyid,
            data=data,
            keyid=keyid,
            mac=mac,
        )

    @property
    def debug(self) -> bool:
        """The enclave that made it can be read from outside."""
        return bool(self.attributes & _DEBUG)

    @property
    def simulated(self) -> bool:
        """It claims to come from the sim, which protects nothing."""
        return self.cpusvn == _SIM_CPUSVN

    def target(self) -> bytes:
        """Return the TARGETINFO, 512 bytes, for reports to the enclave that made this one."""
        return _TARGET.pack(
            self.mrenclave, self.attributes, self.xfrm, self.configsvn, self.miscselect, self.configid
        )
