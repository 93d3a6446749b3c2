"""Marks in a rendered text: which message wrote which part, and what the template says the model wrote."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

_PRIVATE = range(0x10F000, 0x10FF00)


def unused(text: str, count: int) -> str:
    """Characters of private use that the text has not."""
    taken = set(text)
    base = next(code for code in _PRIVATE if taken.isdisjoint(map(chr, range(code, code + count))))
    return "".join(map(chr, range(base, base + count)))


class Part(NamedTuple):
    """A span of characters of the text, and the message that wrote it (an index)."""

    begin: int
    end: int
    message: int


class Marked(NamedTuple):
    """A text without its marks, and what they said."""

    text: str
    parts: list[Part]
    """Of loops over messages, in order."""
    generations: list[tuple[int, int]]
    """Spans inside {% generation %}."""


class Marks:
    """Writes marks for the messages of one rendering, and reads them."""

    def __init__(self, messages: Sequence[Any], text: str):
        """`text` is the same rendering without marks: the marks are characters that are not in it."""
        self._open, self._close, self._first, self._last = unused(text, 4)
        self._index = {id(message): index for index, message in enumerate(messages)}
        self._loops: set[int] = set()

    def turn(self, value: Any, loop: int) -> str:
        """The mark of a message in a loop; nothing for another value."""
        index = self._index.get(id(value))
        if index is None:
            return ""
        self._loops.add(loop)
        return f"{self._open}{loop}:{index}{self._close}"

    def turns_end(self, loop: int) -> str:
        """The mark after a loop over messages; nothing after another loop."""
        if loop not in self._loops:
            return ""
        self._loops.discard(loop)
        return f"{self._open}{loop}:{self._close}"

    def generation(self, begins: bool) -> str:
        """The mark where the model's own text begins or ends."""
        return self._first if begins else self._last

    def read(self, marked: str) -> Marked:
        """The text and the spans that its marks stand for."""
        pieces: list[str] = []
        parts: list[Part] = []
        generations: list[tuple[int, int]] = []
        stack: list[tuple[int, int]] = []  # loop and message, the innermost last
        at = position = began = opened = 0
        pattern = f"{self._open}([0-9]+):([0-9]*){self._close}|({self._first})|({self._last})"
        for found in re.finditer(pattern, marked):
            pieces.append(marked[position : found.start()])
            at, position = at + len(pieces[-1]), found.end()
            if found[3]:
                opened = at
            elif found[4]:
                generations.append((opened, at))
            else:
                if stack and at > began:
                    parts.append(Part(began, at, stack[-1][1]))
                    if len(parts) > 1 and parts[-2].end == began and parts[-2].message == stack[-1][1]:
                        parts[-2:] = [Part(parts[-2].begin, at, stack[-1][1])]  # a loop over messages inside
                began = at
                _enter(stack, int(found[1]), found[2])
        pieces.append(marked[position:])
        return Marked("".join(pieces), parts, [span for span in generations if span[1] > span[0]])


def _enter(stack: list[tuple[int, int]], loop: int, message: str) -> None:
    """A loop goes on to a message, or ends (no message); what is inside of that loop has ended."""
    depth = next((depth for depth, (one, _) in enumerate(stack) if one == loop), None)
    if depth is not None:
        del stack[depth:]
    if message:
        stack.append((loop, int(message)))
