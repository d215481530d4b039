"""Several users of one private enclave: each slot is bound to the identity that the test says."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from teemate import _private

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="speaks as other users")


class _Library:
    """The C library, which takes the identity of a private enclave's slot from this process's."""

    def __init__(self, library: Any, users: Sequence[tuple[int, int]]) -> None:
        self._library, self._users = library, users

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def teemate_private_slot(self, native: Any, number: int, args: Any) -> int:
        uid, gid = self._users[number % len(self._users)]
        os.setresgid(gid, -1, -1)
        os.setresuid(uid, -1, -1)
        try:
            return int(self._library.teemate_private_slot(native, number, args))
        finally:
            os.setresuid(0, -1, -1)
            os.setresgid(0, -1, -1)


@contextlib.contextmanager
def slots_of(users: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Have slot n of an enclave that is built in this block belong to uid and gid n of `users`, in turns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_private, "lib", _Library(_private.lib, users))
        yield
