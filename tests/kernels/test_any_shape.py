"""Attention and cross-entropy of shapes that hypothesis draws, in float64: values as brute force has them, gradients as
differences of brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.kernels.attention import attention
from maxstack.kernels.attention.blocks import Blocks
from maxstack.kernels.cross_entropy import cross_entropy
from tests.kernels.test_against_numpy import brute_force, nll_and_lse

# Roundings of float64; of a difference over 2e-6 of numbers of size 1 to 100, eight digits or so.
CLOSE, SLOPE = {"rtol": 1e-11, "atol": 1e-11}, {"rtol": 2e-5, "atol": 2e-6}
STEP = 1e-6


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def along(function, arrays, ways) -> float:
    """The slope of a function of numpy arrays along `ways`."""
    ends = [function(*(a + sign * STEP * w for a, w in zip(arrays, ways, strict=True))) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * STEP)


@settings(max_examples=6, deadline=None)
@given(
    lengths=st.sampled_from([(1, 1), (1, 7), (9, 9), (19, 23), (23, 5)]),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    sizes=st.sampled_from([(3, 3), (4, 2)]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 6]),
    softcap=st.sampled_from([None, 2.0]),
    packed=st.booleans(),
    sunk=st.booleans(),
    looped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_and_its_gradients_equal_brute_force(
    lengths, heads, sizes, causal, window, softcap, packed, sunk, looped, seed
):
    random, (t, s), (n, k), (h, w) = np.random.default_rng(seed), lengths, heads, sizes
    q, keys, v = (random.normal(size=(2, *shape)) for shape in ((t, n, h), (s, k, h), (s, k, w)))
    sinks, options = random.normal(size=n), {"causal": causal, "window": window, "softcap": softcap}
    positions = np.tile(np.arange(t), (2, 1)), np.tile(np.arange(s), (2, 1))
    segments = tuple(np.sort(random.integers(0, 3, (2, size)), 1) for size in (t, s)) if packed else None
    arrays = (q, keys, v, sinks) if sunk else (q, keys, v)
    ways = [random.normal(size=a.shape) for a in arrays]
    on_out, on_lse = random.normal(size=(2, t, n, w)), random.normal(size=(2, t, n))

    def weighed(numbers, out, lse):
        return (on_out * out).sum() + (on_lse * numbers.where(numbers.isfinite(lse), lse, 0.0)).sum()

    def meant(q, keys, v, sinks=None):
        return brute_force(q, keys, v, segments=segments, positions=positions, sinks=sinks, **options)

    def ours(q, keys, v, sinks=None):
        ids = None if segments is None else tuple(map(jnp.asarray, segments))
        config = Blocks(query=8, key=8, unrolled=1) if looped else Blocks(query=8)
        return attention(
            q, keys, v, sinks=sinks, segment_ids=ids, return_lse=True, config=config,
            implementation="xla", **options,
        )  # fmt: skip

    def value(*arrays):
        out, lse = ours(*arrays)
        return weighed(jnp, out, lse), (out, lse)

    (_, found), gradients = jax.jit(jax.value_and_grad(value, tuple(range(len(arrays))), has_aux=True))(
        *map(jnp.asarray, arrays)
    )
    for one, other in zip(found, meant(*arrays), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)
    slope = along(lambda *arrays: weighed(np, *meant(*arrays)), arrays, ways)
    ours_along = sum((np.asarray(g) * way).sum() for g, way in zip(gradients, ways, strict=True))
    np.testing.assert_allclose(ours_along, slope, **SLOPE)


@settings(max_examples=6, deadline=None)
@given(
    tokens=st.sampled_from([1, 7, 33]),
    d=st.sampled_from([1, 6]),
    v=st.sampled_from([1, 2, 41]),
    softcap=st.sampled_from([None, 3.0]),
    z_loss=st.sampled_from([0.0, 0.01]),
    chunk=st.sampled_from([None, 1, 8]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_cross_entropy_and_its_gradients_equal_float64(tokens, d, v, softcap, z_loss, chunk, share, seed):
    random = np.random.default_rng(seed)
    x, w = random.normal(size=(tokens, d)), random.normal(size=(d, v))
    labels, weights = random.integers(0, v, tokens), random.random(tokens) * (random.random(tokens) < share)
    ways = random.normal(size=x.shape), random.normal(size=w.shape)

    def meant(x, w):
        nll, lse = nll_and_lse(x, w, labels, softcap)
        return np.sum(weights * (nll + z_loss * lse**2))

    def ours(x, w):
        ids, kept = jnp.asarray(labels), jnp.asarray(weights)
        return cross_entropy(x, w, ids, kept, z_loss=z_loss, softcap=softcap, chunk=chunk)[0]

    loss, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(jnp.asarray(x), jnp.asarray(w))
    np.testing.assert_allclose(loss, meant(x, w), **CLOSE)
    found = sum((np.asarray(g) * way).sum() for g, way in zip(gradients, ways, strict=True))
    np.testing.assert_allclose(found, along(meant, (x, w), ways), **SLOPE)
