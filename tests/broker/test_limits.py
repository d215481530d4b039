"""Charges, accounts and buckets."""

from __future__ import annotations

import pytest

from teemate.broker.policy.limits import Ledger, Limits, Resource, TokenBucket
from teemate.errors import LimitReached


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_limit_is_per_uid_and_its_error_names_it_and_its_setting() -> None:
    ledger = Ledger(Limits(grants=2))
    account = ledger.account(1000)
    charges = [account.charge(Resource.GRANTS), account.charge(Resource.GRANTS)]
    with pytest.raises(LimitReached) as refused:
        account.charge(Resource.GRANTS)
    assert refused.value.detail == {"limit": "grants", "maximum": 2, "used": 2, "setting": "[limits] grants"}
    assert "[limits] grants" in refused.value.message
    other = ledger.account(1001).charge(Resource.GRANTS)
    charges.pop().release()
    charges.append(account.charge(Resource.GRANTS))
    for charge in [*charges, other]:
        charge.release()
    assert account.statistics().refused == 1
    assert not any(account.statistics().used.values())


def test_a_charge_is_released_once() -> None:
    charge = Ledger(Limits()).account(1).charge(Resource.SLOTS, 3)
    charge.release()
    with pytest.raises(AssertionError, match="twice"):
        charge.release()


def test_a_forgotten_charge_is_reported() -> None:
    charge = Ledger(Limits()).account(1).charge(Resource.PAGES, 7)
    with pytest.warns(ResourceWarning, match="never released"):
        del charge


def test_an_account_goes_with_its_last_connection_unless_tokens_are_owed() -> None:
    clock = Clock()
    ledger = Ledger(Limits(requests_per_second=1.0, burst=2), clock)
    account = ledger.account(1)
    account.bucket.take()
    account.charge(Resource.CONNECTIONS).release()
    assert ledger.account(1) is account, "reconnecting would refill the bucket"
    clock.now = 10.0
    account.charge(Resource.CONNECTIONS).release()
    assert ledger.statistics().accounts == ()


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(rate=10.0, burst=3, clock=clock)
    assert [bucket.take() for _ in range(3)] == [0.0, 0.0, 0.0]
    assert bucket.take() == pytest.approx(0.1)
    assert bucket.take() == pytest.approx(0.2), "takers queue up behind one another"
    clock.now = 0.2
    assert bucket.take() == pytest.approx(0.1)
    clock.now = 100.0
    assert bucket.full
    assert [bucket.take() for _ in range(3)] == [0.0, 0.0, 0.0], "tokens do not pile up beyond the burst"


def test_who_refers_to_an_account_has_the_one_of_the_uid_however_long_it_holds_nothing() -> None:
    """A client that is suspended holds nothing, while others of its user come and go."""
    ledger = Ledger(Limits(grants=2))
    suspended = ledger.account(1)
    suspended.charge(Resource.CONNECTIONS).release()
    assert ledger.statistics().accounts == (), "the guard of this test: it is closed"
    ledger.adopt(Limits(grants=1, burst=7))
    assert suspended.bucket.burst == 7
    newcomer = ledger.account(1)
    with newcomer.charge(Resource.GRANTS), pytest.raises(LimitReached):
        suspended.charge(Resource.GRANTS)
    assert len(ledger.statistics().accounts) == 1


def test_who_is_charged_is_told_of_though_the_account_was_closed_meanwhile() -> None:
    ledger = Ledger(Limits())
    account = ledger.account(1)
    account.charge(Resource.CONNECTIONS).release()
    assert ledger.statistics().accounts == (), "the guard of this test: it is closed"
    with account.charge(Resource.GRANTS):
        assert [known.used["grants"] for known in ledger.statistics().accounts] == [1]
