"""Many processes on one database, half of them in containers, killed wherever they are: nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from bank import Bank, Plan, run_bank

SMALL = Plan(
    transactions=300, kills=12, broker_kills=1, warden_kills=1, container_kills=1, tellers=4, look=False
)
FULL = Plan(transactions=100_000, kills=2000, broker_kills=50, warden_kills=50, container_kills=50)


def test_killed_clients_containers_brokers_and_wardens_lose_nothing_and_hold_nobody_up(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = FULL if request.config.getoption("--full") else SMALL
    figures = run_bank(plan)
    with capsys.disabled():
        print("\nthe bank:", json.dumps(figures.__dict__))
    assert figures.good, figures
    assert figures.transactions >= plan.transactions
    assert (figures.kills["teller"], figures.kills["broker"]) == (plan.kills, plan.broker_kills)
    assert figures.kills["warden"] >= plan.warden_kills
    # Half of them are at work whenever one is killed; who is killed last need not be followed.
    assert figures.tellers >= plan.kills - 1 + (plan.tellers + 1) // 2


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bank]:
    """A small bank when everybody has gone, with its broker."""
    bank = Bank(
        Plan(transactions=40, kills=0, tellers=2, containers=False, look=False),
        tmp_path_factory.mktemp("bank"),
    )
    with bank.opened():
        yield bank


FALSE = {
    "a transaction that is gone": ("DELETE FROM transfer WHERE rowid = 7", "lost"),
    "one that was done twice": ("INSERT INTO transfer SELECT * FROM transfer WHERE rowid = 7", "repeated"),
    "one that nobody did": ("INSERT INTO transfer VALUES (0, 1000000, 1, 2, 3, '')", "foreign"),
    "one that is not as it was": ("UPDATE transfer SET amount = amount + 1 WHERE rowid = 7", "foreign"),
    "an account that is not as its history": (
        "UPDATE account SET balance = balance + (id = 3) - (id = 4)", "wrong_balances",
    ),
    "money that was made": ("UPDATE account SET balance = balance + 1 WHERE id = 3", "errors"),
}  # fmt: skip


@pytest.mark.parametrize("what", FALSE)
def test_the_bank_finds(closed: Bank, what: str) -> None:
    change, kind = FALSE[what]
    with closed.inside() as db:
        closed.check(db)
        assert closed.figures.good, closed.figures
        db.script(f"BEGIN; {change}")
        closed.check(db)
        found = bool(getattr(closed.figures, kind))
        db.script("ROLLBACK")
        closed.figures.errors.clear()
        assert found
        closed.check(db)
        assert closed.figures.good


def test_the_bank_finds_what_was_acknowledged_before_it_was_committed(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("one in several kills shows it: --full")
    figures = run_bank(Plan(transactions=5000, kills=300, careless=True))
    assert figures.lost
    assert not figures.repeated
    assert not figures.foreign
