"""Where the files of enclaves lie: a folder for each, in the broker's state directory.

The broker makes and opens the folder and hands it to the enclave's wardens, one after the other; it
never looks at what is in it.  Folders outlive their enclaves: the next one of the name has the files.
What they are worth is for the enclave's code to check: whoever may write there can change them.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import final

__all__ = ["Storage", "default_state_directory"]

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)


def default_state_directory() -> str:
    """What StateDirectory= of systemd made for this service; "" without it."""
    return os.environ.get("STATE_DIRECTORY", "").split(":")[0]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """The folder of one enclave, and how many bytes its files may take."""

    folder: Path
    limit: int
    lends: bool = False
    """Whether clients may have descriptors of files in it (``io = "client"``)."""

    @classmethod
    def of(cls, state_directory: Path, name: str, limit: int, *, lends: bool = False) -> Storage:
        """Return the folder of the enclave `name`: names of enclaves are plain names of files."""
        return cls(folder=state_directory / "enclaves" / name, limit=limit, lends=lends)

    def open_file(self, name: str, *, writable: bool) -> int:
        """Return a descriptor of the file `name`, which is there, the caller's.

        Raises
        ------
        OSError
            There is none, or it is no plain file of the folder.

        """
        if not _FILE.fullmatch(name):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            how = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            fd = os.open(name, how, dir_fd=folder)
        finally:
            os.close(folder)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), name)
        return fd

    def open(self) -> int:
        """Return a descriptor of the folder, the caller's; made if need be, for its owner alone.

        Raises
        ------
        OSError
            It cannot be made or opened, or is a link.

        """
        for folder in (self.folder.parent.parent, self.folder.parent, self.folder):
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                continue
            made = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(made)  # files in it are promised to be there after a crash
            finally:
                os.close(made)
        return os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
