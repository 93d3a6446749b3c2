"""Logits, gradients and config.json of every family equal the reference's, on tiny random models of odd shapes.

The golden files are made by tests/goldens/families/make.py, which says how.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.kernels.cross_entropy import cross_entropy
from maxstack.models import tree
from maxstack.models.families import FAMILIES, Family, family_for, read_config
from maxstack.models.families.weights import read_into, write_from
from maxstack.models.transformer import Transformer, TransformerConfig

GOLDENS = Path(__file__).resolve().parents[2] / "goldens" / "families"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.npz"))
FIRST = sorted({name.partition("-")[0]: name for name in reversed(NAMES)}.values())
"""One model of each family."""
# What differs in a backward pass: latents, sinks, mixtures, tanh-capped or scaled parts, biases, norms after a layer.
WITH_GRADIENTS = ("deepseek3", "gemma", "gpt2", "gptoss", "llama", "olmo2", "qwen2moe")
# Of the largest logit. Float32 sums in another order; a planted bug (a transposed square matrix, another epsilon,
# a window one token longer) moves logits by 1e-3 of it or more.
LOGITS_BOUND = 2e-4
BFLOAT16_BOUND = 0.15
"""Of the largest logit: 8 bits of mantissa through random layers without residual scaling."""
GRADIENT_BOUND = 2e-3
"""Of the largest entry of each gradient, of which 5e-4 is the golden's own rounding to float16."""
QUICK = {"xla_backend_optimization_level": 0}


@cache
def golden(name: str) -> dict[str, Any]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def opened(name: str) -> tuple[Family, TransformerConfig, dict[str, np.ndarray]]:
    arrays = golden(name)
    family, config = read_config(json.loads(arrays["config"].tobytes()), name)
    return family, config, {key[2:]: arrays[key] for key in arrays if key.startswith("w:")}


def filled(family: Family, config: TransformerConfig, tensors: dict[str, np.ndarray]) -> Transformer:
    abstract = tree.abstract(lambda: config.build(jax.random.key(0)))
    arrays = {leaf: np.full(a.shape, np.nan, np.float32) for leaf, a in tree.leaves(abstract).items()}
    for entry in family.entries(config):
        assert tensors[entry.source].shape == entry.form.shape, (entry, tensors[entry.source].shape)
        part = arrays[entry.leaf][entry.index] if entry.index else arrays[entry.leaf]
        read_into(part, entry.form, tensors[entry.source])
    for leaf, array in arrays.items():
        if any(leaf.endswith(name) for name in family.absent):
            array[...] = 0.0
        assert np.isfinite(array).all(), leaf
    return tree.rebuild(abstract, {leaf: jnp.asarray(array) for leaf, array in arrays.items()})


def logits_of(name: str, dtype: str) -> np.ndarray:
    import dataclasses

    family, config, tensors = opened(name)
    model = filled(family, dataclasses.replace(config, dtype=dtype), tensors)
    run = jax.jit(lambda model, tokens: model(tokens), compiler_options=QUICK)
    return np.asarray(run(model, jnp.asarray(golden(name)["tokens"])))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_reference_s(name):
    wanted = golden(name)["logits"]
    given = logits_of(name, "float32")
    np.testing.assert_allclose(given, wanted, rtol=0, atol=LOGITS_BOUND * np.abs(wanted).max())


@pytest.mark.parametrize("name", NAMES)
def test_the_config_and_every_tensor_go_out_as_they_came_in(name):
    family, config, tensors = opened(name)
    assert family.expresses(config), family.keys(config)
    assert family_for(config, prefer=family.name) is family
    model = filled(family, config, tensors)
    leaves = {leaf: np.asarray(array) for leaf, array in tree.leaves(model).items()}
    written: dict[str, np.ndarray] = {}
    for entry in family.entries(config):
        target = written.setdefault(entry.source, np.full(entry.form.shape, np.nan, np.float16))
        write_from(target, entry.form, leaves[entry.leaf][entry.index])
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)


@pytest.mark.parametrize(
    "name",
    [
        name if name.startswith(WITH_GRADIENTS) else pytest.param(name, marks=pytest.mark.slow)
        for name in NAMES
        if any(key.startswith("g:") for key in golden(name))
    ],
)
def test_gradients_of_the_loss_are_the_reference_s(name):
    import dataclasses

    family, config, tensors = opened(name)
    config = dataclasses.replace(config, dtype="float32")
    model, tokens = filled(family, config, tensors), jnp.asarray(golden(name)["tokens"])

    def loss(model):
        x, _ = model.hidden(tokens)
        total, _ = cross_entropy(x[:, :-1], model.unembedding(), tokens[:, 1:], softcap=config.logit_softcap)
        return total / tokens[:, 1:].size

    grads = {leaf: np.asarray(a) for leaf, a in tree.leaves(jax.grad(loss)(model)).items()}
    given: dict[str, np.ndarray] = {}
    for entry in family.entries(config):
        target = given.setdefault(entry.source, np.zeros(entry.form.shape, np.float32))
        write_from(target, entry.form, grads[entry.leaf][entry.index])
    wanted = {key[2:]: a.astype(np.float32) for key, a in golden(name).items() if key.startswith("g:")}
    assert wanted
    for key, gradient in wanted.items():
        bound = GRADIENT_BOUND * max(float(np.abs(gradient).max()), 1e-4)
        np.testing.assert_allclose(given[key], gradient, rtol=0, atol=bound, err_msg=key)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_golden_models(family):
    of = [
        name
        for name in NAMES
        if json.loads(golden(name)["config"].tobytes())["model_type"] in family.model_types
    ]
    assert len(of) >= 3, f"{family.name}: {of}"


@pytest.mark.parametrize("name", FIRST)
def test_bfloat16_logits_are_near_the_reference_s(name):
    """Of every token; of nine in ten where there are experts, since rounding changes the choice between near ones."""
    wanted = golden(name)["logits"]
    worst = np.abs(logits_of(name, "bfloat16") - wanted).max(-1) / np.abs(wanted).max()
    _, config, _ = opened(name)
    experts = any(hasattr(b.feed_forward, "experts") for stack in config.stacks for b in stack.pattern)
    assert np.mean(worst < BFLOAT16_BOUND) >= (0.9 if experts else 1.0), np.sort(worst.ravel())[-5:]


def test_the_page_lists_every_golden_model():
    from tests.models.families.parity_table import PAGE, listed

    assert sorted(listed(PAGE.read_text(encoding="utf-8"))) == NAMES
