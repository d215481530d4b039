"""What an enclave was built from, kept for its next generation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import final

__all__ = ["ImageSource"]


@final
@dataclass(eq=False, slots=True)
class ImageSource:
    """An image's descriptor, which this object owns, and its SIGSTRUCT.

    The descriptor is the one that the enclave was built from, so a file that was put in the image's
    place since then changes nothing.  Whoever writes into the file itself can only make rebuilding
    fail: the SIGSTRUCT is kept in memory and signs one MRENCLAVE.
    """

    fd: int
    sigstruct: bytes
    origin: str
    """For the log: the path in the policy, or who sent it."""

    def close(self) -> None:
        """Close the descriptor; once more is no error."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
