"""The pieces of an answer."""

from collections.abc import Iterable
from typing import NamedTuple


class Text(NamedTuple):
    """Text for the reader."""

    text: str


class Reasoning(NamedTuple):
    """Thoughts before it."""

    text: str


class CallStart(NamedTuple):
    """A tool is called; its arguments follow."""

    index: int
    id: str
    name: str


class CallArguments(NamedTuple):
    """More of a call's arguments. Joined they are JSON, or the beginning of some where the answer was cut."""

    index: int
    text: str


Piece = Text | Reasoning | CallStart | CallArguments


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with neighbours of one kind put together."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if isinstance(piece, Text | Reasoning) and type(last) is type(piece):
            found[-1] = type(piece)(last.text + piece.text)
        elif (
            isinstance(piece, CallArguments) and isinstance(last, CallArguments) and last.index == piece.index
        ):
            found[-1] = CallArguments(piece.index, last.text + piece.text)
        else:
            found.append(piece)
    return found
