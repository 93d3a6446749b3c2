"""The phases of a start, each with its seconds: printed while they pass, kept for the metrics and for `/ready`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

IMPORT, LOAD, WEIGHTS, COMPILE, ADAPTERS, READY = "import", "load", "weights", "compile", "adapters", "ready"


class Phases:
    """What a start has gone through. Written by the thread that starts, read by any."""

    def __init__(
        self, say: Callable[[str], None] = lambda text: None, clock: Callable[[], float] = time.monotonic,
        before_s: float = 0.0,
    ):  # fmt: skip
        """`before_s` seconds have passed since the process began, with imports."""
        self._say, self._clock = say, clock
        self._here = clock()
        self._began = self._here - before_s
        self.seconds: dict[str, float] = {IMPORT: before_s} if before_s else {}
        """Of the phases that are over; READY is the whole start."""
        if before_s:
            self._say(f"{IMPORT:8} {before_s:6.1f} s  what reads and runs a model")
        self.now = LOAD
        """The phase at hand."""
        self.done = self.of = 0
        """Programs that are compiled, and how many there are."""

    @property
    def ready(self) -> bool:
        """Whether all of them are over."""
        return READY in self.seconds

    @contextmanager
    def phase(self, name: str, what: str) -> Iterator[None]:
        """One phase; `what` is said of it when it is over."""
        self.now, self._here = name, self._clock()
        yield
        self.seconds[name] = self._clock() - self._here
        self._say(f"{name:8} {self.seconds[name]:6.1f} s  {what}")

    def compiled(self, done: int, of: int) -> None:
        """So many programs are compiled."""
        if done > self.done or of != self.of:
            self.done, self.of = done, of
            self._say(f"{COMPILE:8} {self._clock() - self._here:6.1f} s  {done} of {of} programs")

    def finish(self, what: str) -> None:
        """All of it is over."""
        self.now = READY
        self.seconds[READY] = self._clock() - self._began
        self._say(f"{READY:8} {self.seconds[READY]:6.1f} s  {what}")

    def text(self) -> str:
        """Where the start is, in a few words."""
        return f"{self.now} ({self.done} of {self.of} programs)" if self.now == COMPILE else self.now
