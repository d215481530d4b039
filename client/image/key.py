"""Signing keys: RSA with 3072 bits and the public exponent 3, in a PEM file that only its owner can read.

No function here prints a key or puts one into an error or a log.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ._problem import problem

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

__all__ = ["generate_key", "load_key", "save_key"]


def generate_key() -> RSAPrivateKey:
    """Return a new key (SDM 3D, SIGSTRUCT: 3072 bits, exponent 3)."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    # A small exponent is what SGX demands; with full PKCS#1 v1.5 padding checked it is sound.
    return rsa.generate_private_key(public_exponent=3, key_size=3072)


def save_key(key: RSAPrivateKey, path: Path) -> None:
    """Write `key` to a new file of mode 0600.

    Raises FileExistsError rather than replace a key, which nobody could bring back.
    """
    from cryptography.hazmat.primitives import serialization

    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(pem)


def load_key(path: Path) -> RSAPrivateKey:
    """Read a PEM key.

    Raises :class:`~teemate.errors.ImageError` (step ``key``) when others can read the file, when it is
    no key or is encrypted, or when SGX cannot use it; OSError when it cannot be read.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise problem(
                "key",
                f"{path} has mode {mode:04o}, so others can use it: chmod 600 it, and make a new key "
                "if somebody may have read it",
                file=str(path),
            )
        pem = file.read(1 << 20)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError as exc:
        raise problem(
            "key", f"{path} is encrypted: decrypt it first, or sign with your own tool", file=str(path)
        ) from exc
    except ValueError as exc:
        # The reason may quote parts of the file, so it is left out.
        raise problem("key", f"{path} is no private key in PEM", file=str(path)) from exc.__cause__
    if not isinstance(key, RSAPrivateKey) or key.key_size != 3072 or key.public_key().public_numbers().e != 3:
        raise problem(
            "key",
            f"{path} is no RSA key with 3072 bits and exponent 3: see `teemate image key`",
            file=str(path),
        )
    return key
