"""What the whole model promises: depth as a scan, documents kept apart, precision, what the backward pass keeps."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxstack.config import UserError
from maxstack.models import BlockConfig, RopeConfig, StackConfig, Transformer, TransformerConfig, tree
from maxstack.models.remat import rematerialised
from tests.models.tiny import CONFIGS, GATED, GROUPED, JOINED, QUICK, build, model_config, tokens

# Float32 sums of at most 64 terms, in another order, through 4 layers: logits of size 1 were seen to differ by 4e-6.
ROUNDING = {"rtol": 3e-5, "atol": 3e-5}
DYNAMIC = model_config(
    BlockConfig(
        attention=dataclasses.replace(
            GROUPED, rope=RopeConfig(theta=100.0, scaling="dynamic", factor=2.0, original_length=4)
        ),
        feed_forward=GATED,
    )
)


@jax.jit
def logits(model: Transformer, *batch: jax.Array) -> jax.Array:
    return model(*batch)


def unrolled(config: TransformerConfig, model: Transformer) -> Transformer:
    """The same model with every layer written out: nothing is scanned."""
    (stack,) = config.stacks
    period = len(stack.pattern)
    pattern = dataclasses.replace(stack, pattern=stack.pattern * stack.repeats, repeats=1)
    arrays = {}
    for name, value in tree.leaves(model).items():
        if not name.startswith("stacks."):
            arrays[name] = value
            continue
        _, _, _, layer, rest = name.split(".", 4)
        for r in range(stack.repeats):
            arrays[f"stacks.0.layers.{r * period + int(layer)}.{rest}"] = value[r : r + 1]
    deep = dataclasses.replace(config, stacks=(pattern,))
    return tree.rebuild(tree.abstract(lambda: deep.build(jax.random.key(0))), arrays)


@pytest.mark.parametrize("name", CONFIGS)
def test_scan_equals_unrolled_layers(name):
    model, ids = build(CONFIGS[name]), tokens(2, 12)
    np.testing.assert_allclose(logits(model, ids), logits(unrolled(CONFIGS[name], model), ids), **ROUNDING)


# Two documents of 5 and 8 tokens in a row, then padding.
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 8 + [0] * 3], jnp.int32)
RESTARTED = jnp.asarray([[*range(5), *range(8), 0, 0, 0]], jnp.int32)
FIRST, SECOND, PADDING = slice(0, 5), slice(5, 13), slice(13, 16)


@pytest.mark.parametrize("name", [*CONFIGS, "dynamic"])
def test_a_packed_document_has_the_logits_it_has_alone(name):
    model, ids = build(CONFIGS.get(name, DYNAMIC)), tokens(1, 16)
    packed = logits(model, ids, SEGMENTS, RESTARTED)
    for document in (FIRST, SECOND):
        np.testing.assert_allclose(packed[:, document], logits(model, ids[:, document]), **ROUNDING)


@pytest.mark.parametrize("name", [*CONFIGS, "dynamic"])
def test_changing_one_packed_document_leaves_the_others_logits_alone(name):
    model, ids = build(CONFIGS.get(name, DYNAMIC)), tokens(1, 16)
    before = logits(model, ids, SEGMENTS, RESTARTED)
    for changed, kept in ((FIRST, SECOND), (SECOND, FIRST), (PADDING, FIRST), (PADDING, SECOND)):
        other = ids.at[:, changed].set((ids[:, changed] + 1) % 64)
        after = logits(model, other, SEGMENTS, RESTARTED)
        assert np.array_equal(after[:, kept], before[:, kept])  # bit for bit: the same program, masked zeros
        assert changed == PADDING or not np.allclose(after[:, changed], before[:, changed], atol=0.1)


class Forgetful(nnx.Module):
    """An attention that drops the segment ids."""

    def __init__(self, attention: nnx.Module):
        self.attention = attention

    def __call__(self, x, tables, context, cache=None):
        return self.attention(x, tables, context._replace(segment_ids_bt=None), cache)


def test_segment_ids_dropped_in_one_layer_are_found():
    model, ids = build(CONFIGS["window"]), tokens(1, 16)
    place = (
        "stacks.0.layers.0.attention"  # the one with a window of 3: reaches over the border by 2 tokens only
    )
    broken = tree.replace(model, {place: Forgetful(tree.part(model, place))})
    other = ids.at[:, FIRST].set((ids[:, FIRST] + 1) % 64)
    before, after = (logits(broken, x, SEGMENTS, RESTARTED)[:, SECOND] for x in (ids, other))
    assert np.abs(after - before).max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_changes_its_own_and_later_logits_only(name):
    model, ids = build(CONFIGS[name]), tokens(2, 12)
    before, after = logits(model, ids), logits(model, ids.at[:, 6].add(-ids[:, 6] + (ids[:, 6] + 1) % 64))
    assert np.array_equal(before[:, :6], after[:, :6])
    assert not np.allclose(before[:, 6], after[:, 6], atol=0.1)


def test_a_window_reaches_exactly_so_far():
    config = model_config(
        BlockConfig(attention=dataclasses.replace(GROUPED, window=3), feed_forward=GATED), repeats=2
    )
    model, ids = build(config), tokens(1, 12)
    difference = np.abs(logits(model, ids) - logits(model, ids.at[0, 4].set((ids[0, 4] + 1) % 64))).max(
        (0, 2)
    )
    # Two layers, each of which hands a token on by 2 positions.
    assert (difference[4:9] > 1e-3).all()
    assert (difference[9:] == 0).all()


@pytest.mark.parametrize("name", ["grouped", "latent"])
def test_bfloat16_keeps_positions_apart_far_into_a_document(name):
    # Rotary attention sees differences of positions only; angles in bfloat16 would round 5000 to 5008.
    config = dataclasses.replace(CONFIGS[name], dtype="bfloat16")
    model, ids = build(config), tokens(2, 12)
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
    near, far = (logits(model, ids, jnp.ones_like(ids), positions + start) for start in (0, 5000))
    exact = logits(build(CONFIGS[name]), ids)
    # As far from each other as either is from the float32 logits, by the rounding of bfloat16.
    assert np.abs(near - far).max() < 2 * np.abs(near - exact).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_float32_under_bfloat16_compute(name):
    exact, ids = build(CONFIGS[name]), tokens(2, 12)
    given = logits(build(dataclasses.replace(CONFIGS[name], dtype="bfloat16")), ids)
    assert given.dtype == jnp.float32
    assert not np.array_equal(given, given.astype(jnp.bfloat16))  # they were not rounded on the way
    # 2^-9 relative a rounding, some tens of roundings in 4 layers; a router may choose another expert for a token.
    error = np.abs(given - logits(exact, ids))
    assert np.median(error) < 0.03
    assert name == "mixture" or error.max() < 0.2


def test_a_frequent_tokens_gradient_is_not_lost_in_bfloat16():
    # Summed in bfloat16, 8192 equal contributions would end at 256 of them.
    config = dataclasses.replace(CONFIGS["window"], dtype="bfloat16", tie_embeddings=False)
    model = build(config)

    def total(model: Transformer) -> jax.Array:
        x = model.embedding(jnp.zeros((4, 2048), jnp.int32), jnp.dtype(jnp.bfloat16))
        y = model.stacks[0].layers[0].feed_forward.down  # has an offset
        first = jax.tree.map(lambda leaf: leaf[0], y)
        return (
            x.astype(jnp.float32).sum()
            + first(jnp.zeros((4, 2048, 48), jnp.bfloat16)).astype(jnp.float32).sum()
        )

    grads = jax.jit(jax.grad(total))(model)
    np.testing.assert_allclose(grads.embedding.table[...][0], 3.0 * 8192, rtol=1e-6)
    np.testing.assert_allclose(grads.stacks[0].layers[0].feed_forward.down.b[...][0], 8192.0, rtol=1e-6)


def loss_of(ids: jax.Array) -> Callable[[Transformer], jax.Array]:
    mix = jnp.asarray(np.random.default_rng(5).standard_normal((*ids.shape, 64)), jnp.float32)
    return lambda model: jnp.mean(mix * model(ids))


POLICIES = ("none", "dots", "attention", "full")


@pytest.mark.parametrize(
    "config", [CONFIGS["grouped"], pytest.param(JOINED, marks=pytest.mark.slow)], ids=["grouped", "joined"]
)
def test_remat_policies_give_the_same_gradients(config):
    model, loss = build(config), loss_of(tokens(2, 12))
    grads = {}
    for remat in POLICIES:
        same = tree.replace(model, {"config": dataclasses.replace(config, remat=remat)})
        grads[remat] = tree.leaves(jax.jit(jax.grad(loss), compiler_options=QUICK)(same))
    for remat in POLICIES[1:]:
        for leaf, wanted in grads["none"].items():
            # The forward pass again, compiled with other neighbours: rounding of float32.
            bound = 1e-5 * float(np.abs(wanted).max()) + 1e-9
            np.testing.assert_allclose(
                grads[remat][leaf], wanted, atol=bound, rtol=0, err_msg=f"{remat} {leaf}"
            )


def kept_bytes(model: Transformer, loss: Callable) -> int:
    """Bytes that the forward pass leaves for the backward pass, the model itself aside."""
    _, pullback = jax.eval_shape(lambda model: jax.vjp(loss, model), model)
    own = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback)) - own


def test_remat_policies_keep_as_much_as_they_say():
    model, loss = build(CONFIGS["grouped"]), loss_of(tokens(4, 48))
    kept = {}
    for remat in POLICIES:
        config = dataclasses.replace(CONFIGS["grouped"], remat=remat)
        kept[remat] = kept_bytes(tree.replace(model, {"config": config}), loss)
    assert kept["full"] < kept["attention"] < kept["dots"] < kept["none"], kept


def test_offload_is_refused_where_there_is_no_host_memory_space():
    model = build(dataclasses.replace(CONFIGS["grouped"], remat="offload"))
    if jax.default_backend() != "cpu":
        pytest.skip("this backend can offload")
    with pytest.raises(UserError, match=r"'offload' needs an accelerator.*use 'full'"):
        model(tokens(1, 4))


def test_offload_is_judged_by_the_devices_compiled_for():
    """Ahead of time, an accelerator's program is traced on a host that has only CPUs."""
    for name, refused in (("tpu", False), ("cpu", True)):
        described = jax.sharding.AbstractDevice(device_kind=name, num_cores=1, platform=name)
        mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=described)
        expected = pytest.raises(UserError, match="compiled for cpu") if refused else nullcontext()
        with jax.sharding.use_abstract_mesh(mesh), expected:
            rematerialised(lambda x: x, "offload")


@pytest.mark.parametrize("name", ["window", "mixture"])
def test_program_size_does_not_grow_with_depth(name):
    def size(repeats: int) -> tuple[int, int]:
        stack = dataclasses.replace(CONFIGS[name].stacks[0], repeats=repeats)
        deep = dataclasses.replace(CONFIGS[name], stacks=(stack,), remat="full")
        model = tree.abstract(lambda: deep.build(jax.random.key(0)))
        ids = jax.ShapeDtypeStruct((2, 12), jnp.int32)
        step = jax.jit(jax.grad(lambda model, ids: jnp.mean(model(ids)))).lower(model, ids).as_text()
        return step.count("\n"), jax.jit(lambda model, ids: model(ids)).lower(model, ids).as_text().count(
            "\n"
        )

    assert size(2) == size(32)


def test_collected_activations_are_those_of_the_layers():
    config = CONFIGS["window"]
    model, ids = build(config), tokens(2, 12)
    x, reports = jax.jit(lambda model, ids: model.hidden(ids, collect=("residual", "attention")))(model, ids)
    assert set(reports) == {"0.0", "0.1"}
    last = reports["0.1"]["tap.residual"]
    assert last.shape == (2, 2, 12, 32)  # repeats, batch, position, width
    assert reports["0.0"]["tap.attention"].shape == (2, 2, 12, 32)
    np.testing.assert_allclose(model.final_norm(last[-1]), x, **ROUNDING)
    with pytest.raises(UserError, match=r"no activation \['logits'\]; a block has"):
        model.hidden(ids, collect=("logits",))


@pytest.mark.parametrize("name", ["grouped", "window"])
def test_hidden_and_unembedding_make_the_logits(name):
    model, ids = build(CONFIGS[name]), tokens(2, 12)
    cap = CONFIGS[name].logit_softcap
    given = jnp.einsum("btd,dv->btv", model.hidden(ids)[0], model.unembedding())
    given = given if cap is None else cap * jnp.tanh(given / cap)
    np.testing.assert_allclose(given, logits(model, ids), **ROUNDING)


def test_stacks_of_different_patterns_follow_each_other():
    first, second = (CONFIGS[name].stacks[0] for name in ("grouped", "latent"))
    config = dataclasses.replace(
        CONFIGS["grouped"], stacks=(first, StackConfig(pattern=second.pattern, repeats=1))
    )
    assert config.depth == 3
    model, ids = build(config), tokens(2, 12)
    x, reports = model.hidden(ids, collect=("residual",))
    np.testing.assert_allclose(model.final_norm(reports["1.0"]["tap.residual"][-1]), x, **ROUNDING)
    alone = model_config(*first.pattern, repeats=2)
    arrays = {k: v for k, v in tree.leaves(model).items() if not k.startswith("stacks.1")}
    shallow = tree.rebuild(tree.abstract(lambda: alone.build(jax.random.key(0))), arrays)
    _, short = shallow.hidden(ids, collect=("residual",))
    np.testing.assert_allclose(short["0.0"]["tap.residual"], reports["0.0"]["tap.residual"], **ROUNDING)
