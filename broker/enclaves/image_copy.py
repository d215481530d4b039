"""Images that clients send, copied into sealed memory before anybody looks at them.

The file stays the client's: it can change between being measured and being built, and on FUSE a read, or
even asking for its size, takes as long as the client likes.  So it is read once, in a thread, and
from then on only the copy counts.  At most two files of a user are read at the same time: when these
hang, its other requests wait, and nobody else's.

Known limit: while a file that hangs is open here, starting a process hangs too, since close-on-exec
flushes the child's copy.  So who may `create` can hold up the start of wardens.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, final

import trio

from teemate import errors
from teemate.broker.enclaves.enclave import require_file

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client

__all__ = ["ImageCopies", "copy_image"]

_AT_ONCE = 2
_CHUNK = 1 << 20
_BYTES_PER_PAGE = 2 * (64 + 16 * (64 + 256))
"""EADD and 16 times EEXTEND with its data, twice: nothing that can be built is larger."""
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def copy_image(image_fd: int, pages: int) -> int:
    """Return a sealed copy of the file, which the caller owns; for a thread.  `image_fd` stays the caller's.

    Raises
    ------
    ImageError
        It is no regular file, or cannot be read.
    LimitReached
        It is larger than an image of so many pages can be.

    """
    require_file(image_fd)
    most = _CHUNK + pages * _BYTES_PER_PAGE
    copy = os.memfd_create("teemate-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        size = 0
        while size <= most and (data := os.pread(image_fd, _CHUNK, size)):
            size += len(data)
            view = memoryview(data)
            while view:
                view = view[os.write(copy, view) :]
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(copy)
        raise errors.ImageError(
            f"read: {error.strerror}", {"step": "read", "code": 0, "offset": size}
        ) from error
    except BaseException:
        os.close(copy)
        raise
    if size > most:
        os.close(copy)
        raise errors.LimitReached(
            f"the image is larger than {most} bytes, so it has more than {pages} pages:"
            " the policy sets this in [[create]] pages",
            {"limit": "pages", "maximum": pages, "setting": "[[create]] pages"},
        )
    return copy


@final
class ImageCopies:
    """Copies for all users, a few of each at a time."""

    def __init__(self) -> None:
        self._users: dict[int, trio.CapacityLimiter] = {}

    async def copy(self, client: Client, image_fd: int, pages: int) -> int:
        """As :func:`copy_image`; takes `image_fd` over.  A thread that hangs is left to itself."""
        uid = client.account.uid
        limiter = self._users.setdefault(uid, trio.CapacityLimiter(_AT_ONCE))
        # Whoever takes a descriptor out of its list closes it, be it this task or the thread.
        source, made = [image_fd], list[int]()
        abandoned = False

        def work() -> None:
            fd = source.pop()
            try:
                made.append(copy_image(fd, pages))
            finally:
                source.append(fd)
                if abandoned:
                    _close_all(source)
                    _close_all(made)

        try:
            await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
        except trio.Cancelled:
            abandoned = True
            _close_all(made)
            raise
        finally:
            if source:
                client.dispose((source.pop(),))
            if not limiter.borrowed_tokens and not limiter.statistics().tasks_waiting:
                self._users.pop(uid, None)
        return made.pop()


def _close_all(fds: list[int]) -> None:
    with contextlib.suppress(IndexError):  # the other thread was faster
        while True:
            os.close(fds.pop())
