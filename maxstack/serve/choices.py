"""Several answers to one prompt, the best of several, and a prompt read for its log-probabilities alone."""

import dataclasses
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from maxstack.config import UserError
from maxstack.models.generation.params import SamplingParams
from maxstack.serve.output import Output
from maxstack.serve.stream import Stream

if TYPE_CHECKING:
    from maxstack.serve.engine import AsyncEngine, Prompt

MOST_CHOICES = 128
"""Answers to one prompt at most: that of OpenAI's interface."""


def seed_of(seed: int, choice: int) -> int:
    """The seed of a choice: the request's own for the first, so that one choice is what the request gives alone."""
    if not choice:
        return seed
    return int.from_bytes(blake2b(f"{seed} {choice}".encode(), digest_size=4).digest())


def open_choices(
    engine: "AsyncEngine", prompt: "Prompt", params: SamplingParams, n: int = 1, **options: Any
) -> list[Stream]:
    """`n` answers to a prompt, each with a seed of its own. The first reads the prompt; the others wait for its pages
    and read what is left behind the last full one. Only the first has the log-probabilities of the prompt."""
    if not 1 <= n <= MOST_CHOICES:
        raise UserError(f"n is {n}: it must be 1 to {MOST_CHOICES}")
    ids, name = engine.ids(prompt), options.pop("request_id", None)
    streams: list[Stream] = []
    try:
        for i in range(n):
            own = dataclasses.replace(
                params, seed=seed_of(params.seed, i), prompt_logprobs=None if i else params.prompt_logprobs
            )
            request_id = name if name is None or not i else f"{name}/{i}"
            streams.append(engine.open(ids, own, request_id=request_id, **options))
    except BaseException:
        abort(engine, streams)
        raise
    return streams


async def choose(
    engine: "AsyncEngine", prompt: "Prompt", params: SamplingParams, n: int, best_of: int, **options: Any
) -> list[Output]:
    """The `n` of `best_of` answers that are likeliest under the model, the likeliest first; as likely ones in the order
    of their seeds. The first of them has the log-probabilities of the prompt."""
    if n > best_of:
        raise UserError(f"best_of is {best_of}, less than n {n}: it must be n or more")
    counted = params if params.logprobs is not None else dataclasses.replace(params, logprobs=0)
    streams = open_choices(engine, prompt, counted, best_of, **options)
    try:
        outputs = [await stream.whole() for stream in streams]
    finally:
        abort(engine, streams)
    prompt_logprobs = outputs[0].prompt_logprobs
    best = sorted(outputs, key=lambda output: -(output.cumulative_logprob or 0.0))[:n]
    for i, output in enumerate(best):
        output.prompt_logprobs = None if i else prompt_logprobs
        if params.logprobs is None:
            output.logprobs = None
    return best


async def score(engine: "AsyncEngine", prompt: "Prompt", most: int = 0, **options: Any) -> Output:
    """The prompt's log-probabilities, with the `most` likeliest tokens at each place; nothing is generated."""
    params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=most)
    return await engine.complete(prompt, params, **options)


def abort(engine: "AsyncEngine", streams: list[Stream]) -> None:
    """End what is not over of some requests."""
    for stream in streams:
        engine.abort(stream.id)
