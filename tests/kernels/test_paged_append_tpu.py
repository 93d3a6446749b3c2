"""Single tokens written into pages by the TPU kernel: in their places, nothing else touched, no race."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from maxstack.kernels.dispatch import Chip, compiling_for
from maxstack.kernels.paged_attention import append_kv, append_latent, init_latent_cache, mosaic_tpu_token
from tests.kernels.paged import paged, rounded

CAREFUL = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan")
KINDS = [("int8", 128), pytest.param("bfloat16", 64, marks=pytest.mark.slow)] + [
    pytest.param(*each, marks=pytest.mark.slow)
    for each in itertools.product(("float32", "bfloat16", "int8", "int4"), (64, 128))
]


@pytest.fixture
def interpreted(monkeypatch):
    careful = functools.partial(mosaic_tpu_token.append_token, interpret=CAREFUL)
    monkeypatch.setattr(mosaic_tpu_token, "append_token", careful)


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_a_token_of_each_sequence_is_written_and_nothing_else_is(kind, size, interpreted):
    t, table = 2, np.array([[0, 7], [99, 1], [2, 3], [4, -1], [5, 8], [6, 9]], np.int32)
    # The second token of the third is in its next page; the fourth has none there; the fifth has but one token, the
    # first writes no page of the pool.
    lengths, counts = np.array([0, 30, 127, 127, 255, 128], np.int32), np.array([2, 2, 2, 2, 1, 2], np.int32)
    made = paged((512, 512), heads=2, size=size, page=128, entries=4, spare=2, kind=kind)
    random = np.random.default_rng(0)
    x = {name: random.normal(size=(6, t, 2, size)).astype(np.float32) for name in ("k", "v")}
    wanted = [None if pool is None else np.array(pool.astype(jnp.float32)) for pool in made.cache]
    for pages, scales, name, axis in ((0, 2, "k", 1), (1, 3, "v", 2)):
        numbers, scale, _ = rounded(x[name], kind)
        for i, j in itertools.product(range(6), range(t)):
            entry, place = divmod(lengths[i] + j, 128)
            if j < counts[i] and entry < 2 and 0 <= table[i, entry] < 10:
                np.moveaxis(wanted[pages][table[i, entry]], axis, 0)[place] = numbers[i, j]
                if scale is not None:
                    wanted[scales][table[i, entry], :, place] = scale[i, j]
    with compiling_for(Chip("tpu", "v5e")):
        found = append_kv(made.cache, jnp.asarray(x["k"]), jnp.asarray(x["v"]), table, lengths, counts)
        jax.block_until_ready(found)
    assert not interpret_pallas_call.races.races_found
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            # Scales are a division apart in the last place; numbers are the same.
            np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2e-7, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_latent_of_each_sequence_is_written(kind, interpreted, monkeypatch):
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(5, 1, 192)), jnp.float32)
    table, lengths = np.array([[1], [3], [4], [2], [0]], np.int32), np.array([100, 0, 127, 5, 64], np.int32)
    with compiling_for(Chip("tpu", "v5e")):
        cache = init_latent_cache(6, 192, dtype=kind)
        found = append_latent(cache, latents, table, lengths)
        monkeypatch.setattr(mosaic_tpu_token, "declined", lambda pools: "by XLA")
        wanted = append_latent(cache, latents, table, lengths)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=2e-7, atol=0)
