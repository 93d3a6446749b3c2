"""The output of a response: items that grow while an answer comes, and the events that tell of it."""

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from maxstack.serve.http.said import CallArguments, CallStart, Piece, Reasoning, Text

Event = dict[str, Any]


class Written:
    """Items in the order in which they began; one is open at a time, but for calls, which may take turns."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: int | None = None
        self._calls: dict[int, int] = {}
        self._told: list[dict[str, Any]] = []

    def take(self, pieces: Iterable[Piece], logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """The events of more pieces. Log-probabilities go with the next text."""
        self._told += logprobs
        for piece in pieces:
            if isinstance(piece, Text):
                yield from self._text(piece.text)
            elif isinstance(piece, Reasoning):
                yield from self._reasoning(piece.text)
            elif isinstance(piece, CallStart):
                yield from self._call(piece)
            else:
                yield from self._arguments(piece)

    def finish(self, status: str) -> Iterator[Event]:
        """Close what is open; what was cut is marked so."""
        yield from self._close(status)
        if self.items and status != "completed":
            self.items[-1]["status"] = status

    def _begin(self, item: dict[str, Any]) -> Event:
        self._open = len(self.items)
        self.items.append(item)
        return {"type": "response.output_item.added", "output_index": self._open, "item": copied(item)}

    def _is_open(self, kind: str) -> bool:
        return self._open is not None and self.items[self._open]["type"] == kind

    def _text(self, text: str) -> Iterator[Event]:
        if not self._is_open("message"):
            yield from self._close("completed")
            item = {
                "id": named("msg"),
                "type": "message",
                "role": "assistant",
                "status": "in_progress",
                "content": [],
            }
            yield self._begin(item)
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item["content"].append(part)
            yield self._of_part("response.content_part.added", part=copied(part))
        part = self.items[self._open or 0]["content"][0]
        told, self._told = self._told, []
        part["text"] += text
        part["logprobs"] += told
        yield self._of_part("response.output_text.delta", delta=text, logprobs=told)

    def _reasoning(self, text: str) -> Iterator[Event]:
        self._told = []  # of thoughts there are none to show
        if not self._is_open("reasoning"):
            yield from self._close("completed")
            item = {
                "id": named("rs"),
                "type": "reasoning",
                "summary": [],
                "content": [],
                "status": "in_progress",
            }
            yield self._begin(item)
            part = {"type": "reasoning_text", "text": ""}
            item["content"].append(part)
            yield self._of_part("response.content_part.added", part=copied(part))
        self.items[self._open or 0]["content"][0]["text"] += text
        yield self._of_part("response.reasoning_text.delta", delta=text)

    def _call(self, piece: CallStart) -> Iterator[Event]:
        self._told = []
        yield from self._close("completed")
        self._calls[piece.index] = len(self.items)
        yield self._begin({
            "id": named("fc"), "type": "function_call", "call_id": piece.id, "name": piece.name, "arguments": "",
            "status": "in_progress",
        })  # fmt: skip

    def _arguments(self, piece: CallArguments) -> Iterator[Event]:
        self._told = []
        at = self._calls[piece.index]
        self.items[at]["arguments"] += piece.text
        kind = "response.function_call_arguments.delta"
        yield {"type": kind, "item_id": self.items[at]["id"], "output_index": at, "delta": piece.text}

    def _close(self, status: str) -> Iterator[Event]:
        if self._open is None:
            return
        item = self.items[self._open]
        if item["type"] == "function_call":
            kind, at = "response.function_call_arguments.done", self._open
            own = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": kind, "item_id": item["id"], "output_index": at, **own}
        else:
            part = item["content"][0]
            if item["type"] == "message":
                yield self._of_part("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            else:
                yield self._of_part("response.reasoning_text.done", text=part["text"])
            yield self._of_part("response.content_part.done", part=copied(part))
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": self._open, "item": copied(item)}
        self._open = None

    def _of_part(self, kind: str, **own: Any) -> Event:
        at = self._open or 0
        return {"type": kind, "item_id": self.items[at]["id"], "output_index": at, "content_index": 0, **own}


def copied(item: dict[str, Any]) -> dict[str, Any]:
    """As it is now."""
    return {key: [dict(part) for part in value] if key == "content" else value for key, value in item.items()}


def named(prefix: str) -> str:
    """A new id."""
    return f"{prefix}_{uuid.uuid4().hex}"
