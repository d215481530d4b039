"""What can be wrong on a host, found and named: the work behind ``teemate doctor``.

:func:`diagnose` looks at processor, firmware, kernel, device nodes, memory, broker, and runs a tiny
enclave on each backend; :func:`why_not_sgx` is the one sentence that everything says which wants
backend ``sgx`` and cannot have it.

The JSON of ``teemate doctor --json`` is :meth:`Diagnosis.as_json`::

    {
      "schema": 1,                  raised when something below changes its meaning or goes
      "backends": {                 could an enclave be created, mapped, entered and left?
        "sgx": true | false,
        "sim": true | false
      },
      "auto": "sgx" | "sim" | "",   what backend = "auto" takes here; "": none can be had
      "auto_reason": text,          why that is not sgx; "" when it is
      "checks": [{
        "id": text,                 of the check; does not change
        "title": text,
        "group": "sgx" | "sim" | "host" | "broker",     "host": both backends
        "status": "ok" | "warning" | "problem" | "unknown" | "not-applicable",
        "found": text,
        "advice": text              what to do; never empty for a problem
      }]
    }

Ids: ``processor``, ``firmware``, ``launch-control``, ``sgx2``, ``kernel-driver``, ``device``,
``device-exec``, ``vdso``, ``epc``, ``provision``, ``sgx-works``; ``xsave``, ``memory``, ``sim-works``;
``fsgsbase``, ``address-window``, ``container``; ``socket``, ``unit``, ``holders``.  New ones may come;
texts may change at any time.
"""

from __future__ import annotations

from teemate.doctor._check import SCHEMA, Check, Diagnosis, Group, Status
from teemate.doctor._diagnose import diagnose, this_host, why_not_sgx
from teemate.doctor._host import Host, Machine

__all__ = [
    "SCHEMA",
    "Check",
    "Diagnosis",
    "Group",
    "Host",
    "Machine",
    "Status",
    "diagnose",
    "this_host",
    "why_not_sgx",
]
