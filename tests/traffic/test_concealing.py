"""Secrets are taken out of messages, and nothing else is."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest

from teemate import wire
from teemate.errors import Unsupported
from teemate.traffic.concealing import MOST_SECRETS, Concealer

KEY, BIND, TOKEN = b"K" * 16, b"B" * 88, b"T" * 32
MRENCLAVE = b"M" * 32


def conceal(message: dict[str, Any], concealer: Concealer | None = None) -> tuple[bytes, dict[str, Any]]:
    data = (concealer or Concealer()).conceal(message, wire.encode(message))
    return data, wire.decode(data)


def test_slot_keys_macs_and_tokens_become_pseudonyms_of_the_same_size() -> None:
    slot = {"slot": 3, "tcs": 4096, "generation": 1, "key": KEY, "bind": BIND}
    message = {"id": 1, "ok": {"mrenclave": MRENCLAVE, "slots": [slot], "token": TOKEN}}
    data, concealed = conceal(message)
    assert not any(secret in data for secret in (KEY, BIND, TOKEN))
    (shown,) = concealed["ok"]["slots"]
    assert (len(shown["key"]), len(shown["bind"]), len(concealed["ok"]["token"])) == (16, 88, 32)
    assert concealed["ok"]["mrenclave"] == MRENCLAVE
    hidden = {"key": KEY, "bind": BIND}
    assert {**concealed, "ok": {**concealed["ok"], "slots": [{**shown, **hidden}], "token": TOKEN}} == message


def test_a_secret_has_one_pseudonym_in_a_recording_and_another_one_in_the_next() -> None:
    one, two = Concealer(), Concealer()
    given = conceal({"id": 1, "ok": {"token": TOKEN}}, one)[1]["ok"]["token"]
    used = conceal({"id": 1, "op": "hello", "args": {"resume": TOKEN}}, one)[1]["args"]["resume"]
    other = conceal({"id": 1, "ok": {"token": TOKEN}}, two)[1]["ok"]["token"]
    assert given == used != other


def test_byte_strings_that_nobody_has_called_public_are_secrets() -> None:
    data, _ = conceal({"id": 1, "ok": {"something": {"new": [b"N" * 20]}}})
    assert b"N" * 20 not in data


def test_secrets_of_the_wrong_type_or_size_are_concealed_too() -> None:
    args = {"resume": TOKEN.hex(), "session": b"short", "slots": [[b"x"]]}
    message = {"id": 1, "op": "hello", "args": args}
    data, concealed = conceal(message)
    assert TOKEN.hex().encode() not in data
    assert concealed["args"]["resume"].startswith("secret ")
    assert len(concealed["args"]["session"]) == 5
    assert concealed["args"]["session"] != b"short"


def test_a_secret_that_is_also_something_else_does_not_damage_the_message() -> None:
    zeros = bytes(32)
    args = {"session": zeros, "numbers": [0] * 64, "sigstruct": bytes(64)}
    message = {"id": 1, "op": "hello", "args": args}
    _, concealed = conceal(message)
    assert concealed["args"]["session"] != zeros
    assert concealed["args"]["numbers"] == [0] * 64
    assert concealed["args"]["sigstruct"] == bytes(64)


def test_the_same_secret_twice_is_concealed_twice() -> None:
    data, concealed = conceal({"id": 1, "ok": {"slots": [{"key": KEY}, {"key": KEY}]}})
    assert KEY not in data
    first, second = concealed["ok"]["slots"]
    assert first == second


class Searched(bytes):
    """Counts how often it is searched through."""

    searches = 0

    def count(self, *args: Any) -> int:
        Searched.searches += 1
        return super().count(*args)

    def replace(self, *args: Any) -> Searched:
        Searched.searches += 1
        return Searched(super().replace(*args))


def test_however_many_secrets_there_are_a_message_is_searched_through_a_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else one message of a client costs its size squared, in the thread that serves everybody."""
    monkeypatch.setattr(Searched, "searches", 0)
    secrets = [number.to_bytes(16, "big") for number in range(1, 3801)]
    message = {"id": 1, "op": "ping", "args": {"x": secrets}}
    data = Searched(wire.encode(message))
    shown = wire.decode(Concealer().conceal(message, data))["args"]["x"]  # type: ignore[index]
    assert Searched.searches <= 100
    assert len({*shown, *secrets}) == 2 * len(secrets)
    assert {len(secret) for secret in shown} == {16}


def test_more_secrets_than_any_message_has_are_not_hashed_one_by_one() -> None:
    concealer = Concealer()
    conceal({"id": 1, "op": "ping", "args": {"x": [b"", b"x"] * (MOST_SECRETS // 2)}}, concealer)
    with pytest.raises(Unsupported, match=f"{MOST_SECRETS + 1} byte strings"):
        conceal({"id": 1, "op": "ping", "args": {"x": [b""] * (MOST_SECRETS + 1)}}, concealer)


def test_what_was_encoded_before_is_looked_into_unless_it_is_known() -> None:
    message = {"id": 1, "ok": {"segments": wire.Encoded([[0, 4096, 1, 2]]), "other": wire.Encoded([KEY])}}
    data = Concealer().conceal(message, wire.encode(message))
    assert KEY not in data
    assert cbor2.loads(data)["ok"]["segments"] == [[0, 4096, 1, 2]]


@pytest.mark.parametrize("message", [{}, {"id": 1, "op": "ping"}, {"event": "ready", "enclave": "vault"}])
def test_a_message_without_secrets_stays_as_it_was_byte_for_byte(message: dict[str, Any]) -> None:
    # A client may encode in another way than ours: the id takes nine bytes here.
    data = wire.encode(message).replace(b"\x62id\x01", b"\x62id\x1b" + (1).to_bytes(8, "big"))
    assert Concealer().conceal(message, data) == data
