"""What a request is answered: whole, or piece by piece."""

import dataclasses
from collections.abc import Collection

from maxstack.data.tokenizer import Tokenizer
from maxstack.models.generation.output import Row, TokenLogprobs
from maxstack.models.generation.params import SamplingParams
from maxstack.serve.embedding import Pool
from maxstack.serve.news import News
from maxstack.serve.results import Logprobs


@dataclasses.dataclass
class Output:
    """The answer to a prompt."""

    id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    """One a token, where asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One a token of the prompt, where asked for; None for the first, which follows nothing."""
    cumulative_logprob: float | None = None
    """Sum of the log-probabilities of all that was sampled, the end token included, where `logprobs` was asked for."""
    finish_reason: str | None = None
    """"stop" for an end token or stop string, "length" for max_tokens, "cancelled", "deadline", "error"."""
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were there already."""


@dataclasses.dataclass
class Delta:
    """What has been added to an answer."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def add(self, other: "Delta") -> None:
        """Take in what came after."""
        self.token_ids += other.token_ids
        self.text += other.text
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason


class Answer:
    """One request's answer while it comes: tokens in, text out."""

    def __init__(
        self, request_id: str, prompt: tuple[int, ...], params: SamplingParams, tokenizer: Tokenizer | None,
        end_ids: frozenset[int], pool: Pool | None = None, keep: Collection[str] = (),
    ):  # fmt: skip
        """`keep` are special tokens whose texts stay in the answer's."""
        self.output = Output(request_id, prompt)
        self.pool = pool
        """Where an embedding is wanted, not an answer."""
        self.error: Exception | None = None
        self._row = Row(0, params, tokenizer, end_ids, keep)
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0
        if params.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None] * len(prompt)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.output.finish_reason is not None

    def take(self, news: News) -> Delta:
        """What some news add. An answer that is done takes no more."""
        delta, out = Delta(), self.output
        if self.done:
            return delta
        out.cached_tokens = max(out.cached_tokens, news.cached)
        if news.prompt is not None and out.prompt_logprobs is not None:
            start, values = news.prompt
            for i, value in enumerate(values, start):
                out.prompt_logprobs[i] = token_logprobs(out.prompt_token_ids[i], value)
        if news.pooled is not None and self.pool is not None:
            self.pool.take(news.pooled)
        for i, token in enumerate(news.tokens):
            told = None if news.logprobs is None else token_logprobs(token, news.logprobs[i])
            if told is not None and out.cumulative_logprob is not None:
                out.cumulative_logprob += told.logprob
            event = self._row.push(token, told)
            delta.token_ids += event.token_ids
            delta.text += event.text
            if event.logprobs is not None:
                delta.logprobs.append(event.logprobs)
            if event.finish_reason is not None:
                delta.finish_reason = event.finish_reason
                break
        if delta.finish_reason is None and news.finish is not None:
            delta.text += self._row.rest()
            delta.finish_reason, self.error = news.finish, news.error
        self._grow(delta)
        return delta

    def _grow(self, delta: Delta) -> None:
        self.output.token_ids += delta.token_ids
        self.output.text += delta.text
        if self.output.logprobs is not None:
            self.output.logprobs += delta.logprobs
        self.output.finish_reason = delta.finish_reason


def token_logprobs(token: int, found: Logprobs) -> TokenLogprobs:
    """As the Generator reports them."""
    return TokenLogprobs(token, found.own, tuple(zip(found.ids, found.values, strict=True)))
