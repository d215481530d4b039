"""What an HTTP client is told about what happened.

Failures are problem details (RFC 9457).  The status says whose turn it is: 4xx the client's, where what the
function itself did wrong is 422, since asking again changes nothing; 503 and 429 may be asked again after
``Retry-After``; 504 the deadline.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import final

from ..errors import Error

__all__ = ["Answer", "Refused", "of_error", "problem"]

RETRY_AFTER = 1
"""Seconds after which a slot may well be free: functions are short."""

_STATUS: dict[str, int] = {
    "not-found": 404,
    "denied": 403,
    "busy": 503,
    "draining": 503,
    "revoked": 503,
    "enclave-lost": 503,
    "not-attached": 503,
    "connection-lost": 503,
    "call-timeout": 504,
    "call-abandoned": 504,
    "limit-reached": 503,
    "function-failed": 422,
    "function-trapped": 422,
    "function-limit": 422,
    "function-argument": 400,
    "function-crashed": 502,
    "enclave-fault": 502,
}
_TOLD = ("limit", "maximum", "exit_code")
# What the broker and the enclave say of themselves is for the log, what a function logs for its owner
# (`teemate fn logs`).
_OPAQUE = {
    403: "the gateway may not use the enclave: its log says more",
    500: "the gateway failed: its log says more",
    502: "the enclave failed: the gateway's log says more",
    503: "the enclave is not to be had for now: the gateway's log says more",
    504: "the function was not done by the deadline",
}


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response; `headers` beside those of every response."""

    status: int
    body: bytes
    content_type: str
    headers: tuple[tuple[bytes, bytes], ...] = field(default=())


class Refused(Exception):  # noqa: N818 - not an error of ours
    """A request gets this answer instead of a result."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


def problem(status: int, code: str, detail: str, **facts: object) -> Answer:
    """A failure; 429 and 503 say when to ask again."""
    body = {"title": HTTPStatus(status).phrase, "status": status, "code": code, "detail": detail, **facts}
    headers: list[tuple[bytes, bytes]] = []
    if status in (429, 503):
        headers.append((b"retry-after", str(RETRY_AFTER).encode()))
    if status == 405:
        headers.append((b"allow", str(facts["allow"]).encode()))
    return Answer(status, json.dumps(body, default=str).encode(), "application/problem+json", tuple(headers))


def of_error(error: Error) -> Answer:
    """What an invocation raised."""
    status = _STATUS.get(error.code, 500)
    if error.code == "function-limit":
        # Time is the deadline's; the heap is full of others', and may not be soon.
        status = {"time": 504, "heap": 503}.get(str(error.detail.get("limit")), status)
    facts = {}
    message = _OPAQUE.get(status, error.message)
    if error.code.startswith("function-"):
        facts = {name: error.detail[name] for name in _TOLD if name in error.detail}
        if status in (503, 504):
            message = error.message  # of its limits, not of the machine
    if error.code == "function-failed":
        message = f"the function ended with exit code {facts.get('exit_code')}"
    return problem(status, error.code, message, **facts)
