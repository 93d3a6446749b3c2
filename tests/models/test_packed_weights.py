"""Models with weights in few bits: what is packed, that it is the rounded model, decoding, memory, refusals."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import maxstack
from maxstack import sharding
from maxstack.config import UserError
from maxstack.kernels import cpu_native
from maxstack.kernels.quantized_matmul import KINDS, dequantize, quantize
from maxstack.models import packing, presets, tree
from maxstack.models.generation import Generator, SamplingParams
from maxstack.models.generation.programs import programs_for
from maxstack.models.moe import Experts, MoEConfig, run_experts
from maxstack.models.packed import Packed, PackedLinear, PackedMatrix
from maxstack.models.packing import Packing, experts, is_packed, linears, packed
from maxstack.models.save import save
from maxstack.models.transformer import Transformer
from maxstack.sharding import MeshConfig
from tests.models.tiny import CONFIGS, EXPERTS, VOCAB

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@jax.jit(static_argnums=1)
def there_and_back(w_nk, kind):
    return dequantize(quantize(w_nk, kind))


@functools.cache
def made(name: str) -> Transformer:
    return jax.jit(CONFIGS[name].build)(jax.random.key(0))


def rounded(model: Transformer, kind: str) -> Transformer:
    """The model in full precision, with the weights that its packed form stands for: by hand, layer by layer."""
    arrays = tree.leaves(model)
    for name, linear in linears(model):
        w, own = np.asarray(linear.w[...]), len(linear.axes)
        stacked = w.shape[: w.ndim - own]
        out = np.empty_like(w)
        for index in np.ndindex(*stacked):
            matrix = w[index].reshape(
                int(np.prod(w.shape[len(stacked) : len(stacked) + linear.contract])), -1
            )
            out[index] = np.asarray(dequantize(quantize(jnp.asarray(matrix.T), kind))).T.reshape(
                w[index].shape
            )
        arrays[f"{name}.w"] = jnp.asarray(out)
    for name, _ in experts(model):
        w = np.asarray(arrays[name])
        matrices = [there_and_back(jnp.asarray(w[index].T), kind).T for index in np.ndindex(*w.shape[:-2])]
        arrays[name] = jnp.stack(matrices).reshape(w.shape)
    return tree.rebuild(model, arrays)


FEW = [
    name if name in ("grouped", "mixture") else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS
]


@pytest.mark.parametrize("name", FEW)
def test_a_packed_model_is_the_model_with_rounded_weights(name):
    model = made(name)
    tokens = jnp.asarray(np.arange(12)[None] % VOCAB)
    for kind in KINDS if name == "grouped" else KINDS[1:2]:
        few = packed(model, kind)
        found = [type(tree.part(few, linear)) for linear, _ in linears(model)]
        assert found
        assert set(found) == {PackedLinear}
        assert {type(tree.part(few, name)) for name, _ in experts(model)} <= {PackedMatrix}
        # The output projection is rounded in both: the hidden states are compared, and the logits with its table.
        meant, given = (jax.jit(lambda m: m.hidden(tokens)[0])(m) for m in (rounded(model, kind), few))
        np.testing.assert_allclose(np.asarray(given), np.asarray(meant), rtol=2e-4, atol=2e-4)
        head_vd = there_and_back(model.unembedding().T / model.config.logit_scale, "int8")
        logits = np.asarray(meant, np.float64) @ np.asarray(head_vd, np.float64).T * model.config.logit_scale
        if (cap := model.config.logit_softcap) is not None:
            logits = cap * np.tanh(logits / cap)
        np.testing.assert_allclose(
            np.asarray(jax.jit(lambda m: m(tokens))(few)), logits, rtol=5e-4, atol=5e-4
        )


def test_what_stays_is_shared_and_what_is_packed_is_small():
    model = made("grouped")
    few = packed(model, "int8")
    before, after = tree.leaves(model), tree.leaves(few)
    assert after["embedding.table"] is before["embedding.table"]
    assert after["final_norm.scale"] is before["final_norm.scale"]
    w = "stacks.0.layers.0.feed_forward.up.w"
    assert w not in after
    assert after[f"{w}.values"].dtype == jnp.int8
    assert after[f"{w}.values"].size == before[w].size
    four = tree.leaves(packed(model, "int4-g32"))
    assert four[f"{w}.values"].dtype == jnp.uint8
    assert four[f"{w}.values"].nbytes == before[w].size // 2
    assert all(
        isinstance(v, Packed) == (v_name not in before) for v_name, v in tree.named_variables(few).items()
    )


def test_experts_are_packed_and_routers_are_not():
    model = made("mixture")
    before, after = tree.leaves(model), tree.leaves(packed(model, "int4-g32"))
    layer = "stacks.0.layers.0.feed_forward"
    assert [name for name, _ in experts(model)] == [f"{layer}.{name}" for name in ("gate", "up", "down")]
    for name, _ in experts(model):
        assert name not in after
        repeats, many, inputs, outputs = before[name].shape
        assert after[f"{name}.values"].shape == (repeats, many, outputs, inputs // 2)
        assert after[f"{name}.scale"].shape == (repeats, many, -(-inputs // 32), outputs)
    assert after[f"{layer}.router"] is before[f"{layer}.router"]


@pytest.mark.parametrize("cut", [True, False])
def test_experts_whose_groups_would_lie_on_several_devices_are_those_of_one_device(cut):
    random = np.random.default_rng(0)
    pack = jax.vmap(functools.partial(quantize, kind="int4-g32"))
    inner, last = (
        pack(jnp.asarray(random.normal(size=(4, *shape)), jnp.float32)) for shape in ((48, 32), (32, 48))
    )
    x = jnp.asarray(random.normal(size=(1, 2, 32)), jnp.float32)
    chosen, weights = jnp.asarray([[[0, 3], [1, 3]]]), jnp.asarray([[[0.7, 0.3], [0.5, 0.5]]])
    wanted = run_experts(x, chosen, weights, Experts(inner, inner, last), EXPERTS)
    mesh = sharding.build_mesh(MeshConfig(tensor=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        values, scale = (jax.P(None, "tensor"), jax.P(None, None, "tensor")) if cut else (jax.P(), jax.P())
        place = lambda array, spec: jax.device_put(array, jax.NamedSharding(mesh, spec))  # noqa: E731
        split = dataclasses.replace(
            inner, values=place(inner.values, values), scale=place(inner.scale, scale)
        )
        whole = jax.tree.map(lambda array: place(array, jax.P()), (x, chosen, weights, last))
        found = jax.jit(run_experts, static_argnums=4)(*whole[:3], Experts(split, split, whole[3]), EXPERTS)
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("on", ["cpu", "tpu"])  # the forms of the programs: unstacked, and a scan
def test_generation_from_a_packed_model_is_that_of_its_full_forward(name, on):
    few = packed(made(name), "int4-g32")
    prompt = [3, 1, 4, 1, 5]
    wanted = list(prompt)
    forward = jax.jit(lambda tokens: few(tokens))
    for _ in range(GREEDY.max_tokens):
        padded = jnp.asarray([wanted + [0] * (12 - len(wanted))])
        wanted.append(int(np.argmax(np.asarray(forward(padded))[0, len(wanted) - 1])))
    done = Generator(few, end_ids=[], on=on).generate([prompt, prompt[:2]], GREEDY)
    assert done[0].token_ids == wanted[len(prompt) :]


def test_the_decode_step_reads_packed_bytes():
    """No array in the compiled step is as large as a weight in full, but the token table that rows are taken of."""
    config = dataclasses.replace(CONFIGS["grouped"], vocab_size=1000)
    few = packed(config.build(jax.random.key(0)), "int4-g32")
    programs, weights = programs_for(few, "cpu")
    up = tree.leaves(few)["stacks.0.layers.0.feed_forward.up.w.values"]
    native = cpu_native.available()
    kind = jnp.uint32 if native else jnp.uint8
    assert [leaf for leaf in weights if leaf.size * leaf.itemsize == up[0].size and leaf.dtype == kind]
    text = step_text(programs, weights, config)
    assert "maxstack_int4_panel_product" in text or not native
    inner, outer = up.shape[1], few.config.width
    # By output, by input, or in panels of sixteen outputs.
    whole = rf"f32\[({inner},{outer}|{outer},{inner}|{inner // 16},{outer},16)\]"
    assert not re.search(whole, text)
    full = programs_for(config.build(jax.random.key(0)), "cpu")
    assert re.search(whole, step_text(*full, config))  # the pattern finds what it looks for


def step_text(programs, weights, config) -> str:
    """The compiled program of one decode step of one row."""
    from maxstack.models.generation.params import row_settings
    from maxstack.models.generation.sampling import Seen
    from maxstack.models.generation.state import State

    vocab = config.vocab_size
    seen = Seen(jnp.zeros((1, vocab), bool), jnp.zeros((1, vocab), jnp.int32))
    state = State(programs.empty(1, 128), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), seen)
    settings = jax.device_put(row_settings([GREEDY], vocab))
    return programs.compiled["pick"].lower(weights, state, settings).compile().as_text()


def test_leaves_are_packed_one_by_one_while_they_are_read(tmp_path, monkeypatch):
    model = made("grouped")
    save(model, None, tmp_path / "model")
    alive, most = [], []
    whole = sum(a.nbytes for a in tree.leaves(model).values())
    original = Packing.__call__

    def counted(self, leaf, array):
        found = original(self, leaf, array)
        alive.append(sum(a.nbytes for a in found.values()))
        most.append(sum(alive[:-1]) + array.nbytes)
        return found

    monkeypatch.setattr(Packing, "__call__", counted)
    few, _ = maxstack.load(tmp_path / "model", weights="int4-g32")
    assert is_packed(few)
    assert max(most) < 0.7 * whole  # the tiny model's table is a good part of it
    again = packed(model, "int4-g32")
    for name, array in tree.leaves(again).items():
        np.testing.assert_array_equal(
            np.asarray(tree.leaves(few)[name], np.float32), np.asarray(array, np.float32)
        )


def test_what_cannot_be_is_refused_with_the_way_out(tmp_path):
    model = made("grouped")
    few = packed(model, "int8")
    with pytest.raises(
        UserError, match="packed in few bits, which is not written: load it again without weights="
    ):
        save(few, None, tmp_path / "out")
    with pytest.raises(UserError, match="packed already: load it again"):
        packed(few, "int8")
    with pytest.raises((UserError, jaxtyping.TypeCheckError), match="int3"):
        maxstack.load(tmp_path, weights="int3")
    arrays = tree.leaves(model)
    name = "stacks.0.layers.0.feed_forward.up.w"
    arrays[name] = arrays[name].at[0, 0, 0].set(jnp.nan)
    with pytest.raises(
        UserError, match=f"{name} has weights that are not finite: they cannot be rounded to int8"
    ):
        packed(tree.rebuild(model, arrays), "int8")


def test_runs_of_outputs_are_those_of_the_whole(monkeypatch):
    model = made("grouped")
    whole = tree.leaves(packed(model, "int4-g32"))
    monkeypatch.setattr(packing, "RUN", 3 * model.config.width)
    for name, array in tree.leaves(packed(model, "int4-g32")).items():
        np.testing.assert_array_equal(np.asarray(array, np.float32), np.asarray(whole[name], np.float32))


WIDE = presets.llama(
    vocab_size=64, width=256, depth=2, heads=8, kv_heads=4, feed_forward=512, dtype="float32"
)


MIXTURE = dataclasses.replace(
    WIDE,
    stacks=tuple(
        dataclasses.replace(
            stack,
            pattern=tuple(
                dataclasses.replace(block, feed_forward=MoEConfig(size=256, experts=4, experts_per_token=2))
                for block in stack.pattern
            ),
        )
        for stack in WIDE.stacks
    ),
)


@pytest.mark.parametrize(
    ("config", "kind", "mesh"),
    [
        (WIDE, "int4-g32", MeshConfig(data=2, fsdp=2, tensor=2)),
        (MIXTURE, "int4-g32", MeshConfig(data=2, fsdp=2, tensor=2)),
        pytest.param(WIDE, "int8", MeshConfig(fsdp=8), marks=pytest.mark.slow),
        pytest.param(WIDE, "int4-g128", MeshConfig(fsdp=2, tensor=4), marks=pytest.mark.slow),
        pytest.param(MIXTURE, "int8", MeshConfig(fsdp=2, tensor=4), marks=pytest.mark.slow),
    ],
)
def test_packed_weights_over_devices_give_the_logits_of_one(config, kind, mesh, tmp_path):
    save(jax.jit(config.build)(jax.random.key(0)), None, tmp_path / "model")
    alone, _ = maxstack.load(tmp_path / "model", weights=kind)
    tokens = np.arange(8 * 6).reshape(8, 6) % 64
    meant = jax.jit(lambda m, t: m(t))(alone, jnp.asarray(tokens))
    devices = sharding.build_mesh(mesh, jax.devices()[:8])
    cut, _ = maxstack.load(tmp_path / "model", weights=kind, mesh=devices)
    name = "up.values" if config is MIXTURE else "up.w.values"
    up = tree.leaves(cut)[f"stacks.0.layers.0.feed_forward.{name}"]
    assert up.addressable_shards[0].data.size * mesh.tensor * max(1, mesh.fsdp) == up.size
    for name, array in tree.leaves(alone).items():
        np.testing.assert_array_equal(
            np.asarray(tree.leaves(cut)[name], np.float32), np.asarray(array, np.float32), err_msg=name
        )
    with jax.set_mesh(devices):
        given = jax.jit(lambda m, t: m(t))(cut, jax.device_put(tokens, sharding.batch_sharding(devices)))
    np.testing.assert_allclose(np.asarray(given), np.asarray(meant), rtol=1e-4, atol=1e-4)
