"""What comes out of generation: events as they happen, and whole answers."""

import dataclasses
from collections.abc import Collection
from typing import Literal

from maxstack.data.tokenizer import Tokenizer
from maxstack.models.generation.params import SamplingParams
from maxstack.models.generation.sampling import Chosen
from maxstack.models.generation.text import TextStream

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one token under the model itself, before any setting."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and theirs, as many as were asked for."""


@dataclasses.dataclass(frozen=True)
class Event:
    """What one step adds to a row."""

    row: int
    token_ids: tuple[int, ...]
    """The new token; none when it ended the row."""
    text: str
    """Text that is final now: it lags behind the tokens where it may yet become part of a stop string."""
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    """Set in a row's last event: "stop" for an end token or stop string, "length" for max_tokens."""


@dataclasses.dataclass
class Completion:
    """A whole answer."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, event: Event) -> None:
        """Take in the row's next event."""
        self.token_ids += event.token_ids
        self.text += event.text
        if event.logprobs is not None:
            self.logprobs.append(event.logprobs)
        self.finish_reason = event.finish_reason


class Row:
    """The host's side of one row: text, and when to stop."""

    def __init__(
        self, index: int, params: SamplingParams, tokenizer: Tokenizer | None, end_ids: frozenset[int],
        keep: Collection[str] = (),
    ):  # fmt: skip
        """`keep` are special tokens whose texts stay in the row's."""
        self.index, self.params, self.done = index, params, False
        self._text = None if tokenizer is None else TextStream(tokenizer, params.stop, keep)
        self._ends = params.ends(end_ids)
        self._left = params.max_tokens

    def take(self, chosen: Chosen) -> Event:
        """What this row's token of a step means."""
        token = int(chosen.tokens_b[self.index])
        return self.push(token, self._logprobs(token, chosen))

    def push(self, token: int, logprobs: TokenLogprobs | None) -> Event:
        """What the row's next token means."""
        if token in self._ends:
            return self._event((), self._finish()[0], None, "stop")
        self._left -= 1
        early = self.params.max_tokens - self._left <= self.params.min_tokens
        text, stopped = ("", False) if self._text is None else self._text.push(token, early=early)
        if self._left == 0 and not stopped:
            rest, stopped = self._finish()
            text += rest
        reason = "stop" if stopped else "length" if self._left == 0 else None
        return self._event((token,), text, logprobs, reason)

    def rest(self) -> str:
        """Text that was held back, of a row that ends from outside."""
        return self._finish()[0]

    def _event(
        self, tokens: tuple[int, ...], text: str, logprobs: TokenLogprobs | None, reason: FinishReason | None
    ) -> Event:
        self.done = reason is not None
        return Event(self.index, tokens, text, logprobs, reason)

    def _finish(self) -> tuple[str, bool]:
        return ("", False) if self._text is None else self._text.finish()

    def _logprobs(self, token: int, chosen: Chosen) -> TokenLogprobs | None:
        if self.params.logprobs is None:
            return None
        ids = chosen.top_ids_bm[self.index, : self.params.logprobs].tolist()
        values = chosen.top_logprobs_bm[self.index, : self.params.logprobs].tolist()
        own = float(chosen.logprobs_b[self.index])
        return TokenLogprobs(token, own, tuple(zip(ids, values, strict=True)))
