"""Tensor-parallel serving: the engine on several devices says what it says on one."""

import dataclasses

import jax
import numpy as np
import pytest

from maxstack import sharding
from maxstack.config import UserError
from maxstack.models import tree
from maxstack.models.adapters import AdapterSlots
from maxstack.models.generation import SamplingParams
from maxstack.serve import Engine
from maxstack.sharding import MeshConfig
from tests.models.tiny import CONFIGS, build
from tests.serve.driven import LIMITS, prompts

GREEDY = SamplingParams(max_tokens=5, temperature=0.0, logprobs=2)
DRAWN = SamplingParams(max_tokens=5, temperature=1.0, top_k=20, seed=3, prompt_logprobs=1)
PROMPTS = prompts(3, 11, 6)
# Sums over devices instead of one sum, in float32, of log-probabilities around 3.
ROUNDING = 1e-4
SHAPES = dataclasses.replace(LIMITS, chunks=((2, 8),))


def on_mesh(model, tensor: int):
    """The model cut over the first devices."""
    mesh = sharding.build_mesh(MeshConfig(fsdp=1, tensor=tensor), jax.devices()[:tensor])
    held = sharding.weight_shardings(mesh, tree.axes(model), "parameters", 0)
    return tree.rebuild(
        model, {name: jax.device_put(leaf, held[name]) for name, leaf in tree.leaves(model).items()}
    )


def answers(model, **options):
    with Engine(model, limits=SHAPES, buckets=(4,), **options) as engine:
        # Each device holds its own heads of the cache; latents are read by all heads.
        pool = jax.tree.leaves(engine.asynchronous._loop.device._pools)[0]
        cut = sharding.mesh_of(model) is not None
        assert ("tensor" in getattr(pool.sharding, "spec", ())) == (cut and pool.ndim == 4)
        found = engine.generate(PROMPTS, [GREEDY, DRAWN, GREEDY])
        assert engine.asynchronous.compilations == 0
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grouped", {}),
        pytest.param("grouped", {"kv_dtype": "int8"}, marks=pytest.mark.slow),
        pytest.param("latent", {}, marks=pytest.mark.slow),
        pytest.param("mixture", {}, marks=pytest.mark.slow),
    ],
)
def test_two_devices_say_what_one_says(name, options):
    model = build(CONFIGS[name])
    wanted, given = answers(model, on="tpu", **options), answers(on_mesh(model, 2), **options)
    for mine, theirs in zip(given, wanted, strict=True):
        assert mine.token_ids == theirs.token_ids
        for a, b in zip(mine.logprobs or [], theirs.logprobs or [], strict=True):
            np.testing.assert_allclose(a.logprob, b.logprob, atol=ROUNDING)


def test_adapters_on_a_mesh_are_refused():
    with pytest.raises(UserError, match=r"adapters.*2 devices"):
        Engine(on_mesh(build(CONFIGS["grouped"]), 2), limits=SHAPES, adapters=AdapterSlots(count=1, rank=4))
