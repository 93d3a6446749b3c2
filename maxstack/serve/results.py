"""What a plan gave, from what its programs had to say."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from maxstack.serve.embedding import Part, Pooled
from maxstack.serve.plan import Chunk, Plan
from maxstack.serve.programs import ENDED, NOT_FINITE, NOTHING, TOKEN, Read, Told
from maxstack.serve.request import Result

NO_NUMBERS = "the logits of this request are no finite numbers"


@dataclasses.dataclass
class Launched:
    """A plan that the device works on."""

    plan: Plan
    chunks: tuple[Told, Read, Pooled] | None = None
    steps: list[Told] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of one token, and the likeliest ones with theirs."""

    own: float
    ids: list[int]
    values: list[float]


@dataclasses.dataclass
class Found:
    """What a plan gave."""

    results: dict[int, Result] = dataclasses.field(default_factory=dict)
    """By row, for the scheduler."""
    logprobs: dict[str, list[Logprobs]] = dataclasses.field(default_factory=dict)
    """By request, one a token, for those that asked."""
    prompts: dict[str, tuple[int, list[Logprobs]]] = dataclasses.field(default_factory=dict)
    """By request that asked: a position, and the log-probabilities of the tokens from there on."""
    pooled: dict[str, Part] = dataclasses.field(default_factory=dict)
    """By request that asked: what its chunk adds to the embedding."""
    guessed: tuple[int, int] = 0, 0
    """Of a plan with guesses: the steps of all rows, and the tokens that they brought."""


def results(launched: Launched) -> Found:
    """What the plan gave; waits for it."""
    found, plan = Found(), launched.plan
    if launched.chunks is not None:
        said, read, pooled = launched.chunks
        take(found, [said], plan.chunks)
        for i, chunk in enumerate(plan.chunks):
            asked = chunk.request.params
            if (most := asked.sampling.prompt_logprobs) is not None:
                values = list(of_prompt(read, i, chunk, most))
                found.prompts[chunk.request.id] = chunk.start + 1, values
                check_finite(found, chunk.row, np.asarray([value.own for value in values]))
            if asked.pooled:
                part = Part(chunk.start, np.asarray(pooled.sum_bd)[i], np.asarray(pooled.last_bd)[i])
                found.pooled[chunk.request.id] = part
                check_finite(found, chunk.row, part.sum_d)
    if launched.steps:
        take(found, launched.steps, plan.decodes, 1 + plan.drafts)
    return found


def take(found: Found, said: list[Told], parts: Sequence[Any], width: int = 1) -> None:
    """Add what rows did in some steps, one after another; in each a row has `width` places."""
    count = len(parts)
    tokens = np.concatenate([by_row(step.tokens_b, width)[:count] for step in said], axis=1)
    status = np.concatenate([by_row(step.status_b, width)[:count] for step in said], axis=1)
    if width > 1:
        busy = (status.reshape(count, -1, width) != NOTHING).any(-1)
        found.guessed = int(busy.sum()), int(((status == TOKEN) | (status == ENDED)).sum())
    wanted = [i for i, part in enumerate(parts) if part.request.params.sampling.logprobs is not None]
    if (status == TOKEN).all():  # as in most steps
        for part, own in zip(parts, tokens.tolist(), strict=True):
            found.results[part.row] = Result(tuple(own))
    else:
        for part, own, did in zip(parts, tokens.tolist(), status.tolist(), strict=True):
            found.results[part.row] = result_of(own, did)
    if not wanted:
        return
    values = [jax.tree.map(np.asarray, step) for step in said]
    for i in wanted:
        request, most = parts[i].request, parts[i].request.params.sampling.logprobs
        spoken = [j for j, did in enumerate(status[i]) if did in (TOKEN, ENDED)]
        found.logprobs[request.id] = [
            logprobs_of(values[j // width], i * width + j % width, most)
            for j in spoken[: len(found.results[parts[i].row].tokens)]
        ]


def check_finite(found: Found, row: int, values: np.ndarray) -> None:
    """A row whose prompt gave something else than finite numbers fails, whether or not it was to be continued."""
    if not np.isfinite(values).all():
        found.results[row] = Result(error=NO_NUMBERS)


def by_row(values: Any, width: int) -> np.ndarray:
    """What was said, a row of places for each row."""
    return np.asarray(values).reshape(-1, width)


def result_of(tokens: list[int], status: list[int]) -> Result:
    """What a row did in some steps one after another."""
    taken = []
    for token, did in zip(tokens, status, strict=True):
        if did == NOT_FINITE:
            return Result(tuple(taken), error=NO_NUMBERS)
        if did in (TOKEN, ENDED):
            taken.append(token)
        if did == ENDED:
            return Result(tuple(taken), ended=True)
    return Result(tuple(taken))


def logprobs_of(said: Told, row: int, most: int) -> Logprobs:
    """Of a row's token in one step."""
    return Logprobs(
        float(said.logprobs_b[row]),
        said.top_ids_bm[row, :most].tolist(),
        said.top_logprobs_bm[row, :most].tolist(),
    )


def of_prompt(read: Read, i: int, chunk: Chunk, most: int) -> Iterator[Logprobs]:
    """Of the prompt's tokens that follow those of a chunk."""
    count = min(chunk.end, len(chunk.request.prompt) - 1) - chunk.start
    own, ids, values = (np.asarray(leaf)[i] for leaf in read)
    for j in range(count):
        yield Logprobs(float(own[j]), ids[j, :most].tolist(), values[j, :most].tolist())
