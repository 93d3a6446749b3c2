"""A model as named arrays and back, parts replaced, and the traps of the module library that this guards against."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxstack.config import UserError, from_json, to_json
from maxstack.models import RMSNormConfig, tree
from maxstack.models.layers import Weight, constant
from tests.models.tiny import CONFIGS, GATED, JOINED, VOCAB, WIDTH, build, tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_leaves_and_rebuild_are_inverse(name):
    model = build(CONFIGS[name])
    leaves = tree.leaves(model)
    abstract = tree.abstract(lambda: CONFIGS[name].build(jax.random.key(0)))
    again = tree.rebuild(abstract, dict(reversed(leaves.items())))  # names decide, not their order
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert all(given is leaves[key] for key, given in tree.leaves(again).items())


def test_names_are_those_of_checkpoints():
    # Stable: a checkpoint is read by them.
    assert set(tree.leaves(build(CONFIGS["grouped"]))) == {
        "embedding.table", "final_norm.scale",
        *(f"stacks.0.layers.0.attention.{x}.w" for x in "qkvo"),
        *(f"stacks.0.layers.0.feed_forward.{x}.w" for x in ("gate", "up", "down")),
        "stacks.0.layers.0.attention_norm.scale", "stacks.0.layers.0.feed_forward_norm.scale",
    }  # fmt: skip


def test_axes_name_every_dimension():
    model = build(JOINED)
    axes, leaves = tree.axes(model), tree.leaves(model)
    assert axes.keys() == leaves.keys()
    assert all(len(axes[name]) == leaves[name].ndim for name in leaves)
    assert axes["stacks.0.layers.0.attention.q.w"] == ("layers", "embed", "heads", "head_dim")
    assert axes["stacks.0.layers.1.feed_forward.gate"] == ("layers", "expert", "embed", "mlp")
    assert axes["stacks.0.layers.1.attention.k_up.w"] == ("layers", "kv_lora", "heads", "head_dim")
    assert axes["embedding.table"] == ("vocab", "embed")
    # The same from shapes alone.
    assert tree.axes(tree.abstract(lambda: JOINED.build(jax.random.key(0)))) == axes


def test_buffers_are_the_balancing_biases():
    assert tree.buffer_names(build(JOINED)) == {"stacks.0.layers.1.feed_forward.balance"}
    assert tree.buffer_names(build(CONFIGS["grouped"])) == frozenset()


def test_rebuild_refuses_what_does_not_fit():
    model = build(CONFIGS["grouped"])
    leaves = tree.leaves(model)
    table = leaves.pop("embedding.table")
    with pytest.raises(
        UserError, match=r"missing \['embedding.table'\], unexpected \['table'\] \(1 missing and 1"
    ):
        tree.rebuild(model, leaves | {"table": table})
    with pytest.raises(UserError, match=r"embedding.table has shape \(32, 64\), the model wants \(64, 32\)"):
        tree.rebuild(model, leaves | {"embedding.table": table.T})


def test_replace_changes_one_part_of_all_layers_and_leaves_the_original_alone():
    model, ids = build(CONFIGS["grouped"]), tokens(1, 6)
    before = model(ids)
    scale = Weight(jnp.full((2, 32), 3.0), axes=("norm",))
    changed = tree.replace(model, {"stacks.0.layers.0.attention_norm.scale": scale, "embedding.scale": 2.0})
    assert tree.leaves(changed)["stacks.0.layers.0.attention_norm.scale"].min() == 3.0
    assert tree.axes(changed) == tree.axes(model)
    assert changed.embedding.scale == 2.0
    assert np.array_equal(model(ids), before)
    assert not np.allclose(changed(ids), before, atol=0.1)
    shared = tree.leaves(changed)["embedding.table"]
    assert shared is tree.leaves(model)["embedding.table"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("stacks.0.layers.0.attentoin", "Block has .*'attention'.* no 'attentoin'"),
        ("stacks.3", "List has \\[0\\], no '3'"),
        ("embedding.table.values", "Weight has .* no 'values'"),
    ],
)
def test_replace_names_what_there_is(path, words):
    with pytest.raises(UserError, match=words):
        tree.replace(build(CONFIGS["grouped"]), {path: None})


def test_replace_refuses_a_bare_array():
    with pytest.raises(TypeError, match=r"embedding.table: a bare array is no leaf"):
        tree.replace(build(CONFIGS["grouped"]), {"embedding.table": jnp.zeros((64, 32))})


def test_replace_refuses_a_part_that_is_not_stacked():
    model = build(CONFIGS["grouped"])
    one = GATED.build(jax.random.key(0), WIDTH, 1.0)
    with pytest.raises(
        UserError, match=r"layers.0.feed_forward: .* \[\(2,\)\] over layers, the new ones \[\(\)\]"
    ):
        tree.replace(model, {"stacks.0.layers.0.feed_forward": one})
    with pytest.raises(UserError, match=r"jax\.vmap over as many keys"):
        tree.replace(model, {"stacks.0.layers.0.feed_forward.up.w": one.up.w})
    two = jax.vmap(lambda key: GATED.build(key, WIDTH, 1.0))(jax.random.split(jax.random.key(0), 2))
    assert tree.replace(model, {"stacks.0.layers.0.feed_forward": two})(tokens(1, 4)).shape == (1, 4, VOCAB)


def test_a_bare_array_in_a_model_is_named():
    class Bare(nnx.Module):
        def __init__(self):
            self.w = jnp.zeros(3)

    with pytest.raises(TypeError, match=r"w is a bare \w+: make it with layers\.weight"):
        tree.axes(Bare())
    with pytest.raises(TypeError, match=r"w is a bare"):
        tree.replace(build(CONFIGS["grouped"]), {"final_norm": Bare()})


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_json(name):
    assert from_json(to_json(CONFIGS[name])) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_array_of_a_model_is_a_variable_with_axes(name):
    # A bare array set on a module is no leaf under jit, vmap and eval_shape, and leaks without a word.
    model = build(CONFIGS[name])
    for module in modules(model):
        for key, value in vars(module).items():
            assert not isinstance(value, jax.Array | np.ndarray), f"{type(module).__name__}.{key}"
    variables = tree.named_variables(model)
    assert len(variables) == len(jax.tree.leaves(model))
    assert all(isinstance(variable, nnx.Variable) for variable in variables.values())


def modules(module: nnx.Module) -> list[nnx.Module]:
    children = [value for value in vars(module).values() if isinstance(value, nnx.Module | nnx.List)]
    lists = [item for child in children if isinstance(child, nnx.List) for item in child]
    return [
        module,
        *(m for child in [*children, *lists] if isinstance(child, nnx.Module) for m in modules(child)),
    ]


def test_a_stacked_constant_has_a_leading_axis():
    # jax.vmap broadcasts what does not depend on the key.
    norms = jax.vmap(lambda key: RMSNormConfig().build(4))(jax.random.split(jax.random.key(0), 3))
    assert norms.scale[...].shape == (3, 4)
    assert constant(1.0, (4,), ("norm",)).get_metadata()["axes"] == ("norm",)


def test_a_weight_set_inside_jit_does_not_reach_the_caller():
    # Modules are values: what changes comes out as a result.
    model = build(CONFIGS["grouped"])
    before = np.asarray(tree.leaves(model)["embedding.table"])

    @jax.jit
    def edit(model):
        model.embedding.table[...] = jnp.zeros((64, 32))
        return model

    after = edit(model)
    assert np.array_equal(tree.leaves(model)["embedding.table"], before)
    assert np.abs(tree.leaves(after)["embedding.table"]).max() == 0.0


def test_one_jitted_call_serves_all_weights_of_a_shape():
    calls = []

    @jax.jit
    def traced(model, ids):
        calls.append(1)
        return model(ids)

    for seed in (0, 1):
        traced(build(CONFIGS["grouped"], seed), tokens(1, 4))
    leaves = tree.leaves(build(CONFIGS["grouped"]))
    traced(
        tree.rebuild(tree.abstract(lambda: CONFIGS["grouped"].build(jax.random.key(0))), leaves), tokens(1, 4)
    )
    assert len(calls) == 1
