"""Equal shares of the broker's one thread.

trio lets every task that can run do so once in a round of its scheduler, so a user with 500 busy
connections would get 500 shares, and a victim with one would wait for all of them.  Hence all
connections of a user together answer requests for :data:`SHARE` in a round: they have the user's turn
one after another, and who has it when the share is used up keeps it until the next round, so that
the others wait in line for it meanwhile.  A request waits for one share of each other user, however
many connections they have.
"""

from __future__ import annotations

import time
from typing import final

import trio

__all__ = ["SHARE", "Rounds", "Turn"]

SHARE = 0.0005
"""Seconds; a request that was begun is finished."""


@final
class Rounds(trio.abc.Instrument):
    """Counts the rounds of trio's scheduler, once it was added to it (``trio.lowlevel.add_instrument``)."""

    def __init__(self) -> None:
        self.number = 0

    def after_io_wait(self, timeout: float) -> None:
        """Begin a round: whoever can run now runs once."""
        self.number += 1


@final
class Turn:
    """Which of a user's connections may answer requests; the user's account has one."""

    __slots__ = ("_ends", "_round", "_rounds", "_taken", "_waiting")

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._round = -1
        self._ends = 0.0
        self._taken = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def take(self) -> None:
        """Take the turn, now or when it is there; who came first gets it first."""
        if self._taken:
            await self._waiting.park()  # it is handed over, so nobody comes in between
        self._taken = True
        if self._round != self._rounds.number:
            self._round = self._rounds.number
            self._ends = time.perf_counter() + SHARE

    @property
    def over(self) -> bool:
        """Whether the share of this round is used up; who has the turn then waits a round and gives it up."""
        return time.perf_counter() >= self._ends

    def give_up(self) -> None:
        """Let the next connection have the turn, if one waits."""
        if not self._waiting.unpark():
            self._taken = False
