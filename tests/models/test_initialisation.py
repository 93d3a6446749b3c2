"""Fresh weights have the stated deviations, and the residual stream's variance does not grow with depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.models import MLAConfig, MoEConfig, llama, tree
from maxstack.models.layers import EMBEDDING_STD
from tests.models.tiny import CONFIGS, QUICK

DEPTH, WIDTH, HEADS, HEAD, INNER = 8, 256, 4, 32, 512
MODEL = llama(
    vocab_size=512, width=WIDTH, depth=DEPTH, heads=HEADS, kv_heads=2, head_size=HEAD, feed_forward=INNER,
    dtype="float32",
    tie_embeddings=False,
)  # fmt: skip

build = jax.jit(MODEL.build)


def test_weights_have_the_stated_deviation():
    leaves = tree.leaves(build(jax.random.key(0)))
    residual = (2 * DEPTH) ** -0.5
    layer = "stacks.0.layers.0"
    wanted = {
        "embedding.table": EMBEDDING_STD,
        "head": EMBEDDING_STD,
        f"{layer}.attention.q.w": WIDTH**-0.5,
        f"{layer}.attention.k.w": WIDTH**-0.5,
        f"{layer}.attention.v.w": WIDTH**-0.5,
        f"{layer}.attention.o.w": residual * (HEADS * HEAD) ** -0.5,
        f"{layer}.feed_forward.gate.w": WIDTH**-0.5,
        f"{layer}.feed_forward.up.w": WIDTH**-0.5,
        f"{layer}.feed_forward.down.w": residual * INNER**-0.5,
    }
    for name, std in wanted.items():
        values = np.asarray(leaves.pop(name))
        # The deviation of n samples is itself off by 1 / sqrt(2 n): 0.2 % here, five times that is allowed.
        assert abs(values.std() / std - 1) < 0.01, name
        assert abs(values).max() <= 2 * std / 0.8796 + 1e-6, name  # truncated at two deviations
    assert all((np.asarray(values) == 1.0).all() for values in leaves.values()), leaves.keys()  # the norms


def test_layers_and_seeds_differ():
    w = build(jax.random.key(0)).stacks[0].layers[0].attention.q.w[...]
    other = build(jax.random.key(1)).stacks[0].layers[0].attention.q.w[...]
    assert not np.array_equal(w[0], w[1])
    assert not np.array_equal(w, other)
    assert np.array_equal(w, build(jax.random.key(0)).stacks[0].layers[0].attention.q.w[...])


@pytest.mark.parametrize(
    ("config", "name", "fan_in"),
    [
        (MLAConfig(heads=4, kv_rank=64, nope_size=32, rope_size=16, v_size=48), "o.w", 4 * 48),
        (MoEConfig(size=64, experts=8, experts_per_token=2, shared_size=96), "down", 64),
        (MoEConfig(size=64, experts=8, experts_per_token=2, shared_size=96), "shared.down.w", 96),
    ],
)
def test_all_that_writes_into_the_residual_stream_is_scaled_with_depth(config, name, fan_in):
    made = jax.jit(lambda key: config.build(key, 128, 0.25))(jax.random.key(0))
    values = np.asarray(tree.leaves(made)[name])
    assert (
        abs(values.std() / (0.25 * fan_in**-0.5) - 1) < 0.02
    )  # 12288 samples and more: 0.6 % is one deviation


def test_variance_of_the_residual_stream_does_not_grow_with_depth():
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 512, (2, 32)), jnp.int32)
    variances = []
    for depth in (2, 32):
        stack = dataclasses.replace(MODEL.stacks[0], repeats=depth)
        model = jax.jit(dataclasses.replace(MODEL, width=64, stacks=(stack,)).build)(jax.random.key(3))
        _, reports = jax.jit(lambda m: m.hidden(ids, collect=("residual",)), compiler_options=QUICK)(model)
        variances.append(float(jnp.var(reports["0.0"]["tap.residual"][-1])))
    # Each of the 2 L parts adds its own variance / (2 L): 0.35 and 0.48 were measured, the difference being that deeper
    # layers see tokens that are more alike, and average less of them away. Unscaled, it would be 16 times as much.
    assert 0.5 * variances[0] < variances[1] < 2.0 * variances[0], variances
    assert 0.05 < variances[0] < 1.0, variances


def test_untrained_logits_are_near_zero():
    # So that the first loss is ln(vocabulary): 0.02 * sqrt(256) = 0.3 is the deviation of a logit.
    model = build(jax.random.key(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 512, (2, 32)), jnp.int32)
    logits = jax.jit(lambda m, ids: m(ids))(model, ids)
    assert 0.25 < float(jnp.std(logits)) < 0.4
    loss = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(ids, -1, 1)[..., None], -1))
    assert abs(float(loss) - np.log(512)) < 0.15  # variance / 2, and the mean of 64 draws


def test_weights_and_buffers_are_float32_under_any_compute_type():
    for config in CONFIGS.values():
        leaves = tree.leaves(
            tree.abstract(lambda c=config: dataclasses.replace(c, dtype="bfloat16").build(jax.random.key(0)))
        )
        assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.float32)}
