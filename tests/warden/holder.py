"""A process of its own that holds a slot and makes one call in it (test_slot_repair.py).

Reads one line of JSON: what to map, the slot, the call and how to stand in it.  Says where it stands, and
for each line that follows goes on and says how that ended.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from warden_harness import Client, hangs

from teemate._native import ffi, lib

_NAMES = {
    lib.TEEMATE_CALL_DONE: "done",
    lib.TEEMATE_CALL_OCALL: "parked",
    lib.TEEMATE_CALL_PAUSED: "paused",
    lib.TEEMATE_CALL_FAULT: "fault",
    lib.TEEMATE_CALL_REVOKED: "revoked",
    lib.TEEMATE_CALL_LOST: "lost",
}


def say(text: str) -> None:
    """Tell the test."""
    print(text, flush=True)


def main() -> None:
    """Obey the order."""
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    segments = ffi.new("struct teemate_segment[]", len(order["segments"]))
    for place, (offset, size, prot, kind) in zip(segments, order["segments"], strict=True):
        place.offset, place.size, place.prot, place.type = offset, size, prot, kind
    enclave: Any = SimpleNamespace(
        fd=order["fd"], arena=order["arena"], base=order["base"], size=order["size"], segments=segments,
        tcs=order["tcs"], control_key=bytes.fromhex(order["control_key"]),
    )  # fmt: skip
    client = Client(enclave)
    slot = client.slot(index=order["slot"], generation=order["generation"], key=bytes.fromhex(order["key"]))
    error = 0
    if order["how"] == "paused":
        slot.stand(order["call"], lambda: hangs(order["arena"]))
    else:
        error = slot.begin(order["call"], bytes.fromhex(order["data"]))
    while True:
        if not error and order["how"] != "paused":
            slot.go_on()  # on sgx ticks pause a call without a reason of ours
        say(_NAMES.get(slot.last.outcome, "?") if not error else f"error {error}")
        if not sys.stdin.readline():
            break
        if slot.last.outcome == lib.TEEMATE_CALL_OCALL:
            error = lib.teemate_slot_answer(slot.handle, 0, b"", 0, 0, slot.last)
        else:
            error = lib.teemate_slot_resume(slot.handle, 0, slot.last)
            while not error and slot.last.outcome == lib.TEEMATE_CALL_PAUSED:
                error = lib.teemate_slot_resume(slot.handle, 0, slot.last)


if __name__ == "__main__":
    main()
