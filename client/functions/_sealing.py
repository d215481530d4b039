"""Sealed uploads: a function's code and environment, encrypted to the enclave that will run it.

The enclave makes a key for one upload and names it in a report; who seals looks at the report, agrees on a
key with what it names, and encrypts.  Whoever passes the upload on (the process that deploys it, the host)
sees the function's name, its limits and how long it is.

What a report convinces of: only enclaves of the same computer can verify one, so :class:`Sealing` takes a
vault.  Without it the report is believed as the broker is.  On the sim everybody can make reports.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teemate.errors import ProtocolError
from teemate.functions import _wire as wire
from teemate.functions._errors import SealRefused
from teemate.functions._types import FunctionLimits
from teemate.report import REPORT_SIZE, Report

if TYPE_CHECKING:
    from teemate.vault import Vault

__all__ = ["Offer", "Sealing", "Upload", "fresh_nonce", "seal"]

NONCE_SIZE = 32
_OFFERED = struct.Struct("<32s32s")
_OFFER = b"teemate functions offer 1".ljust(32, b"\0")
_UPLOAD = b"teemate functions upload 1".ljust(32, b"\0")
_TAG = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What an enclave offers for one sealed upload: its key, for whom, and the report that says so."""

    key: bytes
    owner: str
    """Whose the function will be: :attr:`FunctionInfo.owner`."""
    nonce: bytes
    """Of who asked: an offer that was made for another is refused."""
    report: bytes

    @classmethod
    def parse(cls, reply: bytes, nonce: bytes) -> Offer:
        """Read the enclave's reply; nothing is verified."""
        if len(reply) != _OFFERED.size + REPORT_SIZE:
            raise ProtocolError(f"the enclave's offer has {len(reply)} bytes")
        key, owner = _OFFERED.unpack_from(reply)
        return cls(key=key, owner=owner.hex(), nonce=nonce, report=reply[_OFFERED.size :])


Upload = Callable[[Offer], bytes]
"""Makes the upload for an offer, wherever: what :func:`seal` returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealing:
    """Which enclave an upload is sealed for; what is None is not compared."""

    mrenclave: bytes | None = None
    mrsigner: bytes | None = None
    owner: str | None = None
    """Whose the function has to become."""
    verifier: Vault | None = None
    """An enclave of this computer that verifies the report (:meth:`teemate.vault.Vault.verify`)."""
    debug: bool = False
    """Seal for an enclave of debug mode too, which can be read from outside."""

    def target(self) -> bytes:
        """Return whom the report is for, as the enclave takes it."""
        return b"" if self.verifier is None else Report.parse(self.verifier.report()).target()

    def check(self, offer: Offer) -> None:
        """Raise SealRefused unless `offer` is of an enclave that is to have the code."""
        report = Report.parse(offer.report)
        if self.verifier is not None:
            self.verifier.verify(offer.report)
        words = hashlib.sha256(_OFFER + offer.key + offer.nonce + bytes.fromhex(offer.owner)).digest()
        if report.data[:32] != words:
            raise SealRefused("the report is about another key, another request or another owner")
        for what, wanted, found in (
            ("MRENCLAVE", self.mrenclave, report.mrenclave),
            ("MRSIGNER", self.mrsigner, report.mrsigner),
        ):
            if wanted is not None and wanted != found:
                raise SealRefused(
                    f"the enclave's {what} is {found.hex()}, and {wanted.hex()} is to have the function"
                )
        if self.owner is not None and self.owner != offer.owner:
            raise SealRefused(f"the function would be {offer.owner}'s, and is to be {self.owner}'s")
        if report.debug and not self.debug:
            raise SealRefused("the enclave is of debug mode, and can be read from outside")


def fresh_nonce() -> bytes:
    """Return the nonce of a request for an offer."""
    return os.urandom(NONCE_SIZE)


def seal(
    offer: Offer,
    name: str,
    module: bytes,
    *,
    limits: FunctionLimits | None = None,
    env: Mapping[str, str] | None = None,
    replace: bool = False,
    grants: Iterable[str] = (),
    sealing: Sealing | None = None,
) -> bytes:
    """Return an upload of `module` and `env` that only the enclave of `offer` can open, once.

    Name, limits, grants and lengths go in the clear, and cannot be changed.  Raises
    :class:`~teemate.functions.SealRefused` when `sealing` does not want the enclave.
    """
    (sealing or Sealing()).check(offer)
    bound, content = wire.deploy_parts(name, module, limits, env, replace=replace, grants=grants)
    return _encrypt(offer, bound, content)


def _encrypt(offer: Offer, bound: bytes, content: bytes) -> bytes:
    # Here, and not above: programs that seal nothing do not pay for it.
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash

    own = X25519PrivateKey.generate()
    public = own.public_key().public_bytes_raw()
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(offer.key))
    except ValueError as error:
        raise SealRefused("the offer's key is of low order: no enclave of ours makes such a one") from error
    words = _UPLOAD + offer.key + public + offer.nonce + bytes.fromhex(offer.owner)
    key = ConcatKDFHash(algorithm=SHA256(), length=16, otherinfo=words).derive(secret)
    sealed = AESGCM(key).encrypt(bytes(12), content, bound)
    return b"".join((public, sealed[-_TAG:], bound, sealed[:-_TAG]))
