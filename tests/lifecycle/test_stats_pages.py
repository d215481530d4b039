"""`stats` tells of more users and enclaves than fit into a message."""

from __future__ import annotations

from typing import Any

import pytest
from modelled_process import ModelledProcess
from modelled_world import World

from teemate.broker.connections.pages import fill_page
from teemate.broker.policy.limits import Resource

USERS = 250


def stats(world: World, administrator: ModelledProcess, **args: Any) -> dict[str, Any]:
    world.step(lambda: administrator.post("stats", **args))
    (reply,) = [reply for reply in administrator.hear() if reply.op == "stats"]
    assert reply.ok is not None
    return reply.ok


def test_users_come_page_by_page_and_each_once() -> None:
    world = World(1, kill=False)
    ledger = world.service.ledger
    charges = [ledger.account(uid).owe(Resource.PAGES) for uid in range(1000, 1000 + USERS)]
    try:
        world.administrator.hear()
        ok = stats(world, world.administrator)
        assert "next" in ok, "the guard of this test: they do not fit into one"
        pages = [ok]
        while "next" in ok:
            ok = stats(world, world.administrator, **ok["next"])
            pages.append(ok)
        found = [user["uid"] for page in pages for user in page["stats"]["users"]]
        assert found == [0, *range(1000, 1000 + USERS)]
        assert all(page["stats"]["clients"] == 1 for page in pages), "what is no list is in each"
    finally:
        for charge in charges:
            charge.release()
        world.step(world.administrator.end)
        world.close()


@pytest.mark.parametrize("size", [0, 1, 300, 7000, 30_000])
def test_pages_are_filled_in_order_and_hold_one_entry_at_least(size: int) -> None:
    entries = [(name, {"name": name, "text": "x" * size}) for name in map("{:03}".format, range(40))]
    found: list[str] = []
    last: str | None = None
    number = 0
    more = True
    while more:
        number += 1
        page = fill_page(reversed(entries), after=last)
        found += [str(entry["name"]) for entry in page.entries]
        last, more = page.last, page.more
    assert found == [name for name, _ in entries]
    assert number >= min(40, 40 * size // (20 * 1024))


def test_an_empty_list_has_nothing_to_go_on_from() -> None:
    assert fill_page([], after=None) == ([], None, False)
    assert fill_page([(1, {})], after=1) == ([], 1, False)
