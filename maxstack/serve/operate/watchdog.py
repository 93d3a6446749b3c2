"""Tells a busy engine from one that is stuck or dead: by whether its steps get done, not by how long requests take."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

LIMIT_S = 60.0
"""A step has a bounded amount of work; one that takes longer than this, or ten times the slowest so far, is stuck."""
SLOWER = 10
TICK_S = 1.0
FAILING = "failing"
FAILURES = 5
"""Steps that fail one after another before the engine is called sick."""


@runtime_checkable
class Progress(Protocol):
    """What the engine's loop counts."""

    steps: int
    failed: int


@runtime_checkable
class Watched(Protocol):
    """What is looked at of an engine."""

    @property
    def progress(self) -> Progress:
        """Steps that are done, and how many failed since."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether somebody waits for it."""
        ...

    @property
    def dead(self) -> BaseException | None:
        """Why it has stopped."""
        ...


class Watchdog:
    """Looks at an engine once a tick. It counts its own ticks: neither a jump of the clock nor a machine that was
    suspended makes an engine look stuck."""

    def __init__(
        self, engine: Watched, *, limit_s: int | float = LIMIT_S, tick_s: int | float = TICK_S,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self._engine, self._limit_s, self.tick_s, self._clock = engine, limit_s, tick_s, clock
        self._seen = engine.progress.steps, engine.progress.failed
        self._last, self._patient = clock(), 0
        self.stalled_s = 0.0
        """How long the engine has had work without getting a step done."""
        self.slowest_s = 0.0
        """The slowest step so far, to the tick."""

    @property
    def limit_s(self) -> int | float:
        """Seconds after which a step is called stuck."""
        return max(self._limit_s, SLOWER * self.slowest_s)

    def look(self) -> None:
        """One tick."""
        now = self._clock()
        passed, self._last = min(max(now - self._last, 0.0), 2 * self.tick_s), now
        progress = self._engine.progress
        seen = progress.steps, progress.failed
        if seen[0] > self._seen[0]:
            self.slowest_s = max(self.slowest_s, self.stalled_s)
        if seen != self._seen or self._patient or not self._engine.has_work:
            self.stalled_s = 0.0
        else:
            self.stalled_s += passed
        self._seen = seen

    async def watch(self) -> None:
        """Look, again and again, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(self.tick_s)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Within, the engine is known to do something long between two steps: new weights, say."""
        self._patient += 1
        try:
            yield
        finally:
            self._patient -= 1

    @property
    def fault(self) -> tuple[str, str] | None:
        """What is wrong with the engine, in a word and in a sentence; None while nothing is."""
        if self._engine.dead is not None:
            return "dead", str(self._engine.dead)
        if self.stalled_s > self.limit_s:
            return (
                "stuck",
                f"no step of the engine was done for {self.stalled_s:.0f} s; the slowest before took "
                f"{self.slowest_s:.0f} s, and {self.limit_s:.0f} s are the limit",
            )
        if self._engine.progress.failed >= FAILURES:
            return FAILING, f"the last {self._engine.progress.failed} steps of the engine have failed"
        return None
