"""Where tokens are the same to the last bit in any company by themselves, and where invariant mode is needed.

XLA rounds the sums of a program as its shapes suggest, so a token may round differently in another chunk or among more
rows. In invariant mode (`Limits.invariant`) it is always computed by the same program at the same place of it.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from maxstack.kernels import cpu_native
from maxstack.models.adapters import AdapterSlots
from maxstack.models.attention import Attention
from maxstack.models.block import Block
from maxstack.models.feed_forward import FeedForward
from maxstack.models.generation.params import SamplingParams
from maxstack.models.layers import Embedding, Identity, Linear, Positions, RMSNorm
from maxstack.models.remat import platform
from maxstack.models.transformer import Stack, Transformer
from maxstack.serve.device import Asked, Device
from maxstack.serve.forms import writes_in_place
from maxstack.serve.request import Request
from maxstack.serve.scheduler import Scheduler
from maxstack.sharding import mesh_of

log = logging.getLogger(__name__)

BY_ROW = {Transformer, Stack, Block, Attention, FeedForward, Linear, RMSNorm, Identity, Embedding, Positions}
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
    """Raises RuntimeError where what a request gets still depends on its row or on who is in the others.

    The compiler promises no such thing: here it is asked, with the programs that will serve. One prompt alone, in every
    row at once, and behind others must say the same tokens with the same log-probabilities.
    """
    limits, vocab = device.limits, device.config.vocab_size
    longest = limits.max_length - TRIED.max_tokens
    prompt = tuple((31 * i + 7) % vocab for i in range(max(1, min(limits.chunks[0][1] + 1, longest))))
    others = [
        tuple((i * place + 3) % vocab for place in range(1, 2 + i % longest)) for i in range(limits.rows)
    ]
    [alone] = said(device, [prompt])
    for i, answer in enumerate(said(device, [prompt] * limits.rows)):
        if answer != alone:
            raise RuntimeError(f"invariant mode: row {i} of {limits.rows} computes {answer}, row 0 {alone}")
    if said(device, [*others[1:], prompt])[-1] != alone:
        raise RuntimeError(
            f"invariant mode: a request behind {len(others) - 1} others gets other numbers than alone"
        )
    device.reset()


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
