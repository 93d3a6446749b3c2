"""An answer's text taken apart while it comes: what is said, thoughts, calls of tools."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from maxstack.chat.reasoning import Splitter, tags_of


class Text(NamedTuple):
    """Said to the user."""

    text: str


class Reasoning(NamedTuple):
    """Thought before."""

    text: str


class CallStart(NamedTuple):
    """A call of a tool begins."""

    index: int
    id: str
    name: str


class CallArguments(NamedTuple):
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


Piece = Text | Reasoning | CallStart | CallArguments


@runtime_checkable
class Parser(Protocol):
    """Of one answer."""

    def feed(self, text: str) -> Sequence[Piece]:
        """What more text makes certain."""
        ...

    def end(self) -> Sequence[Piece]:
        """The rest."""
        ...


class Verbatim:
    """All is said."""

    def feed(self, text: str) -> list[Piece]:
        """As Parser."""
        return [Text(text)] if text else []

    def end(self) -> list[Piece]:
        """As Parser."""
        return []


class Thoughts:
    """Thoughts between the template's tags, and what is said."""

    def __init__(self, template: str, prompt: str):
        self._splitter = Splitter(tags_of(template), prompt)

    def feed(self, text: str) -> list[Piece]:
        """As Parser."""
        return [
            (Reasoning if kind == "reasoning" else Text)(piece) for kind, piece in self._splitter.push(text)
        ]

    def end(self) -> list[Piece]:
        """As Parser."""
        return [
            (Reasoning if kind == "reasoning" else Text)(piece) for kind, piece in self._splitter.finish()
        ]


def delta_of(pieces: Iterable[Piece]) -> dict[str, Any]:
    """Pieces as a chunk's delta."""
    delta: dict[str, Any] = {}
    for piece in pieces:
        if isinstance(piece, Text):
            delta["content"] = delta.get("content", "") + piece.text
        elif isinstance(piece, Reasoning):
            delta["reasoning_content"] = delta.get("reasoning_content", "") + piece.text
        elif isinstance(piece, CallStart):
            function = {"name": piece.name, "arguments": ""}
            call = {"index": piece.index, "id": piece.id, "type": "function", "function": function}
            delta.setdefault("tool_calls", []).append(call)
        else:
            calls = delta.setdefault("tool_calls", [])
            if calls and calls[-1]["index"] == piece.index:
                calls[-1]["function"]["arguments"] += piece.text
            else:
                calls.append({"index": piece.index, "function": {"arguments": piece.text}})
    return delta


def message_of(pieces: Iterable[Piece]) -> dict[str, Any]:
    """All pieces of an answer as a message."""
    delta = delta_of(sorted(pieces, key=lambda piece: getattr(piece, "index", -1)))
    message: dict[str, Any] = {"role": "assistant", "content": delta.get("content"), "refusal": None}
    if "reasoning_content" in delta:
        message["reasoning_content"] = delta["reasoning_content"]
    if "tool_calls" in delta:
        message["tool_calls"] = [
            {key: value for key, value in call.items() if key != "index"} for call in delta["tool_calls"]
        ]
    elif message["content"] is None:
        message["content"] = ""
    return message
