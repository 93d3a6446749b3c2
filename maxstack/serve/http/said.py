"""An answer's text taken apart while it comes: what is said, thoughts, calls of tools."""

from collections.abc import Iterable
from typing import Any

from maxstack.chat.parsing import CallArguments, CallStart, Parser, Piece, Reasoning, Text

__all__ = ["CallArguments", "CallStart", "Parser", "Piece", "Reasoning", "Text", "delta_of", "message_of"]


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
    delta = delta_of(sorted(pieces, key=_place))
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


def _place(piece: Piece) -> int:
    """Calls by number, after the rest: their arguments may come in turns."""
    return piece.index if isinstance(piece, CallStart | CallArguments) else -1
