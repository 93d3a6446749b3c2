"""A model with its layers in longer patterns is the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.models import tree
from maxstack.models.presets import llama
from maxstack.models.regroup import regroup


def model():
    config = llama(vocab_size=32, width=16, depth=6, heads=2, kv_heads=1, feed_forward=24, dtype="float32")
    return jax.jit(config.build)(jax.random.key(0))


@pytest.mark.parametrize("period", [1, 2, 3, 6])
def test_a_longer_pattern_gives_the_same_logits(period):
    before = model()
    after = regroup(before, period)
    assert len(after.config.stacks[0].pattern) == period
    tokens = jnp.arange(20)[None] % 32
    np.testing.assert_allclose(after(tokens), before(tokens), rtol=0, atol=1e-5)
    assert tree.leaves(after)["embedding.table"] is tree.leaves(before)["embedding.table"]


def test_layers_are_dealt_in_turn_and_again():
    before = model()
    twice = regroup(regroup(before, 2), 6)
    w = tree.leaves(before)["stacks.0.layers.0.attention.q.w"]
    for layer in range(6):
        np.testing.assert_array_equal(
            tree.leaves(twice)[f"stacks.0.layers.{layer}.attention.q.w"][0], w[layer]
        )


@pytest.mark.parametrize("period", [0, 4, 5])
def test_a_period_that_does_not_divide_is_refused(period):
    with pytest.raises(UserError, match="does not divide"):
        regroup(model(), period)
