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
from tests.models.lora import with_deltas, write_adapter
from tests.models.tiny import CONFIGS, build
from tests.serve.driven import LIMITS, prompts
from tests.serve.test_adapters import ask, check

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


@pytest.fixture(scope="module")
def grouped():
    return build(CONFIGS["grouped"])


def test_adapters_on_two_devices_say_what_merged_models_say(grouped, tmp_path):
    slots, models = AdapterSlots(count=2, rank=4), [grouped]
    with Engine(on_mesh(grouped, 2), limits=SHAPES, buckets=(4,), adapters=slots) as engine:
        engine.asynchronous.warm_up()
        assert any("tensor" in leaf.sharding.spec for leaf in room_of(engine))
        for i, rank in enumerate((4, 2)):
            folder, deltas = write_adapter(tmp_path / str(i), grouped, seed=i, rank=rank)
            models.append(with_deltas(grouped, deltas))
            engine.adapters.load(str(i), folder)
        outputs = ask(engine, list(zip(PROMPTS, (None, "0", "1"), strict=True)))
        assert engine.asynchronous.compilations == 0
    for model, output in zip(models, outputs, strict=True):
        check(model, output)


def room_of(engine):
    """The factors of all adapters."""
    return jax.tree.leaves(engine.asynchronous._loop.device.weights[1])


@pytest.mark.slow
@pytest.mark.parametrize("draft", [False, True])
def test_guesses_on_two_devices_change_nothing(grouped, draft):
    # Few tokens repeat themselves; a draft model does not know of the bias, and need not.
    few = () if draft else tuple((token, -100.0) for token in range(4, CONFIGS["grouped"].vocab_size))
    greedy = SamplingParams(max_tokens=24, temperature=0.0, logit_bias=few)
    drawn = dataclasses.replace(greedy, temperature=0.7, seed=3, repetition_penalty=1.2)
    rows = [[0, 1, 2, 3, 0, 1, 2], [3, 3, 1], [2, 0] * 5]

    def said(model, drafts, **options):
        limits = dataclasses.replace(SHAPES, drafts=drafts, tokens_a_step=36)
        with Engine(model, limits=limits, buckets=(4,), on="tpu", **options) as engine:
            engine.warm_up()
            if pace := engine.asynchronous._loop.pace:  # guesses are made whether they pay or not
                pace.costs = dict.fromkeys(pace.costs, 1.0)
            found = engine.generate(rows, [greedy, drawn, greedy])
            counters = engine.asynchronous.scheduler.counters
            assert engine.asynchronous.compilations == 0
        return [output.token_ids for output in found], counters.spec_decode_num_accepted_tokens

    cut = on_mesh(grouped, 2)
    options = {"draft": cut} if draft else {}  # it agrees with itself
    (wanted, _), (given, accepted) = said(grouped, 0), said(cut, 3, **options)
    assert given == wanted
    assert accepted > 0


def test_a_draft_model_on_other_devices_than_the_model_is_refused(grouped):
    limits = dataclasses.replace(SHAPES, drafts=3, tokens_a_step=36)
    with pytest.raises(UserError, match=r"draft model lies on one device, the model on 2 devices"):
        Engine(on_mesh(grouped, 2), limits=limits, draft=grouped)
