"""Requests and replies of the enclave: the mirror of native/enclaves/functions/functions.h."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn

from teemate.errors import CallTimeout, LimitReached, NotFound, ProtocolError
from teemate.functions._errors import (
    BadArgument,
    FunctionCrashed,
    FunctionExists,
    FunctionFailed,
    FunctionLimit,
    FunctionTrapped,
    ModuleInvalid,
    SealRefused,
)
from teemate.functions._types import FunctionInfo, FunctionLimits, FunctionLog, FunctionUsage

__all__ = [
    "LIMITS",
    "LIST_MAX",
    "LOGS_MAX",
    "OUTCOMES",
    "deploy",
    "deploy_parts",
    "info",
    "infos",
    "invoke",
    "limits",
    "logs",
    "named",
    "refused",
    "room_for",
    "stdout",
    "usage",
]

MODULE_MAX = 8 << 20
STRINGS_MAX = 65536
PAYLOAD_MAX = 16 << 20
OUTPUT_MAX = 16 << 20
STREAM_PIECE = 65536
LIMITS = ("", "memory", "fuel", "time", "output", "stack", "heap", "stream")
OUTCOMES = {0: "ok", 5: "trapped", 6: "failed", 7: "limit", 8: "crashed"}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_LIMITS = struct.Struct("<4Q")
_DEPLOY = struct.Struct("<HHIQ")
_HEAD = struct.Struct("<HHI")
_INFO = struct.Struct("<32s32s6Q4QHHI")
_INVOKE = struct.Struct("<HHIIIQ")
_RESULT = struct.Struct("<IiQQQIIII")
_AFTER = struct.Struct("<Q")
_LOG = struct.Struct("<QQIIiIQ")
_USAGE = struct.Struct("<10Q")
_TEXT_MAX = 1024
_REPLACE = 1
_STREAM = 1
_GRANTS = {"keys": 2}
_NOT_FOUND, _EXISTS, _INVALID, _QUOTA, _TRAPPED, _FAILED, _LIMIT, _CRASHED = range(1, 9)
_NO_OFFER, _UNSEALED = 9, 10
LIST_MAX = 64 * (_INFO.size + 63)
LOGS_MAX = 65536 + 64 * _LOG.size

_REMEDY = {
    "memory": "give it more, or let it use less",
    "fuel": "give it more, or let it do less",
    "time": "give it more, or let it do less",
    "output": "give it more, or let it write less",
    "stack": "let it call less deeply",
    "stream": "who was to read or write it here failed",
    "heap": "half of the enclave's heap is in use by this user, or others have it: let fewer run",
}


def _name(name: str) -> bytes:
    if _NAME.fullmatch(name) is None:
        raise BadArgument(
            f"{name!r} names no function: 1 to 63 of A-Z a-z 0-9 . _ -, the first a letter or digit"
        )
    return name.encode()


def _strings(what: str, texts: Sequence[str]) -> bytes:
    if any("\0" in text for text in texts):
        raise BadArgument(f"{what} with a zero byte")
    encoded = b"".join(text.encode(errors="surrogateescape") + b"\0" for text in texts)
    if len(encoded) > STRINGS_MAX:
        raise BadArgument(f"{what} of {len(encoded)} bytes: {STRINGS_MAX} are possible")
    return encoded


def _environment(env: Mapping[str, str] | None) -> bytes:
    for key in env or ():
        if not key or "=" in key:
            raise BadArgument(f"{key!r} names no environment variable")
    return _strings("an environment", [f"{key}={value}" for key, value in (env or {}).items()])


_SECONDS_MAX = 4e9
"""More than a century; in nanoseconds it fits a word."""


def nanoseconds(seconds: float | None) -> int:
    """Return `seconds` as the enclave takes them, 0 for None."""
    if seconds is None:
        return 0
    if not seconds > 0:
        raise BadArgument(f"{seconds} seconds: more than 0 are needed")
    return max(1, int(min(seconds, _SECONDS_MAX) * 1e9))


def _limits(limits: FunctionLimits | None) -> bytes:
    if limits is None:
        return bytes(_LIMITS.size)
    for what in ("memory", "fuel", "output"):
        value = getattr(limits, what)
        if value is not None and not 0 < value < 1 << 64:
            raise BadArgument(f"a limit of {value} for {what}: more than 0 is needed")
    if (limits.output or 0) > OUTPUT_MAX:
        raise BadArgument(f"a limit of {limits.output} for output: {OUTPUT_MAX} is possible")
    return _LIMITS.pack(limits.memory or 0, limits.fuel or 0, nanoseconds(limits.time), limits.output or 0)


def named(name: str) -> bytes:
    """A request that names a function, and no more."""
    encoded = _name(name)
    return _HEAD.pack(len(encoded), 0, 0) + encoded


def limits(name: str, wanted: FunctionLimits) -> bytes:
    """A request to change limits."""
    return named(name) + _limits(wanted)


def logs(name: str, after: int) -> bytes:
    """A request for what was logged after an invocation."""
    encoded = _name(name)
    if not 0 <= after < 1 << 64:
        raise BadArgument(f"after invocation {after}: their numbers are from 0 to 2^64 - 1")
    return _HEAD.pack(len(encoded), 0, 0) + _AFTER.pack(after) + encoded


def _flags(grants: Iterable[str], *, replace: bool) -> int:
    flags = _REPLACE if replace else 0
    for grant in grants:
        if grant not in _GRANTS:
            raise BadArgument(f"{grant!r} is no grant: there is {', '.join(map(repr, _GRANTS))}")
        flags |= _GRANTS[grant]
    return flags


def deploy_parts(
    name: str,
    module: bytes,
    limits: FunctionLimits | None,
    env: Mapping[str, str] | None,
    *,
    replace: bool,
    grants: Iterable[str] = (),
) -> tuple[bytes, bytes]:
    """A request to deploy: its head, and what it is about, which may be sealed."""
    encoded, strings = _name(name), _environment(env)
    if not 0 < len(module) <= MODULE_MAX:
        raise ModuleInvalid(f"{name}: a module of {len(module)} bytes: 1 to {MODULE_MAX} are possible")
    head = _DEPLOY.pack(len(encoded), _flags(grants, replace=replace), len(strings), len(module))
    return b"".join((head, _limits(limits), encoded)), b"".join((strings, module))


def deploy(
    name: str,
    module: bytes,
    limits: FunctionLimits | None,
    env: Mapping[str, str] | None,
    *,
    replace: bool,
    grants: Iterable[str] = (),
) -> bytes:
    """A request to deploy."""
    return b"".join(deploy_parts(name, module, limits, env, replace=replace, grants=grants))


def invoke(
    name: str,
    payload: bytes,
    args: Sequence[str],
    env: Mapping[str, str] | None,
    timeout: float | None,
    *,
    stream: bool = False,
) -> bytes:
    """A request to invoke; with `stream` input is asked for, and output given, by OCALLs."""
    encoded, arguments, strings = _name(name), _strings("arguments", args), _environment(env)
    if len(payload) > PAYLOAD_MAX:
        raise BadArgument(f"{name}: a payload of {len(payload)} bytes: {PAYLOAD_MAX} are possible")
    flags = _STREAM if stream else 0
    head = _INVOKE.pack(len(encoded), flags, len(arguments), len(strings), len(payload), nanoseconds(timeout))
    return b"".join((head, encoded, arguments, strings, payload))


def room_for(output: int) -> int:
    """Bytes of the reply to an invocation that may write `output`."""
    return _RESULT.size + _TEXT_MAX + output


def infos(reply: bytes) -> Iterator[FunctionInfo]:
    """Yield what a reply tells of functions."""
    at = 0
    while at < len(reply):
        if len(reply) - at < _INFO.size:
            raise ProtocolError("the enclave's reply ends within a function")
        digest, owner, version, size, deployed, invocations, failures, fuel, *rest = _INFO.unpack_from(
            reply, at
        )
        memory, most_fuel, time, output, length, flags, _ = rest
        at += _INFO.size + length
        if at > len(reply):
            raise ProtocolError("the enclave's reply ends within a function's name")
        yield FunctionInfo(
            name=reply[at - length : at].decode(errors="replace"),
            owner=owner.hex(),
            digest=digest.hex(),
            size=size,
            version=version,
            deployed=deployed / 1e9,
            invocations=invocations,
            failures=failures,
            fuel=fuel,
            limits=FunctionLimits(memory=memory, fuel=most_fuel, time=time / 1e9, output=output),
            grants=tuple(grant for grant, flag in _GRANTS.items() if flags & flag),
        )


def info(reply: bytes) -> FunctionInfo:
    """Return the one function that a reply tells of."""
    told = [*infos(reply)]
    if len(told) != 1:
        raise ProtocolError(f"the enclave's reply tells of {len(told)} functions, and of one was asked")
    return told[0]


def log_entries(reply: bytes) -> Iterator[FunctionLog]:
    """Yield what was logged, the oldest first."""
    at = 0
    while at < len(reply):
        if len(reply) - at < _LOG.size:
            raise ProtocolError("the enclave's reply ends within a log's head")
        number, time, status, limit, code, length, dropped = _LOG.unpack_from(reply, at)
        at += _LOG.size + length
        if at > len(reply):
            raise ProtocolError("the enclave's reply ends within a log")
        yield FunctionLog(
            invocation=number,
            time=time / 1e9,
            outcome=OUTCOMES.get(status, str(status)),
            limit=LIMITS[limit] if limit < len(LIMITS) else str(limit),
            exit_code=code,
            text=reply[at - length : at],
            dropped=dropped,
        )


def usage(reply: bytes) -> FunctionUsage:
    """Return what a reply tells of the caller's functions."""
    if len(reply) != _USAGE.size:
        raise ProtocolError(f"the enclave's reply about its use has {len(reply)} bytes")
    functions, size, maximum, heap, used, owned, keys, keys_size, keys_maximum, ready = _USAGE.unpack(reply)
    return FunctionUsage(
        functions=functions,
        size=size,
        maximum=maximum,
        heap=heap,
        heap_used=used,
        blocks_owned=owned,
        heap_ready=ready,
        keys=keys,
        keys_size=keys_size,
        keys_maximum=keys_maximum,
    )


class _Result(NamedTuple):
    limit: str
    exit_code: int
    maximum: int
    fuel: int
    text: bytes
    stdout: bytes


def _result(reply: bytes) -> _Result:
    if len(reply) < _RESULT.size:
        raise ProtocolError(f"the enclave's reply to an invocation has {len(reply)} bytes")
    limit, exit_code, maximum, fuel, _, text, out, _, _ = _RESULT.unpack_from(reply)
    middle = _RESULT.size + text
    if middle + out > len(reply):
        raise ProtocolError("the enclave's reply to an invocation ends within its text or its result")
    name = LIMITS[limit] if limit < len(LIMITS) else str(limit)
    return _Result(name, exit_code, maximum, fuel, reply[_RESULT.size : middle], reply[middle : middle + out])


def stdout(reply: bytes) -> bytes:
    """Return what an invocation that succeeded has written."""
    return _result(reply).stdout


def refused(name: str, status: int, reply: bytes, timeout: float | None = None) -> NoReturn:
    """Raise what the positive `status` of a call about the function `name` stands for."""
    if status == _NOT_FOUND:
        raise NotFound(f"there is no function {name!r} of this user: `teemate fn list` shows what there is")
    if status == _EXISTS:
        raise FunctionExists(f"there is a function {name!r} already: replace it, or take another name")
    if status == _INVALID:
        raise ModuleInvalid(f"{name}: {reply.decode(errors='replace')}")
    if status == _QUOTA:
        raise LimitReached(
            f"{name}: 64 functions, or a quarter of the enclave's heap for their modules, are what a user "
            "may have (and half of it what all users may): remove some, or build the image with more --heap"
        )
    if status == _NO_OFFER:
        raise SealRefused(f"{name}: the enclave has made no offer here, or it was used: ask for another one")
    if status == _UNSEALED:
        raise SealRefused(
            f"{name}: the enclave cannot open the upload: it is for another offer, or was changed on its way"
        )
    if status == _CRASHED and len(reply) < _RESULT.size:
        raise FunctionCrashed(f"{name}: the engine gave up on the module: {reply.decode(errors='replace')}")
    result = _result(reply)
    text = result.text.decode(errors="replace")
    detail: dict[str, object] = {"function": name, "fuel": result.fuel}
    if status == _TRAPPED:
        raise FunctionTrapped(f"{name}: {text}", detail)
    if status == _FAILED:
        last = text.strip().rpartition("\n")[2]
        raise FunctionFailed(
            f"{name}: exit code {result.exit_code}{f': {last}' if last else ''}",
            result.exit_code,
            result.text,
            detail,
        )
    if status == _LIMIT:
        if result.limit == "time" and timeout is not None and result.maximum == nanoseconds(timeout):
            raise CallTimeout(f"{name}: the invocation took longer than its timeout of {timeout:g} s", detail)
        amount = f"{result.maximum / 1e9:g} s" if result.limit == "time" else f"{result.maximum:,}"
        if result.limit == "stream":
            raise FunctionLimit(f"{name}: its stream ended: {_REMEDY['stream']}", "stream", 0, detail)
        what = f"its limit of {result.limit}{f' ({amount})' if result.maximum else ''}"
        why = f": {text}" if text else ""
        raise FunctionLimit(
            f"{name}: the invocation met {what}{why}: {_REMEDY.get(result.limit, '')}",
            result.limit,
            result.maximum,
            detail,
        )
    if status == _CRASHED:
        raise FunctionCrashed(f"{name}: the engine gave up on this invocation: {text}", detail)
    raise ProtocolError(f"{name}: the enclave answered with status {status}, which is unknown")
