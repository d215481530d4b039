"""The gateway's OpenAPI document, made of what it was told."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from .settings import Settings

__all__ = [
    "MAX_ARGUMENTS",
    "MAX_ARGUMENT_BYTES",
    "NAME_PATTERN",
    "STREAM_HEADER",
    "TIMEOUT_HEADER",
    "TIMEOUT_PATTERN",
    "openapi_json",
]

NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
STREAM_HEADER = "TeeMate-Stream"
TIMEOUT_HEADER = "TeeMate-Timeout"
TIMEOUT_PATTERN = "([1-9][0-9]{0,8}(\\.[0-9]{1,9})?|0\\.0{0,8}[1-9][0-9]{0,8})"
"""Seconds, more than 0."""
MAX_ARGUMENTS = 64
MAX_ARGUMENT_BYTES = 4096

_PROBLEM = {
    "type": "object",
    "required": ["title", "status", "code", "detail"],
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string", "description": "As in docs/errors.md; programs read this."},
        "detail": {"type": "string", "description": "For people."},
        "limit": {"type": "string", "description": "Which limit of the function was met."},
        "maximum": {"type": "integer", "description": "What that is."},
        "exit_code": {"type": "integer", "description": "What the function ended with."},
    },
}
_HEALTH = {
    "type": "object",
    "required": ["status", "running", "waiting", "slots"],
    "properties": {
        "status": {"const": "ok"},
        "running": {"type": "integer", "minimum": 0},
        "waiting": {"type": "integer", "minimum": 0},
        "slots": {"type": "integer", "minimum": 1},
    },
}
_FAILURES = {
    400: "A header or the query is wrong.",
    403: "The gateway may not use the enclave, or a browser asked.",
    404: "There is no such function.",
    405: "That method is not for this path.",
    408: "The body was not whole in time, or came too slowly.",
    413: "The body is larger than this gateway takes.",
    422: "The function ended with an exit code, trapped, or met one of its limits.",
    429: "The function has as many requests under way as it may have.",
    500: "The gateway failed.",
    501: "Streams were asked for, and not by HTTP/1.1.",
    502: "The enclave failed.",
    503: "All slots are taken and the queue is full, or the enclave is not to be had.",
    504: "The deadline has passed.",
}


def _failure(status: int) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": _FAILURES[status],
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    if status in (429, 503):
        response["headers"] = {
            "Retry-After": {
                "description": "Seconds after which asking again makes sense.",
                "required": True,
                "schema": {"type": "integer", "minimum": 1},
            }
        }
    return response


def _failures(*statuses: int) -> dict[str, Any]:
    return {str(status): _failure(status) for status in statuses}


def openapi_json(settings: Settings) -> bytes:
    """Return the document (OpenAPI 3.1)."""
    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    invoke = {
        "operationId": "invoke",
        "summary": "Run a function",
        "description": "The body is the function's standard input, the result its standard output.",
        "parameters": [
            {
                "name": "name",
                "in": "path",
                "required": True,
                "schema": {"type": "string", "pattern": f"^{NAME_PATTERN}$"},
            },
            {
                "name": "arg",
                "in": "query",
                "description": f"The function's arguments, together at most {MAX_ARGUMENT_BYTES} bytes.",
                "schema": {
                    "type": "array",
                    "maxItems": MAX_ARGUMENTS,
                    "items": {"type": "string", "pattern": "^[^\\u0000]*$", "maxLength": 64},
                },
            },
            {
                "name": TIMEOUT_HEADER,
                "in": "header",
                "description": f"Deadline in seconds, {settings.max_timeout:g} at most.",
                "schema": {
                    "type": "string",
                    "pattern": f"^{TIMEOUT_PATTERN}$",
                    "default": f"{settings.timeout:g}",
                },
            },
            {
                "name": STREAM_HEADER,
                "in": "header",
                "description": "1: the body goes into the function, and its result comes out, while it runs. "
                "A failure after the result's first byte ends the answer in the middle.",
                "schema": {"type": "string", "enum": ["1"]},
            },
        ],
        "requestBody": {"required": False, "content": {**binary, "*/*": {"schema": {}}}},
        "responses": {
            "200": {"description": "What the function wrote.", "content": binary},
            **_failures(*_FAILURES),
        },
    }
    health = {
        "operationId": "health",
        "summary": "Whether functions can be run",
        "responses": {
            "200": {
                "description": "They can.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Health"}}},
            },
            **_failures(403, 405, 500, 503),
        },
    }
    itself = {
        "operationId": "openapi",
        "summary": "This document",
        "responses": {
            "200": {
                "description": "This document.",
                "content": {"application/json": {"schema": {"type": "object"}}},
            },
            **_failures(403, 405, 500),
        },
    }
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "TeeMate functions",
            "version": version("teemate"),
            "description": "Functions that run inside an enclave.",
        },
        "paths": {
            "/fn/{name}": {"post": invoke},
            "/healthz": {"get": health},
            "/openapi.json": {"get": itself},
        },
        "components": {"schemas": {"Problem": _PROBLEM, "Health": _HEALTH}},
    }
    return json.dumps(document).encode()
