"""Every setting that a golden model is there for shows in its logits: a wrong one would be found."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.models import (
    AttentionConfig,
    FeedForwardConfig,
    MLAConfig,
    MoEConfig,
    RMSNormConfig,
    RopeConfig,
    tree,
)
from maxstack.models.transformer import Transformer, TransformerConfig
from tests.models.families.test_parity import LOGITS_BOUND, QUICK, filled, golden, opened

SEEN = 5 * LOGITS_BOUND
"""Of the largest logit: what a mistake has to move them by at least."""


def swap(config, kind: type, **fields):
    """The tree of configs with some fields of every config of one kind changed."""
    if isinstance(config, tuple):
        return tuple(swap(item, kind, **fields) for item in config)
    if not dataclasses.is_dataclass(config):
        return config
    inner = {f.name: swap(getattr(config, f.name), kind, **fields) for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **inner | (fields if isinstance(config, kind) else {}))


def moved(model: Transformer, name: str) -> float:
    """Largest difference of the logits from the reference's, of the largest logit."""
    wanted = golden(name)["logits"]
    run = jax.jit(lambda model, tokens: model(tokens), compiler_options=QUICK)
    return float(
        np.abs(run(model, jnp.asarray(golden(name)["tokens"])) - wanted).max() / np.abs(wanted).max()
    )


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("llama-llama3", RopeConfig, {"scaling": "none"}),
        ("llama-llama3", RopeConfig, {"high_frequency_factor": 4.0}),
        ("llama-linear", RopeConfig, {"scaling": "none"}),
        ("llama-dynamic", RopeConfig, {"scaling": "none"}),
        ("llama-yarn", RopeConfig, {"attention_factor": 1.0}),
        ("llama-yarn", RopeConfig, {"scaling": "linear"}),
        ("gemma2-plain", AttentionConfig, {"softcap": None}),
        ("gemma2-plain", AttentionConfig, {"scale": None}),
        ("gemma2-plain", FeedForwardConfig, {"activation": "silu"}),
        ("gemma2-plain", RMSNormConfig, {"unit_offset": False}),
        ("gemma2-plain", TransformerConfig, {"embedding_scale": 1.0}),
        ("gemma2-plain", TransformerConfig, {"logit_softcap": None}),
        ("granite-plain", TransformerConfig, {"logit_scale": 1.0}),
        ("phi3-long", RopeConfig, {"scaling": "none"}),
        ("mixtral-plain", MoEConfig, {"normalize": False}),
        ("mixtral-plain", MoEConfig, {"experts_per_token": 1}),
        ("deepseek3-plain", MoEConfig, {"scoring": "softmax"}),
        ("deepseek3-plain", MoEConfig, {"routed_scale": 1.0}),
        ("deepseek3-yarn", MLAConfig, {"scale": 1.0}),
        ("gptoss-no-bias", MoEConfig, {"clamp": None}),
    ],
)
def test_each_setting_shows_in_the_logits(name, kind, fields):
    family, config, tensors = opened(name)
    right = filled(family, dataclasses.replace(config, dtype="float32"), tensors)
    wrong = swap(right.config, kind, **fields)
    assert wrong != right.config
    abstract = tree.abstract(lambda: wrong.build(jax.random.key(0)))
    assert moved(tree.rebuild(abstract, tree.leaves(right)), name) > SEEN


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral-plain", 1),
        ("mistral-plain", -1),
        ("gemma2-plain", 1),
        ("qwen2-window", 1),
        ("gptoss-plain", -1),
    ],
)
def test_a_window_off_by_one_shows_in_the_logits(name, change):
    family, config, tensors = opened(name)
    right = filled(family, dataclasses.replace(config, dtype="float32"), tensors)
    size = next(b.attention.window for s in config.stacks for b in s.pattern if b.attention.window)
    stacks = tuple(
        dataclasses.replace(
            stack,
            pattern=tuple(
                swap(b, AttentionConfig, window=size + change) if b.attention.window else b
                for b in stack.pattern
            ),
        )
        for stack in right.config.stacks
    )
    wrong = dataclasses.replace(right.config, stacks=stacks)
    abstract = tree.abstract(lambda: wrong.build(jax.random.key(0)))
    assert moved(tree.rebuild(abstract, tree.leaves(right)), name) > SEEN


@pytest.mark.parametrize(
    ("name", "ending", "mistake"),
    [
        ("qwen3-plain", "attention.q.w", lambda w: np.stack(np.split(w, 2, -1), -1).reshape(w.shape)),
        ("qwen2-plain", "attention.k.b", np.zeros_like),
        ("deepseek3-plain", "feed_forward.balance", np.zeros_like),
        ("llama-plain", "attention.o.w", np.flipud),
        ("gptoss-plain", "attention.sinks", np.zeros_like),
    ],
    ids=[
        "interleaved rotary pairs",
        "no key offset",
        "no balancing bias",
        "layers in another order",
        "no sinks",
    ],
)
def test_a_mistake_in_the_weights_is_found(name, ending, mistake):
    family, config, tensors = opened(name)
    right = filled(family, dataclasses.replace(config, dtype="float32"), tensors)
    leaves = tree.leaves(right)
    changed = {
        leaf: jnp.asarray(mistake(np.asarray(a))) for leaf, a in leaves.items() if leaf.endswith(ending)
    }
    assert changed
    assert moved(tree.rebuild(right, leaves | changed), name) > SEEN
