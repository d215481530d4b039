"""Takes the secrets out of messages: what is left may be shown, logged and kept.

A slot key, a MAC or a token is replaced by a pseudonym of the same size, a keyed hash: so one can be
followed from where it was given to where it is used, the message stays one that the schema allows, and
nobody opens anything with it.  The hash's own key is random, made for one viewing or recording, and
written nowhere.

What is known to be public is shown; every other byte string is taken for a secret.  So one that is
added to the protocol later is not shown because nobody thought of this module.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, final

import cbor2

from teemate.errors import Unsupported
from teemate.wire import Encoded, encode_part

__all__ = ["MOST_SECRETS", "Concealer", "is_secret"]

PUBLIC = frozenset({"mrenclave", "mrsigner", "sigstruct"})
"""Byte strings that everybody may see."""
SECRET = frozenset({"key", "bind", "token", "session", "resume"})
"""What is never shown, text neither: somebody may have sent it in the wrong type."""
_ENCODED_PUBLIC = frozenset({"segments"})
_LONGEST_DIGEST = 64
_SURE = 16
"""Bytes that are no accident: a secret of so many can be looked for in an encoding."""
_SEARCHED = 32
"""So many secrets are looked for, each through the whole encoding; with more of them it is made anew."""
MOST_SECRETS = 4096
"""Far more than any message of the protocol has; hashing each of 60000 would keep everybody waiting."""


def is_secret(name: str, value: object) -> bool:
    """Whether `value`, found under the key `name`, is replaced."""
    if isinstance(value, bytes):
        return name not in PUBLIC
    return name in SECRET and isinstance(value, str)


@final
class Concealer:
    """Replaces secrets, each by the same pseudonym wherever it turns up."""

    def __init__(self) -> None:
        self._hash = blake2b(key=os.urandom(32), digest_size=_LONGEST_DIGEST)

    def conceal(self, message: Mapping[str, Any], data: bytes) -> bytes:
        """Return `data`, which encodes `message`, without its secrets.

        Everything else is byte for byte as it was; except that what has many secrets, or some in an unusual
        shape (short ones, text, one of them twice), is encoded anew.

        Raises
        ------
        Unsupported
            There are more than :data:`MOST_SECRETS`.

        """
        found: list[bytes | str] = []
        _find(message, found)
        if len(found) > MOST_SECRETS:
            raise Unsupported(f"not shown: it has {len(found)} byte strings, which may all be secrets")
        if len(found) > _SEARCHED:
            return encode_part(self._copy("", message))
        for secret in found:
            # Exactly once: else it is also something else there, which has to stay as it is.
            if isinstance(secret, str) or len(secret) < _SURE or data.count(secret) != 1:
                return encode_part(self._copy("", message))
            data = data.replace(secret, self._pseudonym(secret))
        return data

    def _copy(self, name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._copy(key, item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._copy(name, item) for item in value]
        if isinstance(value, Encoded):
            return self._copy(name, cbor2.loads(value.data))
        if isinstance(value, cbor2.CBORTag):
            return cbor2.CBORTag(value.tag, self._copy(name, value.value))
        if not is_secret(name, value):
            return value
        if isinstance(value, str):
            return f"secret {self._pseudonym(value.encode())[:4].hex()}"
        return self._pseudonym(value)

    def _pseudonym(self, secret: bytes) -> bytes:
        size = len(secret)
        if not size:
            return secret
        digest = self._hash.copy()
        digest.update(secret)
        return digest.digest().ljust(size, b"\0")[:size]


def _find(items: Mapping[str, Any], found: list[bytes | str]) -> None:
    """Add the secrets in `items` to `found`; mostly there are none, and every message goes through here."""
    for name, value in items.items():
        kind = type(value)
        if kind is int or kind is bool or kind is float:
            continue
        if kind is str:
            if name in SECRET:
                found.append(value)
        elif kind is bytes:
            if name not in PUBLIC:
                found.append(value)
        elif kind is dict:
            _find(value, found)
        else:
            _find_other(name, value, found)


def _find_other(name: str, value: Any, found: list[bytes | str]) -> None:
    if isinstance(value, Encoded):
        if name not in _ENCODED_PUBLIC:
            _find({name: cbor2.loads(value.data)}, found)
    elif isinstance(value, Mapping):
        _find(value, found)
    elif isinstance(value, cbor2.CBORTag):  # the protocol has none, but somebody may try
        _find({name: value.value}, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            kind = type(item)
            if kind is dict:
                _find(item, found)
            elif kind is not int:
                _find({name: item}, found)
