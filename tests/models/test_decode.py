"""Decoding with a cache gives the logits of a full forward pass, whatever the rows' lengths and the chunks' sizes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.models import BlockConfig, RopeConfig, Transformer, TransformerConfig
from maxstack.models.decode import DecodeCache, decode, init_cache
from tests.models.tiny import CONFIGS, GATED, GROUPED, build, model_config, tokens

# Of logits of size 1: float32, sums over 32 cache slots instead of the row's tokens. 3e-6 was measured.
ROUNDING = {"rtol": 3e-5, "atol": 3e-5}
LENGTH = 14
full = jax.jit(lambda model, ids: model(ids))
step = jax.jit(decode)


def dynamic(original: int) -> TransformerConfig:
    rope = RopeConfig(theta=100.0, scaling="dynamic", factor=2.0, original_length=original)
    attention = dataclasses.replace(GROUPED, rope=rope)
    return model_config(BlockConfig(attention=attention, feed_forward=GATED))


def prefilled(model: Transformer, ids: jax.Array, counts: list[int]) -> tuple[jax.Array, DecodeCache]:
    """The first `counts` tokens of each row read at once, with other tokens as padding."""
    width = max(counts) + 2
    inside = jnp.arange(width) < jnp.asarray(counts)[:, None]
    padded = jnp.where(inside, ids[:, :width], 7)
    cache = init_cache(model.config, ids.shape[0], 32)
    return step(model, padded, cache, jnp.asarray(counts, jnp.int32))


@pytest.mark.parametrize("name", [*CONFIGS, "dynamic"])
def test_cached_decode_equals_full_forward(name):
    model = build(CONFIGS.get(name, dynamic(LENGTH)))
    ids = tokens(3, LENGTH)
    wanted = full(model, ids)
    counts = [3, 8, 5]
    given, cache = prefilled(model, ids, counts)
    for at in range(4):
        ends = [count + at - 1 for count in counts]
        np.testing.assert_allclose(given, wanted[jnp.arange(3), jnp.asarray(ends)], **ROUNDING)
        following = jnp.stack([ids[row, end + 1] for row, end in enumerate(ends)])[:, None]
        given, cache = step(model, following, cache)
    assert cache.lengths_b.tolist() == [7, 12, 9]


def test_a_chunk_equals_its_tokens_one_by_one():
    model, ids = build(CONFIGS["window"]), tokens(2, LENGTH)
    wanted = full(model, ids)
    _, cache = step(model, ids[:, :5], init_cache(model.config, 2, 32))
    given, cache = step(model, ids[:, 5:9], cache)  # longer than the window of 3
    np.testing.assert_allclose(given, wanted[:, 8], **ROUNDING)
    given, _ = step(model, ids[:, 9:13], cache, jnp.asarray([1, 4], jnp.int32))
    np.testing.assert_allclose(given, jnp.stack([wanted[0, 9], wanted[1, 12]]), **ROUNDING)


def test_dynamic_scaling_goes_by_real_tokens_not_by_padding():
    # A prompt past the original context: its base is that of its own length, whatever it is padded to.
    model, ids = build(dynamic(4)), tokens(3, LENGTH)
    counts = [3, 8, 5]
    given, _ = prefilled(model, ids, counts)
    for row, count in enumerate(counts):
        np.testing.assert_allclose(given[row], full(model, ids[row : row + 1, :count])[0, -1], **ROUNDING)


def test_the_cache_is_in_the_compute_type_and_as_small_as_it_can_be():
    batch, length = 2, 16
    sizes = {}
    for name in ("grouped", "latent"):
        config = dataclasses.replace(CONFIGS[name], dtype="bfloat16")
        leaves = jax.tree.leaves(jax.eval_shape(partial(init_cache, config, batch, length)).layers)
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
        sizes[name] = sum(leaf.size for leaf in leaves) // (2 * batch * length)
    assert sizes == {"grouped": 2 * 2 * 8, "latent": 16 + 4}  # numbers a token and layer


@pytest.mark.parametrize("name", ["grouped", "latent"])
def test_a_slot_off_by_one_is_found(name):
    model, ids = build(CONFIGS[name]), tokens(2, LENGTH)
    _, cache = step(model, ids[:, :8], init_cache(model.config, 2, 32))
    shifted = cache._replace(lengths_b=cache.lengths_b + 1)
    given, _ = step(model, ids[:, 8:9], shifted)
    assert np.abs(given - full(model, ids)[:, 8]).max() > 1e-2
