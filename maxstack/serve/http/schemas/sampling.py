"""How tokens are chosen: the fields that chat and completions share, and the parameters they make."""

import math
import secrets
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from maxstack.models.generation.params import MOST_BIASES, SamplingParams
from maxstack.serve.http.errors import refused
from maxstack.serve.http.schemas.base import (
    Name,
    Object,
    Schema,
    StreamOptions,
    Text,
    TokenId,
    at_most,
)
from maxstack.serve.request import PRIORITIES

MOST_STOPS = 16
MOST_NEW = 1_048_576
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Label = Annotated[str, Field(max_length=512)]

Metadata = Annotated[dict[str, Label], at_most(16)]


def of_tokens(value: dict[str, float]) -> dict[str, float]:
    """The value, if its keys are token ids."""
    for key in value:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise ValueError(f"keys are token ids, got {key[:20]!r}")
    return value


Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]], at_most(MOST_BIASES), AfterValidator(of_tokens)
]


class StructuredOutputs(Schema):
    """One form that the answer must have, as vLLM spells it."""

    json_: Object | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class Sampling(Schema):
    """OpenAI's fields and the extensions, each within its bounds."""

    model: Name | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MOST_NEW)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Taken from OpenAI's clients and not acted on.
    user: Label | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None

    # Extensions, under vLLM's names.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MOST_NEW)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    priority: Annotated[int, Field(ge=-PRIORITIES, le=PRIORITIES)] | None = None
    """Higher is sooner."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    """Seconds after which the request ends with what it has."""
    return_token_ids: bool | None = None
    guided_json: Object | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    guided_grammar: Text | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self) -> None:
        """Raise for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options go with stream only", "stream_options")

    @property
    def answers(self) -> int:
        """Answers to each prompt that come back."""
        return self.n or 1

    @property
    def tries(self) -> int:
        """Answers to each prompt that are made, of which the best come back."""
        tries = self.best_of or self.answers
        if tries < self.answers:
            raise refused(f"best_of is {tries}, and n is {self.answers}: it must be n or more", "best_of")
        if tries > self.answers and self.stream:
            raise refused("best_of cannot be streamed: the best answer is known at the end only", "best_of")
        return tries

    def params(self, max_tokens: int, *, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """As the engine takes them. Without a seed, by one of chance."""

        def given[T](value: T | None, default: T) -> T:
            return default if value is None else value

        top_k = given(self.top_k, 0)
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=given(self.min_tokens, 0),
            temperature=given(self.temperature, 1.0),
            top_k=0 if top_k == -1 else top_k,
            top_p=given(self.top_p, 1.0),
            min_p=given(self.min_p, 0.0),
            repetition_penalty=given(self.repetition_penalty, 1.0),
            presence_penalty=given(self.presence_penalty, 0.0),
            frequency_penalty=given(self.frequency_penalty, 0.0),
            seed=secrets.randbits(32) if self.seed is None else self.seed % 2**32,
            stop=self.stops,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias=tuple((int(token), float(bias)) for token, bias in (self.logit_bias or {}).items()),
        )


def finite(value: float) -> float:
    """A log-probability that JSON can hold: of what is impossible, OpenAI says -9999."""
    return value if math.isfinite(value) else -9999.0
