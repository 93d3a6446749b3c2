"""A candidate's turns beside the default's: as few as tell which is the faster."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax

from maxstack.bench.measure import Prepared

CLEARLY = 2.0
"""A first turn that takes this many times the slowest turn that the default has had, those just before and after it
among them, is the last. Only other work on the machine could make such a turn of a candidate that is as fast as the
default, and it would have to spare the default's turns on both sides. What is best so far is no bar: that may be luck.
With 5 programs at once on 2 cores, the longest of 57 turns of one program took 1.4 times its neighbours."""
LEAST_GAIN = 1.03
"""Of the median ratio; less is not worth a line."""
SURE = 0.8
"""Share of the rounds of the last comparison that a candidate has to win."""

LONG_TURN = 2.0
"""Seconds; what else goes on is evened out within a turn that takes longer, and the last comparison has half the
rounds."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a search may take."""

    rounds: int = 5
    """Half as many turns (an odd number) for each candidate; for the last comparison twice as many, unless long."""
    least_seconds: float = 0.2
    """A turn repeats a call until it has taken this."""
    until: float = float("inf")
    """By `clock`; nothing is begun after it but a last comparison."""
    clock: Callable[[], float] = time.perf_counter

    @property
    def spent(self) -> bool:
        return self.clock() >= self.until


class Race:
    """Turns of one default, and of others beside it. `default` has been called before: it is warm."""

    def __init__(self, default: Prepared, effort: Effort):
        self._default, self._effort = default, effort
        self._repeats = self._filling(self._seconds(default, 1))
        self._slowest = 0.0

    def heat(self, call: Prepared, best: float) -> tuple[float, str | None]:
        """(how many times as fast as the default `call` is, why that was clear after one turn or None).

        The median of a few turns, or of fewer once most are known not to exceed `best`.
        """
        turns = self._effort.rounds // 2 | 1
        ratios: list[float] = []
        repeats, before = 0, self._default_turn()
        while len(ratios) < turns and sum(ratio <= best for ratio in ratios) <= turns // 2:
            took = self._seconds(call, max(repeats, 1))
            if repeats == 0 and (repeats := self._filling(took)) > 1:
                took = self._seconds(call, repeats)
            after = self._default_turn()
            ratios.append((before + after) / 2 / took)
            if len(ratios) == 1 and took > CLEARLY * self._slowest:
                return ratios[0], f"its first turn took {2 * took / (before + after):.1f} times the default's"
            before = after
        return statistics.median(ratios), None

    def final(self, call: Prepared) -> float:
        """How many times as fast as the default a call is for sure; 1 where that is not sure, or too little."""
        rounds = self._effort.rounds * (1 if self._slowest > LONG_TURN else 2)
        repeats = self._filling(self._seconds(call, 1))
        ratios: list[float] = []
        before = self._default_turn()
        while len(ratios) < rounds and sum(ratio <= 1 for ratio in ratios) <= rounds - SURE * rounds:
            took, after = self._seconds(call, repeats), self._default_turn()
            ratios.append((before + after) / 2 / took)
            before = after
        won = sum(ratio > 1 for ratio in ratios)
        median = statistics.median(ratios)
        return median if won >= SURE * rounds and median >= LEAST_GAIN else 1.0

    def _default_turn(self) -> float:
        seconds = self._seconds(self._default, self._repeats)
        self._slowest = max(self._slowest, seconds)
        return seconds

    def _filling(self, seconds: float) -> int:
        """Calls of such a length that make a turn."""
        return max(1, round(self._effort.least_seconds / max(seconds, 1e-9)))

    def _seconds(self, call: Prepared, repeats: int) -> float:
        """Of one call, as a mean."""
        start = self._effort.clock()
        # Only the last is waited for: the host runs ahead of the device, as it does in a program.
        jax.block_until_ready([call() for _ in range(repeats)][-1])
        return (self._effort.clock() - start) / repeats
