"""Records what the client library and the broker say to each other, and validates it.

The judge is pycddl, an independent implementation of CDDL (RFC 8610), with client/protocol.cddl.
Each message is judged by the rule that it has to match, since a choice of maps that may have further
keys accepts too much; and a control (.size) is checked without its base type there.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import cbor2
import pycddl

SCHEMA = Path(__file__).resolve().parents[1] / "client" / "protocol.cddl"

OK_RULES = {
    "hello": "hello-ok",
    "enclaves": "enclaves-ok",
    "attach": "attach-ok",
    "slots.acquire": "acquire-ok",
    "slots.release": "release-ok",
    "files.open": "empty-ok",
    "detach": "empty-ok",
    "ping": "empty-ok",
    "create": "create-ok",
    "destroy": "destroy-ok",
    "drain": "drain-ok",
    "undrain": "undrain-ok",
    "upgrade": "upgrade-ok",
    "revoke": "revoke-ok",
    "clients": "clients-ok",
    "stats": "stats-ok",
    "holders": "holders-ok",
    "denials": "denials-ok",
    "monitor": "empty-ok",
    "reload": "empty-ok",
}
"""Which rule an operation's answer has to match; an error has to match `reply`."""


@cache
def schema(rule: str) -> pycddl.Schema:
    """The schema with `rule`, a name or an expression, as its root: `message` accepts unknown operations."""
    return pycddl.Schema(f"root = {rule}\n{SCHEMA.read_text()}")


class Recorder:
    """Messages of connections, in order."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._asked: dict[tuple[int, int], str] = {}

    def sent(self, connection: int, data: bytes) -> None:
        """Validate a request of ours."""
        message = cbor2.loads(data)
        op: str = message["op"]
        self._asked[connection, message["id"]] = op
        schema("message").validate_cbor(data)
        if op in OK_RULES:
            schema(op.replace(".", "-")).validate_cbor(data)
        self.seen[op] += 1

    def received(self, connection: int, data: bytes) -> None:
        """Validate an answer or event of the broker's."""
        message: dict[str, Any] = cbor2.loads(data)
        if "event" in message:
            schema(f"{message['event']}-event").validate_cbor(data)
            self.seen[f"event {message['event']}"] += 1
            return
        op = self._asked.get((connection, message["id"]), "")
        if "ok" in message:
            rule = OK_RULES[op]
            schema(f'{{ "id": id, "ok": {rule}, * tstr => any }}').validate_cbor(data)
            self.seen[f"{op} ok"] += 1
        else:
            schema("error-reply").validate_cbor(data)
            self.seen[f"{op} error {message['error']['code']}"] += 1
