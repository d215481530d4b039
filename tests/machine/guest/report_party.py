"""One party of local attestation, on either backend: report_party.py BACKEND SGXS SIGSTRUCT <ORDERS.

Reads a JSON object from standard input: ``verify``, a list of reports (hex).  Makes an enclave of the vault,
prints a JSON object: ``own``, a report by this enclave for itself (so for every enclave of the same image on
this platform), ``verdicts``: what the enclave said of each report (``genuine``, ``forged``, ``foreign``), and
``mrenclave`` and ``mrsigner`` as the enclave itself has them.
"""

from __future__ import annotations

import json
import sys

import teemate
from teemate.report import Report, ReportRejected
from teemate.vault import Vault


def verdict(vault: Vault, report: bytes) -> str:
    """What the enclave says of the report."""
    try:
        vault.verify(report)
    except ReportRejected as rejected:
        return rejected.reason.value
    return "genuine"


def main() -> None:
    """Do it."""
    backend, sgxs, sigstruct = sys.argv[1:]
    orders = json.load(sys.stdin)
    with teemate.create_enclave(sgxs, sigstruct, backend) as enclave, enclave.slot() as slot:
        vault = Vault(slot)
        own = vault.report(b"whoever asks")
        said = Report.parse(own)
        verdicts = [verdict(vault, bytes.fromhex(report)) for report in orders["verify"]]
    print(
        json.dumps(
            {
                "own": own.hex(),
                "verdicts": verdicts,
                "mrenclave": said.mrenclave.hex(),
                "mrsigner": said.mrsigner.hex(),
                "cpusvn": said.cpusvn.hex(),
                "simulated": said.simulated,
            }
        )
    )


if __name__ == "__main__":
    main()
