"""What a template may use of time and memory: work is counted as it is done, nothing is stopped from outside."""

import time
from collections.abc import ItemsView, Iterable, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any

MOST_TEMPLATE = 128 << 10
"""Characters of a template; the longest known, GPT-OSS's, has 17 thousand."""
MOST_TEXT = 4 << 20
"""Characters of a rendered conversation, of what is given to render, and of any value on the way; about 1M tokens."""
MOST_WORK = 64 << 20
"""Characters and items that all steps of a rendering may make together; it bounds memory as well as time."""
MOST_SECONDS = 2.0
"""Processor seconds of a rendering."""
MOST_DIGITS = 300
"""Decimal digits of a whole number."""
_BETWEEN_CLOCKS = 1 << 14
_VIEWS = (KeysView, ValuesView, ItemsView)


class Exceeded(Exception):
    """A template wants more than it may have."""


class Budget:
    """What one rendering has used."""

    def __init__(self, seconds: float = MOST_SECONDS):
        self._work, self._clock = 0, _BETWEEN_CLOCKS
        self._seconds, self._end = seconds, time.thread_time() + seconds

    def charge(self, amount: int = 1) -> None:
        """Count work. Raises Exceeded past the most there may be, of work or of time."""
        self._work += 16 + amount
        if self._work > self._clock:
            self._clock = self._work + _BETWEEN_CLOCKS
            if self._work > MOST_WORK:
                raise Exceeded(f"it does more work than a conversation can need ({MOST_WORK:,} characters)")
            if time.thread_time() > self._end:
                raise Exceeded(f"it runs for longer than {self._seconds:g} seconds")

    def plan(self, size: int) -> None:
        """Ask for a value of that many characters or items before it is made. Raises Exceeded."""
        if size > MOST_TEXT:
            raise Exceeded(
                f"it makes a value of {_about(size)} characters; at most {MOST_TEXT:,} are allowed"
            )
        self.charge(size)

    def made(self, value: Any) -> Any:
        """The value, once its size is counted. Raises Exceeded."""
        if isinstance(value, str):
            self.plan(len(value))
        elif isinstance(value, int):
            if value.bit_length() > MOST_DIGITS * 3.33:
                raise Exceeded(f"it makes a number of more than {MOST_DIGITS} digits")
        elif isinstance(value, (list, tuple, set, frozenset, Mapping, *_VIEWS)):
            self.charge(size_of(value))
        elif isinstance(value, (bytes, bytearray, memoryview)):
            raise Exceeded("it makes bytes, where text is all that a chat template needs")
        else:
            self.charge()
        return value


def size_of(value: Any) -> int:
    """Characters and items of plain data, each as often as it would be written out.

    Raises Exceeded past MOST_TEXT, after no more steps than that: a list of itself twice over and over is small in
    memory and endless on paper.
    """
    size, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        size += 1
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, Mapping):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, (list, tuple, set, frozenset, *_VIEWS)):
            waiting += one
        if size + len(waiting) > MOST_TEXT:
            raise Exceeded(f"it holds more than {MOST_TEXT:,} characters and items")
    return size


def _about(size: int) -> str:
    return f"{size:,}" if size < 10**15 else f"{size:.0e}" if size < 10**300 else "more than 10^300"


current: ContextVar[Budget | None] = ContextVar("template_budget", default=None)


def budget() -> Budget:
    """That of the rendering which is under way."""
    found = current.get()
    if found is None:
        raise RuntimeError("a template's code runs outside of a rendering")
    return found


def counted(values: Iterable[Any]) -> Iterable[Any]:
    """The values, each charged as it is taken."""
    own = budget()
    for value in values:
        own.charge()
        yield value
