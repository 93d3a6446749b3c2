"""Decoding with a cache gives, in every family, the logits of the reference's full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.models.decode import decode, init_cache
from maxstack.models.transformer import TransformerConfig
from tests.models.families.test_parity import FIRST, LOGITS_BOUND, NAMES, QUICK, filled, golden, opened

PREFILLED = 24
"""Tokens read at once: more than any golden window, than the original context of those with long factors, and fewer,
with all that follow here, than that of those that scale by length."""
CHUNKS = (1, 1)
BY_LENGTH = ("dynamic", "longrope")
"""Scalings of which the goldens, made from longer rows, say something else."""
# What differs while decoding: latents, sinks, windows, mixtures, learnt positions, scaling by length.
QUICKLY = [
    name for name in FIRST
    if name.partition("-")[0] in
    ("deepseek3", "gemma2", "gemma3", "gpt2", "gptoss", "internlm", "llama", "mixtral", "phi3", "qwen2moe")
]  # fmt: skip


def scaled_by_length(config: TransformerConfig) -> bool:
    tables = [table for stack in config.stacks for b in stack.pattern for table in b.attention.rope_tables()]
    return any(rope.scaling in BY_LENGTH for rope, _ in tables)


@pytest.mark.parametrize(
    "name", [name if name in QUICKLY else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_cached_decode_gives_the_reference_s_logits(name):
    family, config, tensors = opened(name)
    model = filled(family, dataclasses.replace(config, dtype="float32"), tensors)
    chunks = (*CHUNKS, 3) if name in FIRST else CHUNKS  # each size is a program to compile
    ids = jnp.asarray(golden(name)["tokens"])[:, : PREFILLED + sum(chunks)]
    wanted = golden(name)["logits"]
    if scaled_by_length(config):
        wanted = np.asarray(jax.jit(lambda model, ids: model(ids), compiler_options=QUICK)(model, ids))
    step = jax.jit(decode, compiler_options=QUICK)
    given, cache = step(model, ids[:, :PREFILLED], init_cache(model.config, ids.shape[0], 32))
    at = PREFILLED
    bound = {"rtol": 0, "atol": LOGITS_BOUND * np.abs(wanted).max()}
    np.testing.assert_allclose(given, wanted[:, at - 1], **bound)
    for size in chunks:
        given, cache = step(model, ids[:, at : at + size], cache)
        at += size
        np.testing.assert_allclose(given, wanted[:, at - 1], **bound, err_msg=f"after {at} tokens")
