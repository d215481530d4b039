"""The warden's structures are the same for C and for whoever mirrors them in Python."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import warden_wire as wire

NATIVE = Path(__file__).resolve().parents[2] / "native"

# C spells these members differently, since they are inside of the union.
BODY = {
    "body.start.base": wire.StartBody.base,
    "body.start.size": wire.StartBody.size,
    "body.start.backend": wire.StartBody.backend,
    "body.start.segment_count": wire.StartBody.segment_count,
    "body.start.control_key": wire.StartBody.control_key,
    "body.start.segments": wire.StartBody.segments,
    "body.control.op": wire.Control.op,
    "body.control.data": wire.Control.data,
    "body.repair.slot": wire.RepairBody.slot,
    "body.repair.generation": wire.RepairBody.generation,
    "body.repair.holder_dead": wire.RepairBody.holder_dead,
    "body.renew.clear": wire.RenewBody.clear,
    "body.renew.reset": wire.RenewBody.reset,
    "body.renew.arm": wire.RenewBody.arm,
    "body.renew.holder_dead": wire.RenewBody.holder_dead,
}


def _lines() -> list[tuple[str, str, int]]:
    """(what it is for people, C expression, what Python has)."""
    lines = []
    for name, (mirror, _) in wire.STRUCTURES.items():
        lines.append((f"sizeof {name}", f"sizeof(struct {name})", ctypes.sizeof(mirror)))
        for field, *_ in mirror._fields_:
            descriptor = getattr(mirror, field)
            lines.append((f"{name}.{field}", f"offsetof(struct {name}, {field})", descriptor.offset))
            lines.append(
                (f"size of {name}.{field}", f"sizeof(((struct {name} *)0)->{field})", descriptor.size)
            )
    offset = wire.WardenRequest.body.offset
    lines += [
        (name, f"offsetof(struct warden_request, {name})", offset + descriptor.offset)
        for name, descriptor in BODY.items()
    ]
    lines += [
        (name, name, getattr(wire, python))
        for name, python in {
            "WARDEN_PROTOCOL_VERSION": "PROTOCOL_VERSION",
            "WARDEN_SEGMENTS": "SEGMENTS",
            "WARDEN_START": "START",
            "WARDEN_CONTROL": "CONTROL",
            "WARDEN_PROBE": "PROBE",
            "WARDEN_REPAIR": "REPAIR",
            "WARDEN_PING": "PING",
            "WARDEN_RENEW": "RENEW",
            "WARDEN_STEP_CLEAR": "STEP_CLEAR",
            "WARDEN_STEP_REPAIR": "STEP_REPAIR",
            "WARDEN_STEP_RESET": "STEP_RESET",
            "WARDEN_STEP_ARM": "STEP_ARM",
            "TM_CTL_ARM": "ARM",
            "TM_CTL_REINIT": "REINIT",
            "TM_CTL_AUTHOR": "AUTHOR",
            "TM_CTL_REPORT": "REPORT",
            "TM_SLOT_PARKED": "PARKED",
        }.items()
    ]
    return lines


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What the C compiler says, in the order of `_lines`."""
    folder = tmp_path_factory.mktemp("mirror")
    source = folder / "mirror.c"
    prints = "".join(f'    printf("%lld\\n", (long long)({expression}));\n' for _, expression, _ in _lines())
    source.write_text(
        f'#include <stdio.h>\n#include "protocol.h"\n\nint main(void)\n{{\n{prints}    return 0;\n}}\n'
    )
    program = folder / "mirror"
    subprocess.run(
        ["cc", "-std=gnu17", f"-I{NATIVE}/include", f"-I{NATIVE}/warden", str(source), "-o", str(program)],
        check=True,
    )
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return [int(line) for line in output.split()]


def test_python_mirrors_every_field_where_c_has_it(compiled: list[int]) -> None:
    expected = {name: number for (name, _, _), number in zip(_lines(), compiled, strict=True)}
    assert {name: number for name, _, number in _lines()} == expected
