"""Seconds a step, tokens a second, time left."""

import collections
import statistics
import time
from typing import NamedTuple


class StepTime(NamedTuple):
    """One step's time."""

    seconds: float
    tokens_per_second: float


class StepTimer:
    """Time from one finished step to the next; call `restart` after pauses that are no part of a step (evaluation)."""

    def __init__(self, window: int = 50):
        self._recent: collections.deque[float] = collections.deque(maxlen=window)
        self._mark = time.perf_counter()

    def restart(self) -> None:
        """Start counting the next step now."""
        self._mark = time.perf_counter()

    def tick(self, tokens: int | float) -> StepTime:
        """A step of so many tokens has finished."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self._recent.append(seconds)
        return StepTime(seconds, tokens / seconds if seconds > 0 else 0.0)

    def seconds_left(self, steps: int) -> float | None:
        """Estimate for so many more steps, from the median of the recent ones; None before the first."""
        return statistics.median(self._recent) * max(steps, 0) if self._recent else None
