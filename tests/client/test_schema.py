"""The recorder can fail: what is not in client/protocol.cddl is refused by the validator."""

from __future__ import annotations

from typing import Any

import cbor2
import pycddl
import pytest
from recorder import OK_RULES, Recorder, schema

ATTACH: dict[str, Any] = {"id": 1, "op": "attach", "args": {"enclave": "vault", "slots": 1, "wait": 0.5}}


def test_a_request_as_the_client_sends_it_is_valid() -> None:
    recorder = Recorder()
    recorder.sent(1, cbor2.dumps(ATTACH))
    assert recorder.seen["attach"] == 1


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"enclave": ""},
        {"enclave": "x" * 65},
        {"enclave": "vault", "slots": -1},
        {"enclave": "vault", "slots": 65536},
        {"enclave": "vault", "wait": "long"},
    ],
)
def test_an_attach_with_wrong_arguments_is_invalid(args: dict[str, Any]) -> None:
    with pytest.raises(pycddl.ValidationError):
        Recorder().sent(1, cbor2.dumps({**ATTACH, "args": args}))


def test_an_answer_is_judged_by_what_was_asked() -> None:
    recorder = Recorder()
    recorder.sent(1, cbor2.dumps(ATTACH))
    with pytest.raises(pycddl.ValidationError):
        recorder.received(1, cbor2.dumps({"id": 1, "ok": {}}))
    recorder.sent(2, cbor2.dumps({"id": 1, "op": "ping"}))
    recorder.received(2, cbor2.dumps({"id": 1, "ok": {}}))


def test_an_error_needs_a_code_of_the_list() -> None:
    recorder = Recorder()
    recorder.received(1, cbor2.dumps({"id": None, "error": {"code": "denied", "message": "no"}}))
    with pytest.raises(pycddl.ValidationError):
        recorder.received(1, cbor2.dumps({"id": 1, "error": {"code": "no-such", "message": "no"}}))


def test_an_event_of_another_shape_is_invalid() -> None:
    recorder = Recorder()
    recorder.received(1, cbor2.dumps({"event": "revoked", "grant": 1, "slots": [4], "deadline": 5}))
    with pytest.raises(pycddl.ValidationError):
        recorder.received(1, cbor2.dumps({"event": "revoked", "grant": 1, "slots": [4096], "deadline": 5}))


def test_every_operation_has_rules() -> None:
    for op, rule in OK_RULES.items():
        schema(op.replace(".", "-"))
        schema(rule)
