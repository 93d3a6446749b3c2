"""Grouped products for TPU and Hopper: in their interpreters, which look for races, and through the real compilers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from maxstack.kernels.dispatch import Chip, chip_of, compiling_for
from maxstack.kernels.grouped_matmul import (
    grouped_matmul,
    mosaic_gpu,
    mosaic_gpu_quantized,
    mosaic_tpu,
    visits,
)
from maxstack.kernels.quantized_matmul import QuantizedWeight, quantize
from tests.kernels.chips import (
    TPUS,
    as_users_compile,
    compiled_for,
    device_of,
    needs_cuda_compiler,
    needs_libtpu,
)
from tests.kernels.test_quantized_matmul import by_hand

CAREFUL = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan")
KINDS = ("int8", "int4-g128", "int4-g32")
# Experts, width, inner width: of Qwen3-30B-A3B and of Mixtral 8x7B.
MODELS = {"Qwen3-30B-A3B": (128, 2048, 768), "Mixtral 8x7B": (8, 4096, 14336)}
# Empty groups, a group of one row, one that fills tiles, rows left over.
SIZES = [20, 0, 1, 32, 0, 7]
ROWS = 70


@st.composite
def cuts(draw) -> tuple[list[int], int, int]:
    """(group sizes, rows, rows of a tile): few shapes, to compile little."""
    sizes = draw(st.lists(st.one_of(st.just(0), st.integers(0, 30)), min_size=6, max_size=6))
    return sizes, *draw(st.sampled_from([(1, 8), (33, 8), (64, 16)]))


def owners(sizes: list[int], rows: int) -> np.ndarray:
    """The group of each row, -1 for none."""
    owner = np.repeat(np.arange(len(sizes)), sizes)[:rows]
    return np.append(owner, np.full(rows - len(owner), -1))


@functools.partial(jax.jit, static_argnums=(1, 2))
def all_visits(sizes_e: jax.Array, rows: int, tile: int):
    return tuple(f(sizes_e, rows, tile) for f in (visits.of_rows, visits.of_groups, visits.own_tiles))


@settings(max_examples=60, deadline=None)
@given(cut=cuts())
def test_every_row_is_visited_once_with_its_group(cut):
    sizes, rows, tile = cut
    of_rows, of_groups, own = jax.tree.map(np.asarray, all_visits(jnp.asarray(sizes), rows, tile))
    for found in (of_rows, of_groups):
        first, end = (found.tile_v * tile + at for at in (found.first_v, found.end_v))
        many = int(found.count)
        assert many <= len(first)
        seen = np.full(rows, -1)
        for v in range(many):
            assert (seen[first[v] : end[v]] == -1).all()
            seen[first[v] : end[v]] = found.group_v[v] if found.real_v[v] else -1
        np.testing.assert_array_equal(seen, owners(sizes, rows))
    assert sum(of_rows.end_v - of_rows.first_v) == rows
    groups = of_groups.group_v[: int(of_groups.count)]
    assert sorted(set(groups)) == list(range(len(sizes)))
    changes = np.append(True, groups[1:] != groups[:-1])
    np.testing.assert_array_equal(of_groups.opens_v[: len(groups)], changes)
    np.testing.assert_array_equal(of_groups.closes_v[: len(groups)], np.append(changes[1:], True))
    seen = np.full(rows, -1)
    for group, start, first, end, real in zip(*own, strict=True):
        assert start % 8 == 0
        seen[start + first : start + end] = group if real else -1
    np.testing.assert_array_equal(seen, owners(sizes, rows))
    assert (own.end_v - own.first_v).sum() == rows


def drawn(*shape: int, seed: int = 0, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def by_loop(x, w, sizes: list[int], transposed: bool = False) -> np.ndarray:
    """Each row with its group's matrix, float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    w = w.swapaxes(1, 2) if transposed else w
    y = np.zeros((len(x), w.shape[2]))
    for row, group in enumerate(owners(sizes, len(x))):
        if group >= 0:
            y[row] = x[row] @ w[group]
    return y


def sums_by_loop(x, dy, sizes: list[int]) -> np.ndarray:
    """A matrix a group, float64."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    owner = owners(sizes, len(x))
    return np.stack([x[owner == group].T @ dy[owner == group] for group in range(len(sizes))])


# Sums in float32 of products that are exact there, rounded once to bfloat16: half a unit of 8 bits. In float32 the
# roundings of sums of hundreds of terms.
def assert_close(found, meant, dtype=jnp.bfloat16, more: float = 0.0):
    found = np.asarray(found, np.float64)
    rounding = 2**-8 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(
        found, meant, rtol=rounding, atol=(1e-6 + more) * max(np.abs(meant).max(), 1e-9)
    )


def no_races(capfd) -> None:
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def with_nan_outside(a: jax.Array, sizes: list[int]) -> jax.Array:
    """Rows of no group hold NaN, which must not be read."""
    return a.at[sum(sizes) :].set(jnp.nan)


@pytest.mark.parametrize(
    ("transposed", "dtype", "tiles"),
    [
        (False, jnp.bfloat16, mosaic_tpu.Tiles(32, 16, 128, 256)),
        pytest.param(True, jnp.float32, mosaic_tpu.Tiles(16, 8, 256, 128), marks=pytest.mark.slow),
    ],
)
def test_tpu_rows_get_their_groups_matrix_without_races(transposed, dtype, tiles, capfd):
    x, w = drawn(ROWS, 256, dtype=dtype), drawn(6, 256, 256, seed=1, dtype=dtype)
    x = with_nan_outside(x, SIZES)
    y = mosaic_tpu.rows(x, w, jnp.asarray(SIZES), transposed, tiles=tiles, interpret=CAREFUL)
    assert_close(y, by_loop(x, w, SIZES, transposed), dtype)
    no_races(capfd)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_tpu_matrices_are_sums_over_their_groups_rows_without_races(dtype, capfd):
    x, dy = drawn(ROWS, 256, dtype=dtype), drawn(ROWS, 128, seed=1, dtype=dtype)
    x, dy = with_nan_outside(x, SIZES), with_nan_outside(dy, SIZES)
    tiles = mosaic_tpu.Tiles(32, 16, 128, 128)
    dw = mosaic_tpu.matrices(x, dy, jnp.asarray(SIZES), tiles=tiles, interpret=CAREFUL)
    assert_close(dw, sums_by_loop(x, dy, SIZES), dtype)
    no_races(capfd)


@functools.cache
def packed(kind: str, groups: int, outputs: int, inputs: int) -> QuantizedWeight:
    w = drawn(groups, outputs, inputs, seed=1, dtype=jnp.float32)
    return jax.jit(jax.vmap(functools.partial(quantize, kind=kind, storage="int4")))(w)


def unpacked(w: QuantizedWeight) -> np.ndarray:
    """[e, n, k] by hand, float64."""
    return np.stack([by_hand(jax.tree.map(lambda a, e=e: a[e], w)) for e in range(w.values.shape[0])])


# Groups of 32 are multiplied with weights rounded to bfloat16 on a TPU.
@pytest.mark.parametrize(
    "kind", ["int4-g128", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "int4-g32"))]
)
def test_tpu_rows_times_packed_weights_without_races(kind, capfd):
    x, w = with_nan_outside(drawn(ROWS, 256), SIZES), packed(kind, 6, 256, 256)
    tiles = mosaic_tpu.Tiles(32, 16, 128, 256 if kind == "int4-g128" else 128)
    y = mosaic_tpu.rows(x, w, jnp.asarray(SIZES), tiles=tiles, interpret=CAREFUL)
    assert_close(y, by_loop(x, unpacked(w), SIZES, True), more=2**-8 if kind == "int4-g32" else 0)
    no_races(capfd)


def alone(w, layer: int):
    """A stack of three layers of which the others hold NaN, or what is wrong where there is none."""
    blank = jnp.nan if jnp.issubdtype(w.dtype, jnp.floating) else 1
    return jnp.concatenate([w if at == layer else jnp.full_like(w, blank) for at in range(3)])


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("int4-g32", 2),
        *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in ("bfloat16", "int8", "int4-g128")),
    ],
)
def test_tpu_rows_get_the_matrices_and_scales_of_their_layer_in_a_stack_without_races(kind, layer, capfd):
    x = with_nan_outside(drawn(ROWS, 256), SIZES)
    w = drawn(6, 256, 256, seed=1) if kind == "bfloat16" else packed(kind, 6, 256, 256)
    meant = by_loop(x, w, SIZES) if kind == "bfloat16" else by_loop(x, unpacked(w), SIZES, True)
    tiles = mosaic_tpu.Tiles(32, 16, 128, 256 if kind == "int4-g128" else 128)
    stack = jax.tree.map(lambda a: alone(a, layer), w)
    first = jnp.int32(6 * layer)
    y = mosaic_tpu.rows(x, stack, jnp.asarray(SIZES), first=first, tiles=tiles, interpret=CAREFUL)
    assert_close(y, meant, more=2**-8 if kind == "int4-g32" else 0)
    no_races(capfd)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_the_gradient_of_rows_of_a_stack_is_that_of_their_layer(kind):
    x, dy, sizes = drawn(ROWS, 128), drawn(ROWS, 256, seed=2), jnp.asarray(SIZES)
    w = drawn(6, 128, 256, seed=1) if kind == "bfloat16" else packed(kind, 6, 256, 128)
    meant = by_loop(dy, w, SIZES, True) if kind == "bfloat16" else by_loop(dy, unpacked(w), SIZES)
    stack = jax.tree.map(lambda a: alone(a, 2), w)

    def back(x, stack, first):
        return jax.vjp(lambda x: grouped_matmul(x, stack, sizes, first=first), x)[1](dy)[0]

    with compiling_for(Chip("tpu", "v6e")), pltpu.force_tpu_interpret_mode(CAREFUL):
        # Weights are made bfloat16 for this.
        assert_close(back(x, stack, jnp.int32(12)), meant, more=0 if kind == "bfloat16" else 2**-8)


@pytest.mark.parametrize(
    ("kind", "inputs", "tile", "lie"),
    [
        ("int4-g128", 7168, 1024, True),
        ("int4-g128", 2816, 1408, False),
        ("int4-g128", 768, 768, False),
        ("int4-g32", 768, 768, True),
        ("int8", 2816, 1408, False),
    ],
)
def test_scales_are_read_where_they_lie_in_whole_runs_of_eight_groups(kind, inputs, tile, lie):
    found = []

    def ask(x, w):
        tiles = mosaic_tpu.tiles_of(x, w, 4, True)
        found.append((tiles.inputs, mosaic_tpu.scale_lies(w, tiles.inputs)))

    with compiling_for(Chip("tpu", "v6e")):
        jax.eval_shape(ask, shape(64, inputs), packed_shape(kind, 12, 2048, inputs))
    assert found == [(tile, lie)]


def interpreted(function, *arguments):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return jax.block_until_ready(function(*arguments))


@pytest.mark.parametrize(
    ("transposed", "tiles"),
    [
        (False, mosaic_gpu.Tiles(64, 128)),
        pytest.param(True, mosaic_gpu.Tiles(128, 128), marks=pytest.mark.slow),
    ],
)
def test_hopper_rows_get_their_groups_matrix_without_races(transposed, tiles, capfd):
    # More steps than stages, so that stages are used again.
    x, w = drawn(ROWS, 384), drawn(6, *((128, 384) if transposed else (384, 128)), seed=1)
    rows = functools.partial(mosaic_gpu.rows, transposed=transposed, tiles=tiles)
    assert_close(interpreted(rows, x, w, jnp.asarray(SIZES)), by_loop(x, w, SIZES, transposed))
    no_races(capfd)


def test_hopper_matrices_are_sums_over_their_groups_rows_without_races(capfd):
    sizes = [0, 1, 65]
    x, dy = drawn(ROWS, 128), drawn(ROWS, 128, seed=1)
    assert_close(interpreted(mosaic_gpu.matrices, x, dy, jnp.asarray(sizes)), sums_by_loop(x, dy, sizes))
    no_races(capfd)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_hopper_rows_times_packed_weights_without_races(kind, capfd):
    x, w, sizes = drawn(24, 256), packed(kind, 3, 128, 256), [9, 0, 10]
    rows = functools.partial(mosaic_gpu_quantized.rows, through_memory=True)
    assert_close(interpreted(rows, x, w, jnp.asarray(sizes)), by_loop(x, unpacked(w), sizes, True))
    stack, rows = jax.tree.map(lambda a: alone(a, 2), w), functools.partial(rows, first=jnp.int32(6))
    assert_close(interpreted(rows, x, stack, jnp.asarray(sizes)), by_loop(x, unpacked(w), sizes, True))
    no_races(capfd)


def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def training(chip: str, model: str, rows: int, down: bool = False):
    """Forward and both gradients of the public function, whose choice has to be the chip's kernels."""
    e, d, f = MODELS[model]
    d, f = (f, d) if down else (d, f)

    def run(x, w, sizes, dy):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return y, *pull(dy)

    return compiled_for(chip, run, shape(rows, d), shape(e, d, f), shape(e, dtype=jnp.int32), shape(rows, f))


def packed_shape(kind: str, e: int, n: int, k: int) -> QuantizedWeight:
    w = jax.eval_shape(lambda w: quantize(w, kind, storage="int4"), shape(n, k, dtype=jnp.float32))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((e, *a.shape), a.dtype), w)


def decoding(chip: str, model: str, rows: int, kind: str, down: bool = False):
    """Rows times packed weights."""
    e, d, f = MODELS[model]
    d, f = (f, d) if down else (d, f)
    arguments = shape(rows, d), packed_shape(kind, e, f, d), shape(e, dtype=jnp.int32)
    return compiled_for(chip, lambda x, w, sizes: grouped_matmul(x, w, sizes), *arguments)


def kernels_of(compiled) -> list[str]:
    return re.findall(r'custom_call_target="(tpu_custom_call|mosaic_gpu\w*)"', str(compiled.as_text()))


@needs_libtpu
@pytest.mark.parametrize(
    "chip", ["v5e", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5p", "v6e", "v7x"))]
)
def test_tpu_training_programs_hold_three_kernels_and_no_copy_of_the_weights(chip):
    compiled = training(chip, "Qwen3-30B-A3B", 65_536)
    assert len(kernels_of(compiled)) == 3
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 128 * 2048 * 768


@needs_libtpu
def test_tpu_programs_of_packed_weights_hold_no_whole_weight():
    compiled = decoding("v5e", "Qwen3-30B-A3B", 64, "int4-g128")
    assert kernels_of(compiled)
    assert compiled.memory_analysis().temp_size_in_bytes < 128 * 2048 * 768 // 2


def layers_of_experts(chip: str, kind: str, rows: int):
    """A loop over three layers with 16 experts each, which lie in one stack."""
    layers, e, d, f = 3, 16, 2048, 768

    def stack(inputs: int, outputs: int):
        one = shape(e, inputs, outputs) if kind == "bfloat16" else packed_shape(kind, e, outputs, inputs)
        return jax.tree.map(lambda a: shape(layers, *a.shape, dtype=a.dtype), one)

    def run(x, up, down, sizes):
        def layer(x, number):
            def times(x, w):
                flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), w)
                return grouped_matmul(x, flat, sizes, first=number * e)

            return x + times(times(x, up), down), None

        return jax.lax.scan(layer, x, jnp.arange(layers))[0]

    return compiled_for(chip, run, shape(rows, d), stack(d, f), stack(f, d), shape(e, dtype=jnp.int32))


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "kind"),
    [
        pytest.param(chip, kind, marks=[] if (chip, kind) == ("v6e", "int4-g32") else pytest.mark.slow)
        for chip in TPUS
        for kind in ("bfloat16", *KINDS)
    ],
)
def test_tpu_programs_copy_no_experts_out_of_the_stack_of_all_layers(chip, kind):
    compiled = layers_of_experts(chip, kind, 64)
    assert kernels_of(compiled)
    assert "[48," in str(compiled.as_text())
    # Neither cut out nor fetched as a whole, and no scales that lie in whole runs of eight groups.
    types = {"int8": "s8", "int4-g128": "s4"}.get(kind, "s4|bf16")
    moved = rf"= (?:{types})\[(?:1,|3,)?(?:16|48),\d+,[\d,]+\]\S* (?!bitcast|parameter|get-tuple)[\w-]+\("
    assert not re.findall(moved, str(compiled.as_text()))
    assert compiled.memory_analysis().temp_size_in_bytes < 2**22  # a third of a matrix in 4 bits


@needs_cuda_compiler
@pytest.mark.slow
def test_hopper_programs_copy_no_packed_experts_out_of_the_stack_of_all_layers():
    compiled = layers_of_experts("h200", "int4-g32", 64)
    assert kernels_of(compiled)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**22  # a third of a matrix in 4 bits


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", TPUS)
def test_a_whole_training_step_of_a_mixture_on_four_chips_has_the_kernels_inside(chip):
    from maxstack import sharding
    from maxstack.models import AttentionConfig, BlockConfig, MoEConfig, StackConfig, TransformerConfig
    from maxstack.optim import OptimConfig
    from maxstack.train import state as states
    from maxstack.train.losses import pretrain
    from maxstack.train.step import SafetyConfig, abstract_batch, train_step
    from maxstack.train.step import compiled as compiled_step

    mesh_config = sharding.MeshConfig(fsdp=2, tensor=2)
    first = device_of(chip)
    mesh = sharding.build_mesh(mesh_config, list(first.client.devices())[:4])
    block = BlockConfig(
        attention=AttentionConfig(heads=4, kv_heads=2, head_size=64),
        feed_forward=MoEConfig(size=256, experts=4, experts_per_token=2),
    )
    stacks = (StackConfig(pattern=(block,), repeats=2),)
    model = TransformerConfig(vocab_size=512, width=256, stacks=stacks, max_length=512)
    optim = OptimConfig()
    plan = states.layout(model, optim, mesh, zero=mesh_config.zero, steps=10)
    step = train_step(plan, pretrain, optim, SafetyConfig(), 0.0, 10)
    with compiling_for(chip_of(first)), as_users_compile():
        program = compiled_step(plan, step, abstract_batch(plan, 1, 4, 512), plan.abstract(model))
    text = program.as_text() or ""
    assert re.search(r"grouped_matmul\)*/pallas_call", text)
    assert re.search(r"grouped_matmul_matrices\)*/pallas_call", text)
    assert "ragged" not in text


def spilled(told: str) -> list[int]:
    found = [int(n) for n in re.findall(r"(\d+) bytes spill", told)]
    assert found
    return found


@needs_cuda_compiler
def test_hopper_programs_hold_the_kernels_and_spill_nothing(monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    assert len(kernels_of(training("h200", "Qwen3-30B-A3B", 65_536))) == 3
    assert kernels_of(decoding("h200", "Qwen3-30B-A3B", 64, "int4-g128"))
    told = "".join(capfd.readouterr())
    assert not any(spilled(told)), told
    assert "serialized" not in told


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("model", MODELS)
def test_every_tpu_compiles_every_shape(chip, model):
    for down in (False, True):
        assert len(kernels_of(training(chip, model, 65_536, down))) == 3
        for kind in KINDS:
            for rows in (64, 4096):
                assert kernels_of(decoding(chip, model, rows, kind, down))


@pytest.mark.slow
@needs_cuda_compiler
@pytest.mark.parametrize("model", MODELS)
def test_hopper_compiles_every_shape(model, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    for down in (False, True):
        for rows in (64, 65_536):
            assert len(kernels_of(training("h200", model, rows, down))) == 3
            for kind in KINDS:
                assert kernels_of(decoding("h200", model, rows, kind, down))
    assert not any(spilled("".join(capfd.readouterr())))
