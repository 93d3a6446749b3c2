"""What the bytes of an answer say: tokens, their times, how it ended."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from maxstack.bench.serve.client import Heard


@dataclass
class Answer:
    """One request, in seconds."""

    due: float
    late_s: float
    """That it was sent after its time, through the client's own fault."""
    ended: float
    asked: int
    """Tokens of answer that were asked for."""
    times: list[float] = field(default_factory=list)
    """When each piece of text came."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    said: str = ""

    @property
    def ttft_s(self) -> float:
        """From when it was due to the first text."""
        return self.times[0] - self.due

    @property
    def tpot_s(self) -> float:
        """Mean time of each token after the first."""
        return (self.times[-1] - self.times[0]) / max(self.output_tokens - 1, 1)

    @property
    def itl_s(self) -> list[float]:
        """Between pieces of text: a piece may hold several tokens."""
        return [after - before for before, after in zip(self.times, self.times[1:])]

    @property
    def e2e_s(self) -> float:
        """From when it was due to its end."""
        return self.ended - self.due


def read(heard: Heard) -> Answer:
    """Parse what came. An answer that ends without `[DONE]` or with an error among its events has failed."""
    answer = Answer(
        due=heard.due, late_s=heard.sent - heard.due, ended=heard.ended, asked=heard.ask.tokens,
        error=heard.error, said=heard.said,
    )  # fmt: skip
    if answer.error is not None:
        return answer
    done, usage = False, None
    try:
        for when, data in events(heard.pieces):
            if data == b"[DONE]":
                done = True
                break
            event = json.loads(data)
            if "error" in event:
                answer.error, answer.said = "error while streaming", str(event["error"])[:500]
                return answer
            usage = event.get("usage") or usage
            if _brings_text(event):
                answer.times.append(when)
    except (ValueError, AttributeError, TypeError) as error:
        answer.error, answer.said = "not understood", str(error)
        return answer
    _count(answer, usage)
    if not done:
        answer.error = "cut off"
    elif not answer.times:
        answer.error = "no text"
    return answer


def _brings_text(event: dict[str, Any]) -> bool:
    for choice in event.get("choices") or ():
        delta = choice.get("delta")
        if delta is None:
            if choice.get("text"):
                return True
        elif any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls")):
            return True
    return False


def _count(answer: Answer, usage: dict[str, Any] | None) -> None:
    """By the server's books; where it keeps none, a piece of text counts as a token."""
    usage = usage or {}
    answer.prompt_tokens = usage.get("prompt_tokens") or 0
    answer.output_tokens = usage.get("completion_tokens") or len(answer.times)
    answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def events(pieces: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of server-sent events, with the time of the piece that completed each."""
    rest = b""
    for when, piece in pieces:
        rest = rest + piece if rest else piece
        if b"\r" in rest:
            rest = rest.replace(b"\r\n", b"\n")
        *whole, rest = rest.split(b"\n\n")
        for event in whole:
            data = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield when, b"\n".join(data)
