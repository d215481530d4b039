"""Functions through slots of one enclave: the synchronous side, and what the one on trio runs in threads."""

from __future__ import annotations

import builtins
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from teemate._enclave import Enclave
from teemate._grant import WAIT, GrantedEnclave
from teemate._slot import Check, OcallHandler, Slot
from teemate.errors import Busy, CallFailed, Error, LimitReached
from teemate.functions import _wire as wire
from teemate.functions._streams import Ocalls, feeding
from teemate.functions._types import FunctionInfo, FunctionLimits, FunctionLog, FunctionUsage

if TYPE_CHECKING:
    from teemate.functions._sealing import Offer, Sealing, Upload

__all__ = ["Functions"]

_OUTPUT = 1 << 20
_CLOCK = 2.0
"""Seconds by which a call may outlast its timeout: the enclave ends the function by a coarse clock, and keeps
the slot."""

_SLICE = 0.05
_IDLE = 30.0
"""Seconds after which a slot that no call has needed goes back to the broker."""


class Functions:
    """The caller's functions in one enclave.  Thread safe: each call takes a slot of its own.

    What every call raises besides: what ``attach`` and ``slot.call`` do.
    """

    def __init__(self, attach: Callable[[Check | None], Enclave]) -> None:
        self._attach = attach
        self._lock = threading.Lock()
        self._using = threading.Lock()
        self._enclave: Enclave | None = None
        self.idle: float | None = _IDLE
        """Seconds after which calls give slots back that none has needed; None: they give none back."""
        self._gives_back = True
        self._inside = 0
        self._needed: dict[int, float] = {}
        """When so many calls were last under way at once."""
        self._looked = time.monotonic()
        self._output: dict[str, int] = {}
        """Of functions that may write more than is usual."""

    @classmethod
    def of(cls, enclave: Enclave) -> Functions:
        """Return the functions of an enclave that is attached already, or private; it stays the caller's."""
        functions = cls(lambda _: enclave)
        functions._gives_back = False
        return functions

    def deploy(
        self,
        name: str,
        module: bytes,
        *,
        limits: FunctionLimits | None = None,
        env: Mapping[str, str] | None = None,
        replace: bool = False,
        sealed: bool | Sealing = False,
        grants: Iterable[str] = (),
    ) -> FunctionInfo:
        """Check `module`, a WASI command, and keep it in the enclave under `name`.

        With `sealed` module and `env` are encrypted in this process to the enclave that `sealed` names (True:
        whichever it is); :class:`~teemate.functions.SealRefused` when it is another one.  `grants`: ``keys``
        lets it put and get values in a space that this user's functions with that grant share.

        Raises :class:`~teemate.functions.ModuleInvalid` with the reason,
        :class:`~teemate.functions.FunctionExists` unless `replace`, and :class:`teemate.LimitReached` when
        this user's functions, or everybody's, would be too many or too large.
        """
        return self._deploy(name, module, limits, env, replace, sealed, grants, None)

    def deploy_sealed(
        self, name: str, upload: Upload, *, nonce: bytes | None = None, target: bytes = b""
    ) -> FunctionInfo:
        """Deploy what somebody else has sealed (:func:`teemate.functions.seal`), which is not seen here.

        `upload` gets the enclave's offer and returns the upload, for which a slot is kept meanwhile.  `nonce`
        (32 bytes) is of who seals, and so is `target`, the enclave that is to verify the report.
        """
        return self._deploy_sealed(name, upload, nonce, target, None)

    def invoke(
        self,
        name: str,
        payload: bytes = b"",
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """Run the function in a fresh instance: `payload` is its stdin, what it writes to stdout is returned.

        Parameters
        ----------
        args
            Its arguments, after its name.
        env
            Its environment, after what it was deployed with.
        timeout
            Seconds, where the function's own limit is longer.

        Raises
        ------
        FunctionTrapped, FunctionLimit, FunctionFailed, FunctionCrashed
            How it ended (``teemate.functions``).
        NotFound
            This user has no such function.
        CallTimeout
            It took longer than `timeout`.

        """
        return self._invoke(name, payload, args, env, timeout, None)

    def stream(
        self,
        name: str,
        source: Iterable[bytes],
        sink: Callable[[bytes], object],
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> None:
        """Run the function with `source` as its stdin; what it writes goes to `sink` at once.

        A piece of `source` is taken when the function wants to read, so neither is ever whole in memory.
        Both are called in this thread, while the function waits: their time counts, and what they raise ends
        the invocation and is raised here.  Otherwise as :meth:`invoke`; what was written before an invocation
        failed has been given to `sink`.
        """
        self._stream(name, feeding(source, sink), args, env, timeout, None)

    def list(self) -> list[FunctionInfo]:
        """Return this user's functions, by name."""
        return self._list(None)

    def describe(self, name: str) -> FunctionInfo:
        """Return what is known of a function."""
        return self._describe(name, None)

    def logs(self, name: str, *, after: int = 0) -> Sequence[FunctionLog]:
        """Return the invocations that wrote to stderr or failed, after number `after`, the oldest first.

        The last 64 are kept, and 64 KiB of what they wrote.
        """
        return self._logs(name, after, None)

    def remove(self, name: str) -> None:
        """Forget a function and its logs; invocations that run go on."""
        self._remove(name, None)

    def limits(self, name: str, limits: FunctionLimits) -> FunctionInfo:
        """Change limits, from the next invocation on; those that are None stay."""
        return self._limits(name, limits, None)

    def usage(self) -> FunctionUsage:
        """Return what this user's functions take up, and how full the enclave is."""
        return self._usage(None)

    def clear_keys(self) -> None:
        """Delete all that this user's functions have put; it outlives them otherwise."""
        self._clear_keys(None)

    def give_back(self, idle: float = _IDLE) -> int:
        """Give slots back to the broker that no call has needed for `idle` seconds; return how many.

        Calls do so by themselves now and then (:attr:`idle`); who makes none for long may want to.  Of an
        enclave that was attached by others (:meth:`of`) none is given back.
        """
        return self._release(idle, None)

    # ---- the same with `check`, which is called while something is waited for -------------------

    def _deploy(
        self,
        name: str,
        module: bytes,
        limits: FunctionLimits | None,
        env: Mapping[str, str] | None,
        replace: bool,
        sealed: bool | Sealing,
        grants: Iterable[str],
        check: Check | None,
    ) -> FunctionInfo:
        if sealed:
            from teemate.functions._sealing import Sealing, seal

            sealing = sealed if isinstance(sealed, Sealing) else Sealing()

            def upload(offer: Offer) -> bytes:
                return seal(
                    offer,
                    name,
                    module,
                    limits=limits,
                    env=env,
                    replace=replace,
                    grants=grants,
                    sealing=sealing,
                )

            return self._deploy_sealed(name, upload, None, sealing.target(), check)
        request = wire.deploy(name, module, limits, env, replace=replace, grants=grants)
        self._output.pop(name, None)
        return wire.info(self._call("deploy", request, name, check))

    def _deploy_sealed(
        self, name: str, upload: Upload, nonce: bytes | None, target: bytes, check: Check | None
    ) -> FunctionInfo:
        from teemate.functions._sealing import Offer, fresh_nonce

        nonce = fresh_nonce() if nonce is None else nonce
        self._output.pop(name, None)
        enclave, slot = self._take(None, check)
        try:
            # The offer is the slot's: nobody else can use it, or use it up.
            offer = Offer.parse(slot._run("offer", nonce + target, None, None, 4096, check), nonce)
            return wire.info(_told(name, slot, "deploy_sealed", upload(offer), 4096, check))
        finally:
            enclave._give_back(slot)

    def _stream(
        self,
        name: str,
        ocalls: Ocalls,
        args: Sequence[str],
        env: Mapping[str, str] | None,
        timeout: float | None,
        check: Check | None,
    ) -> None:
        request = wire.invoke(name, b"", args, env, timeout, stream=True)
        self._call("invoke", request, name, check, room=wire.room_for(0), timeout=timeout, ocalls=ocalls)

    def _invoke(
        self,
        name: str,
        payload: bytes,
        args: Sequence[str],
        env: Mapping[str, str] | None,
        timeout: float | None,
        check: Check | None,
    ) -> bytes:
        request = wire.invoke(name, payload, args, env, timeout)
        room = self._output.get(name, wire.room_for(_OUTPUT))
        while True:
            try:
                return wire.stdout(self._call("invoke", request, name, check, room=room, timeout=timeout))
            except LimitReached as error:
                needed = error.detail.get("needed")
                if not isinstance(needed, int) or needed <= room:
                    raise
                self._output[name] = room = needed  # nothing has run yet

    def _list(self, check: Check | None) -> builtins.list[FunctionInfo]:
        return [*wire.infos(self._call("list", b"", "", check, room=wire.LIST_MAX))]

    def _describe(self, name: str, check: Check | None) -> FunctionInfo:
        return wire.info(self._call("describe", wire.named(name), name, check))

    def _logs(self, name: str, after: int, check: Check | None) -> Sequence[FunctionLog]:
        reply = self._call("logs", wire.logs(name, after), name, check, room=wire.LOGS_MAX)
        return [*wire.log_entries(reply)]

    def _remove(self, name: str, check: Check | None) -> None:
        self._call("remove", wire.named(name), name, check)

    def _limits(self, name: str, limits: FunctionLimits, check: Check | None) -> FunctionInfo:
        return wire.info(self._call("limits", wire.limits(name, limits), name, check))

    def _clear_keys(self, check: Check | None) -> None:
        self._call("clear_keys", b"", "", check)

    def _usage(self, check: Check | None) -> FunctionUsage:
        return wire.usage(self._call("usage", b"", "", check))

    def _call(
        self,
        ecall: str,
        request: bytes,
        name: str,
        check: Check | None,
        *,
        room: int = 4096,
        timeout: float | None = None,
        ocalls: Mapping[str, OcallHandler] | None = None,
    ) -> bytes:
        enclave, slot = self._take(timeout, check)
        self._count(1)
        try:
            return _told(name, slot, ecall, request, room, check, timeout, ocalls)
        finally:
            enclave._give_back(slot)
            self._count(-1)
            if self.idle is not None and time.monotonic() - self._looked > self.idle:
                self._give_back_aside(self.idle)

    def _count(self, more: int) -> None:
        with self._using:
            self._needed[self._inside] = time.monotonic()
            self._inside += more
            self._needed[self._inside] = time.monotonic()

    def _give_back_aside(self, idle: float) -> None:
        """Give back what is not needed, and never mind: the call has its result, wherever the broker is."""
        enclave, excess = self._excess(idle)
        if enclave is not None:
            with contextlib.suppress(Error):
                enclave._release_untold(excess)

    def _release(self, idle: float, check: Check | None) -> int:
        enclave, excess = self._excess(idle)
        if enclave is None:
            return 0
        try:
            enclave._release(excess, check)
        except Busy:  # taken meanwhile: they are needed
            return 0
        return excess

    def _excess(self, idle: float) -> tuple[GrantedEnclave | None, int]:
        """Return how many slots no call has needed for `idle` seconds, and of what; None: there are none."""
        enclave = self._enclave
        now = self._looked = time.monotonic()
        if not self._gives_back or not isinstance(enclave, GrantedEnclave) or enclave.gone is not None:
            return None, 0
        with self._using:
            needed = max((count for count, when in self._needed.items() if when + idle > now), default=0)
            needed = max(needed, self._inside)
        statistics = enclave.statistics()
        excess = min(statistics.slots - needed, statistics.free)
        return (enclave, excess) if excess > 0 else (None, 0)

    def _take(self, timeout: float | None, check: Check | None) -> tuple[Enclave, Slot]:
        """Return a free slot; the one that was given back last, which has modules ready."""
        wait = WAIT if timeout is None else min(WAIT, timeout)
        deadline = time.monotonic() + wait
        while True:
            enclave = self._attached(check)
            try:
                return enclave, enclave._take(0, check)
            except Busy:
                if not isinstance(enclave, GrantedEnclave):
                    return enclave, enclave._take(wait, check)
            left = max(0.0, deadline - time.monotonic())
            mine = enclave.statistics().slots
            try:
                # Others of this process' own may be given back sooner than a further one.
                enclave._acquire(1, 0 if mine else left, check)
            except (Busy, LimitReached):
                if not mine:
                    raise
                return enclave, enclave._take(left, check)

    def _attached(self, check: Check | None) -> Enclave:
        enclave = self._enclave
        if enclave is not None and enclave.gone is None:
            return enclave
        # Whoever attaches may wait for long, and others have to be able to give up meanwhile.
        while not self._lock.acquire(timeout=-1 if check is None else _SLICE):
            if check is not None:
                check()
        try:
            if self._enclave is None or self._enclave.gone is not None:
                self._enclave = self._attach(check)
            return self._enclave
        finally:
            self._lock.release()


def _told(
    name: str,
    slot: Slot,
    ecall: str,
    request: bytes,
    room: int,
    check: Check | None,
    timeout: float | None = None,
    ocalls: Mapping[str, OcallHandler] | None = None,
) -> bytes:
    """Do one ECALL about the function `name`; raises what its status stands for."""
    limit = None if timeout is None else timeout + _CLOCK
    try:
        return slot._run(ecall, request, limit, ocalls, room, check)
    except CallFailed as error:
        if error.status > 0:
            wire.refused(name, error.status, error.reply, timeout)
        raise
