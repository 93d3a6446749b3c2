"""What a start of the server does not do: counted, not timed."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.kernels import cpu_native
from maxstack.kernels.quantized_matmul import KINDS
from maxstack.models import adapters
from maxstack.models.generation.matrix import Panels
from maxstack.models.generation.weights import can_loop, looped
from maxstack.models.load import load
from maxstack.models.packing import packed
from maxstack.models.paged.forward import Chunk
from maxstack.models.paged.pools import init_pools
from maxstack.models.save import save
from maxstack.serve import arguments
from maxstack.serve.compiled import Compiled
from maxstack.serve.device import Device
from maxstack.serve.forms import form_for
from maxstack.serve.sizes import default_limits
from tests.models.tiny import CONFIGS, build
from tests.serve.driven import CONFIG, LIMITS

native = pytest.mark.skipif(not cpu_native.available(), reason="there is no C++")
KERNELS = ["jax.experimental.pallas", "jax.experimental.mosaic"]
FRONT = ["fastapi", "uvicorn", "prometheus_client"]
STRANGERS = ["transformers", "torch", "orbax", "grain", "scipy", "matplotlib", "openai"]
IMPORTS = f"""
import json, sys
def there(*names): return [name for name in names if name in sys.modules]
from maxstack.serve.command import parser
parser().parse_args(["--model", "m"])
told = [there("jax", "numpy")]
import maxstack.serve.run
told.append(there(*{KERNELS + FRONT + STRANGERS}))
import maxstack.serve.assemble, maxstack.serve.operate.running
told.append(there(*{KERNELS + STRANGERS}))
print(json.dumps(told))
"""


def test_a_start_imports_what_it_needs_when_it_needs_it():
    """Arguments without jax; what reads the model without what answers for it; neither with kernels for accelerators,
    nor with libraries that others of our verbs use."""
    told = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == [[], [], []]
    assert arguments.WEIGHTS == KINDS


def wanted(config, limits, monkeypatch) -> list:
    """Names of the programs that a device compiles."""
    named = []
    monkeypatch.setattr(Compiled, "compile", lambda self, **told: named.extend(self._wanted))
    monkeypatch.setattr(Device, "reset", lambda self: None)
    form, weights = form_for(build(config))
    device = Device(config, form, weights, limits, config.dtype)
    device._pools, device._state = device._programs.gives("empty")
    device.warm_up()
    return named


def test_the_default_sizes_take_nine_programs(monkeypatch):
    limits = dataclasses.replace(default_limits(CONFIG, "float32"), pages=16)
    names = wanted(CONFIG, limits, monkeypatch)
    decodes = {name for name in names if name[0] == "decode"}
    assert decodes == {("decode", rows) for rows in (1, 4, 8, 16, 32)}
    assert len(set(names)) <= (
        10 if cpu_native.available() else 18
    )  # that which makes empty rows is one more


@native
def test_a_program_is_no_longer_for_more_layers():
    def lines(repeats: int) -> int:
        stacks = tuple(dataclasses.replace(stack, repeats=repeats) for stack in CONFIG.stacks)
        config = dataclasses.replace(CONFIG, stacks=stacks)
        form, weights = form_for(build(config))
        pools = jax.eval_shape(lambda: init_pools(config, LIMITS.pages, LIMITS.page, "float32"))
        device = Device(config, form, weights, LIMITS, "float32")
        chunk = device._prompts((), LIMITS.chunks[0]).chunk
        return jax.jit(form.advance).lower(weights, pools, chunk).as_text().count("\n")

    assert lines(2) == lines(5)


@native
@pytest.mark.usefixtures("optimized")
def test_the_loop_copies_neither_pools_nor_matrices():
    form, weights = form_for(build(CONFIG))
    pools = init_pools(CONFIG, 64, 8, "float32")
    one = np.ones(2, np.int32)
    chunk = Chunk(np.zeros((2, 1), np.int32), np.zeros((2, 8), np.int32), one, one, one)
    text = jax.jit(form.advance, donate_argnums=1).lower(weights, pools, chunk).compile().as_text() or ""
    leaves = [*jax.tree.leaves(pools), *(leaf for leaf in weights if leaf.ndim == 4)]
    shapes = {",".join(map(str, leaf.shape)) for leaf in leaves}
    assert len(leaves) == 9  # keys, values and the seven matrices of a layer
    assert all(f"[{shape}]" in text for shape in shapes)
    for shape in shapes | {shape.partition(",")[2] for shape in shapes}:
        assert not re.search(rf"= \w+\[(1,)?{shape}\]\S* (copy|dynamic-slice|fusion)\(", text)


@native
def test_layers_are_read_where_they_lie_as_each_alone():
    model = build(CONFIG)
    [stack] = looped(model).model.stacks
    block = stack.layers[0]
    linear = model.stacks[0].layers[0].feed_forward.up
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, CONFIG.width)), jnp.float32)
    for layer in range(2):
        alone = Panels(np.asarray(linear.w[...])[layer].T)
        found = cpu_native.panel_product_at(x, block.feed_forward.up.w.w[...], jnp.int32(layer))
        np.testing.assert_array_equal(found[:, : alone.outputs], alone(x))
    with pytest.raises(ValueError, match="no such matrix"):
        jax.block_until_ready(cpu_native.panel_product_at(x, block.feed_forward.up.w.w[...], jnp.int32(2)))


@native
def test_layers_with_other_matrices_are_written_out():
    assert can_loop(build(CONFIG))
    assert not any(can_loop(build(CONFIGS[name])) for name in ("latent", "mixture"))


@native
def test_a_model_that_is_used_up_leaves_its_matrices_one_after_the_other():
    kept, given = build(CONFIG), build(CONFIG)
    _, wanted = form_for(kept)
    _, weights = form_for(given, use_up=True)
    for one, other in zip(weights, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [linear.w[...].is_deleted() for _, linear in adapters.adaptable(given.stacks[0].layers[0])] == [
        True
    ] * 7
    assert not given.embedding.table[...].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))


def test_weights_that_are_kept_as_filed_are_laid_out_as_any(tmp_path):
    """In the same types too: others of the same model can take their place."""
    save(build(dataclasses.replace(CONFIG, dtype="bfloat16")), None, tmp_path)
    one, _ = load(tmp_path, as_filed=True, dtype="float32")
    other, _ = load(tmp_path, dtype="float32")
    for short, long in zip(form_for(one)[1], form_for(other)[1], strict=True):
        assert short.dtype == long.dtype
        np.testing.assert_array_equal(short, long)


def test_scales_of_packed_weights_keep_their_type():
    _, weights = form_for(packed(build(CONFIG), "int4-g32"))
    assert any(leaf.dtype == jnp.bfloat16 for leaf in weights)


@native
def test_memory_that_nobody_has_written_is_each_array_s_own():
    shape = jax.ShapeDtypeStruct((1000,), np.float32)
    one, other = jax.jit(lambda: cpu_native.untouched([shape, shape]))()
    assert one.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()
