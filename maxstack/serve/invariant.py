"""Where tokens are the same to the last bit in any company by themselves, and where invariant mode is needed.

XLA rounds the sums of a program as its shapes suggest, so a token may round differently in another chunk or among more
rows. In invariant mode (`Limits.invariant`) it is always computed by the same program at the same place of it.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from maxstack.kernels import cpu_native
from maxstack.models.adapters import AdapterSlots
from maxstack.models.attention import Attention
from maxstack.models.block import Block
from maxstack.models.feed_forward import FeedForward
from maxstack.models.generation.params import SamplingParams, row_settings
from maxstack.models.layers import Embedding, Identity, Linear, Positions, RMSNorm
from maxstack.models.packed import PackedLinear, PackedMatrix
from maxstack.models.remat import platform
from maxstack.models.transformer import Stack, Transformer
from maxstack.serve.device import Asked, Device
from maxstack.serve.forms import writes_in_place
from maxstack.serve.request import Request
from maxstack.serve.scheduler import Scheduler
from maxstack.sharding import mesh_of

log = logging.getLogger(__name__)

BY_ROW = {
    Transformer, Stack, Block, Attention, FeedForward, Linear, PackedLinear, PackedMatrix, RMSNorm, Identity, Embedding,
    Positions,
}  # fmt: skip
"""Parts whose sums C++ makes, each row in one order."""
TRIED = SamplingParams(max_tokens=4, temperature=1.0, seed=1, logprobs=0)
"""What `check_rows` asks for."""


def needed(model: Transformer, on: str | None = None, adapters: AdapterSlots | None = None) -> bool:
    """Whether invariant mode has to see to it here; says what was found."""
    reason = problem(model, on, adapters)
    if reason is None:
        log.info(
            "invariant: C++ sums each row in one order here, whatever its company; nothing else is needed"
        )
    else:
        log.info("invariant: one shape for prompts, one for decode steps, answers are replayed (%s)", reason)
    return reason is not None


def problem(model: Transformer, on: str | None = None, adapters: AdapterSlots | None = None) -> str | None:
    """Why a token's last bit depends on its company in the form that runs here; None where it does not."""
    if (on or platform()) != "cpu" or mesh_of(model) is not None:
        return "XLA sums by the shapes of programs"
    if not writes_in_place(model.config):
        return f"no C++: {cpu_native.problem()}"
    if jnp.dtype(model.config.dtype) != jnp.float32:
        return f"C++ computes in float32, this model in {model.config.dtype}"
    if adapters is not None:
        return "XLA computes adapters"
    others = {type(part).__name__ for part in parts(model) if type(part) not in BY_ROW}
    return f"XLA computes {', '.join(sorted(others))}" if others else None


def check_rows(device: Device) -> None:
    """Raises RuntimeError where what a request gets still depends on its place or on who is in the others.

    The compiler promises no such thing: here it is asked, with the programs that will serve. One prompt must give the
    same tokens and log-probabilities alone and in all places of a chunk, then in the first row, the last, and all.
    """
    limits = device.limits
    places, tokens = limits.chunks[0][:2]
    room = min(limits.max_length, limits.pages * limits.page)
    count = min(max(tokens, limits.page), room - TRIED.max_tokens)
    prompt = tuple((31 * i + 7) % device.config.vocab_size for i in range(count))
    [alone] = said(device, [prompt])
    for i, answer in enumerate(said(device, [prompt] * min(places, limits.rows))):
        if answer != alone:
            raise RuntimeError(
                f"invariant mode: place {i} of a chunk computes {answer}, the first one alone {alone}; give "
                "Limits.chunks one row, or serve without the mode"
            )
    pages = device._table[0].copy()
    for rows in ([0], [limits.rows - 1], list(range(limits.rows))):
        for row, answer in zip(rows, stepped(device, rows, pages, count, alone[0][0]), strict=True):
            if answer != alone[1]:
                raise RuntimeError(
                    f"invariant mode: row {row} of {limits.rows} computes {answer} where {len(rows)} rows have work, a "
                    f"request alone {alone[1]}; another number of rows may do better, or serve without the mode"
                )
    device.reset()


def stepped(
    device: Device, rows: list[int], pages_p: np.ndarray, length: int, token: int
) -> list[tuple[int, float]]:
    """What some rows say in one decode step, all with the same tokens in the same pages, while the others have none."""
    limits, vocab = device.limits, device.config.vocab_size
    count, first = limits.rows + 1, length // limits.page
    lengths, nexts = np.zeros(count, np.int32), np.arange(count, dtype=np.int32) % vocab
    lengths[rows], nexts[rows] = length, token
    device._table[:] = -1
    device._table[rows] = pages_p
    if length % limits.page == 0:  # the step writes into a page of each row's own, while there are some
        device._table[rows, first] = first + np.arange(len(rows)) % (limits.pages - first)
    settings = row_settings([TRIED] * count, vocab, [()] * count, [length] * count)
    ones = np.ones(count, np.int32)
    device._state = device._state._replace(lengths_r=lengths, next_r=nexts, left_r=ones, settings=settings)
    steps = device._steps(np.arange(limits.rows, dtype=np.int32), ones[:-1], ones[:-1], -ones[None, :-1], 0)
    told = device._run(("decode", limits.rows), steps)
    return [(int(told.tokens_b[row]), float(told.logprobs_b[row])) for row in rows]


def said(device: Device, prompts: list[tuple[int, ...]]) -> list[list[tuple[int, float]]]:
    """Each prompt's answer, all asked for at once: tokens with their log-probabilities."""
    limits = dataclasses.replace(device.limits, prefix_cache=False, waiting=len(prompts))
    scheduler, asked = Scheduler(limits), Asked(TRIED, ())
    answers: dict[str, list[tuple[int, float]]] = {}
    for i, prompt in enumerate(prompts):
        answers[str(i)] = []
        scheduler.add(Request(id=str(i), prompt=prompt, max_tokens=TRIED.max_tokens, arrived=0, params=asked))
    while (plan := scheduler.plan(0)) is not None:
        found = device.results(device.launch(plan))
        for event in scheduler.done(plan, found.results, 0):
            if event.tokens:
                told = found.logprobs[event.id][-len(event.tokens) :]
                values = [each.own for each in told]
                answers[event.id] += zip(event.tokens, values, strict=True)
    return list(answers.values())


def parts(module: Any) -> Iterator[nnx.Module]:
    """A module and all that it holds."""
    yield module
    for held in vars(module).values():
        for part in held if isinstance(held, nnx.List) else [held]:
            if isinstance(part, nnx.Module):
                yield from parts(part)
