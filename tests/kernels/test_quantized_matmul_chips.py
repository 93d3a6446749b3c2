"""The kernels for TPU and Hopper: in their interpreters, which look for races, and through the real compilers."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from maxstack.kernels.dispatch import Chip, compiling_for
from maxstack.kernels.quantized_matmul import (
    QuantizedWeight,
    backward,
    mosaic_gpu,
    mosaic_gpu_int8,
    mosaic_tpu,
    quantize,
    quantized_matmul,
    stored,
    xla,
)
from tests.kernels.chips import TPUS, compiled_for, needs_cuda_compiler, needs_libtpu
from tests.kernels.test_quantized_matmul import by_hand, drawn, example

CAREFUL = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan")
FORMS = [("int8", False), ("int4-g128", False), ("int4-g32", True)]
# Outputs and inputs of the linear layers of an 8B and a 70B model: q, k, o, gate, down; narrow and wide.
WEIGHTS = [
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (8192, 8192),
    (28672, 8192),
    (8192, 28672),
]
TOKENS = (1, 16, 64, 512, 4096)


def weight(kind: str, n: int, k: int) -> QuantizedWeight:
    """Shapes."""
    if kind == "int8":
        values, scale, group = jax.ShapeDtypeStruct((n, k), jnp.int8), ((1, n), jnp.float32), k
    else:
        group = int(kind.partition("-g")[2])
        values, scale = jax.ShapeDtypeStruct((n, k), jnp.int4), ((k // group, n), jnp.bfloat16)
    return QuantizedWeight(
        values=values, scale=jax.ShapeDtypeStruct(*scale), zero=None, inputs=k, group=group
    )


def case(kind: str, zeros: bool, tokens: int, n: int, k: int):
    w = stored(example(n, k, kind, zeros)[1], "int4")
    x = jnp.asarray(drawn(tokens, k, seed=1), jnp.bfloat16)
    return x, w, np.asarray(x, np.float64) @ by_hand(w).T


def largest_error(y, meant) -> float:
    return np.abs(np.asarray(y, np.float64) - meant).max() / np.abs(meant).max()


# Groups of 32 are multiplied with weights rounded to bfloat16 on a TPU; all else is summed in float32.
def tolerance(kind: str) -> float:
    return 2**-8 if kind == "int4-g32" else 2e-6


def test_the_kernel_finds_its_layer_in_a_stack():
    """In the interpreter; and the public function, where no kernel takes stacks, cuts it out."""
    layers = [example(128, 256, "int8", False)[1], quantize(jnp.asarray(drawn(128, 256, seed=7)), "int8")]
    values = jnp.stack([w.values for w in layers])
    x = jnp.asarray(drawn(16, 256, seed=3), jnp.bfloat16)
    for at, w in enumerate(layers):
        stack = dataclasses.replace(w, values=values, layer=jnp.int32(at))
        wanted = mosaic_tpu.quantized_matmul(x, w, tiles=mosaic_tpu.Tiles(16, 128, 128), interpret=True)
        found = mosaic_tpu.quantized_matmul(x, stack, tiles=mosaic_tpu.Tiles(16, 128, 128), interpret=True)
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(quantized_matmul(x, stack), quantized_matmul(x, w))
        dy = jnp.asarray(drawn(16, 128, seed=4))
        (dx, _), (meant, _) = (
            backward("mosaic_tpu", "float", jnp.dtype(jnp.float32), (), (x, each), dy) for each in (stack, w)
        )
        np.testing.assert_array_equal(dx, meant)


@pytest.mark.parametrize(("kind", "zeros"), FORMS)
def test_tpu_tiles_add_up_without_races(kind, zeros, capfd):
    x, w, meant = case(kind, zeros, 5, 256, 512)
    y = mosaic_tpu.quantized_matmul(x, w, tiles=mosaic_tpu.Tiles(16, 128, 256), interpret=CAREFUL)
    assert largest_error(y, meant) < tolerance(kind)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("kind", "zeros"),
    [FORMS[1], *(pytest.param(kind, False, marks=pytest.mark.slow) for kind in ("int8", "int4-g32"))],
)
def test_tpu_tiles_of_many_tokens_add_up_without_races(kind, zeros, capfd):
    """Weights are widened once for several parts of a tile; x lies whole, or in parts where it does not fit."""
    x, w, meant = case(kind, zeros, 700, 256, 256)
    y = mosaic_tpu.quantized_matmul(
        x, w, tiles=mosaic_tpu.Tiles(384, 256, 128), interpret=CAREFUL, dtype=jnp.bfloat16
    )
    assert y.dtype == jnp.bfloat16
    assert largest_error(y, meant) < tolerance(kind) + 2**-8
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("chip", "kind", "tokens", "n", "k", "tiles"),
    [
        ("v5e", "int8", 4096, 14336, 4096, (1024, 1024, 2048)),  # all inputs of 1,024 tokens fit
        ("v7x", "int4-g128", 4096, 28672, 8192, (512, 1024, 2048)),  # of 512
        ("v5e", "int8", 1100, 4096, 4096, (640, 1024, 2048)),  # as even as multiples of 128 can be
        ("v5e", "int4-g128", 16, 14336, 4096, (16, 512, 2048)),
    ],
)
def test_tpu_tiles_read_little_again_and_fit(chip, kind, tokens, n, k, tiles):
    w = weight(kind, n, k)
    with compiling_for(Chip("tpu", chip)):
        found = mosaic_tpu.tiles_for(tokens, w)
        assert found == tiles
        assert mosaic_tpu.vmem_of(found, w) < mosaic_tpu.vmem_bytes()


def test_tpu_products_of_int8_are_exact():
    x, w, _ = case("int8", False, 5, 256, 256)
    q, scale = xla.rounded_rows(x)
    y = mosaic_tpu.int8_product(q, scale, w, tiles=mosaic_tpu.Tiles(32, 128, 128), interpret=CAREFUL)
    meant = (np.asarray(q, np.float64) @ np.asarray(w.values, np.float64).T) * np.asarray(scale)[:, None]
    np.testing.assert_allclose(np.asarray(y), meant * np.asarray(w.scale), rtol=1e-6)


def test_the_kernel_for_hopper_finds_its_layer_in_a_stack():
    layers = [example(128, 256, "int8", False)[1], quantize(jnp.asarray(drawn(128, 256, seed=7)), "int8")]
    values = jnp.stack([w.values for w in layers])
    x = jnp.asarray(drawn(8, 256, seed=3), jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        for at, w in enumerate(layers):
            stack = dataclasses.replace(w, values=values, layer=jnp.int32(at))
            found, wanted = (
                mosaic_gpu.quantized_matmul(x, each, splits=1, through_memory=True) for each in (stack, w)
            )
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("kind", "zeros"), FORMS)
def test_hopper_blocks_add_up_without_races(kind, zeros, capfd):
    # More steps than stages, so that stages are used again.
    x, w, meant = case(kind, zeros, 5, 128, 640)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        y = jax.block_until_ready(mosaic_gpu.quantized_matmul(x, w, splits=1, through_memory=True))
    assert largest_error(y, meant) < 2e-6
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("tokens", "n", "k", "splits"),
    [
        (5, 128, 640, 1),  # the weight on the left; more steps than stages
        pytest.param(70, 128, 256, 1, marks=pytest.mark.slow),  # x on the left
        pytest.param(5, 128, 512, 2, marks=pytest.mark.slow),
    ],
)
def test_hopper_products_of_int8_are_exact_without_races(tokens, n, k, splits, monkeypatch, capfd):
    x, w, _ = case("int8", False, tokens, n, k)
    q, scale = xla.rounded_rows(x)
    monkeypatch.setattr(mosaic_gpu_int8, "splits_for", lambda steps, blocks: splits)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        y = jax.block_until_ready(mosaic_gpu_int8.int8_product(q, scale, w, jnp.dtype(jnp.float32)))
    meant = (np.asarray(q, np.float64) @ np.asarray(w.values, np.float64).T) * np.asarray(scale)[:, None]
    np.testing.assert_allclose(np.asarray(y), meant * np.asarray(w.scale), rtol=1e-6)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.slow
def test_hopper_parts_of_the_inputs_and_tiles_of_tokens_add_up(capfd):
    x, w, meant = case("int4-g32", True, 70, 256, 256)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        y = jax.block_until_ready(mosaic_gpu.quantized_matmul(x, w, splits=2, through_memory=True))
    assert largest_error(y, meant) < 2e-6
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_parts_of_the_inputs_fill_the_chip_and_divide_the_steps():
    for steps in (1, 5, 32, 112):
        for blocks in (1, 8, 32, 112, 500):
            parts = mosaic_gpu.splits_for(steps, blocks)
            assert steps % parts == 0
            assert parts * blocks >= min(mosaic_gpu.BLOCKS, steps * blocks)


def program(chip: str, kind: str, tokens: int, n: int, k: int):
    """The public function, whose choice has to be the chip's kernel."""
    x, w = jax.ShapeDtypeStruct((tokens, k), jnp.bfloat16), weight(kind, n, k)
    return compiled_for(chip, lambda x, w: quantized_matmul(x, w), x, w)


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "kind"), [("v5e", "int4-g128"), ("v6e", "int4-g32"), ("v5p", "int8"), ("v7x", "int4-g128")]
)
def test_tpu_programs_hold_the_kernel_and_no_whole_weight(chip, kind):
    compiled = program(chip, kind, 16, 4096, 4096)
    assert "tpu_custom_call" in str(compiled.as_text())
    assert (
        compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096 // 2
    )  # nothing as large as the weight itself


def int8_program(tokens: int, n: int, k: int):
    """x and the weight in int8, on Hopper."""
    x, w = jax.ShapeDtypeStruct((tokens, k), jnp.bfloat16), weight("int8", n, k)
    return compiled_for("h200", lambda x, w: quantized_matmul(x, w, activations="int8"), x, w)


@needs_cuda_compiler
def test_hopper_products_of_int8_spill_nothing(monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    for shape in ((16, 1024, 1024), (4096, 4096, 1024)):
        assert "mosaic_gpu" in str(int8_program(*shape).as_text())
    told = "".join(capfd.readouterr())
    spilled = re.findall(r"(\d+) bytes spill", told)
    assert spilled
    assert not any(map(int, spilled)), told


@pytest.mark.slow
@needs_cuda_compiler
def test_hopper_compiles_every_shape_of_int8(monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    for tokens in TOKENS:
        for n, k in WEIGHTS:
            assert "mosaic_gpu" in str(int8_program(tokens, n, k).as_text())
    told = "".join(capfd.readouterr())
    assert not any(map(int, re.findall(r"(\d+) bytes spill", told)))


@needs_cuda_compiler
@pytest.mark.parametrize("kind", ["int4-g128", "int4-g32"])
def test_hopper_programs_hold_the_kernel_spill_nothing_and_leave_room_for_a_second_block(
    kind, monkeypatch, capfd
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    compiled = program("h200", kind, 16, 4096, 4096)
    assert "mosaic_gpu" in str(compiled.as_text())
    told = "".join(capfd.readouterr())
    spilled = re.findall(r"(\d+) bytes spill", told)
    assert spilled
    assert not any(map(int, spilled)), told
    # So that two blocks of three warpgroups share the 65,536 registers of a multiprocessor.
    assert int(re.findall(r"Used (\d+) registers", told)[0]) <= 80


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("kind", ["int8", "int4-g32", "int4-g128"])
def test_every_tpu_compiles_every_shape(chip, kind):
    for tokens in TOKENS:
        for n, k in WEIGHTS:
            assert "tpu_custom_call" in str(program(chip, kind, tokens, n, k).as_text())


@pytest.mark.slow
@needs_cuda_compiler
@pytest.mark.parametrize("kind", ["int8", "int4-g32", "int4-g128"])
def test_hopper_compiles_every_shape(kind, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    for tokens in TOKENS:
        for n, k in WEIGHTS:
            compiled = program("h200", kind, tokens, n, k)
            if tokens <= mosaic_gpu.WORTH_TOKENS:
                assert "mosaic_gpu" in str(compiled.as_text())
    told = "".join(capfd.readouterr())
    assert not any(map(int, re.findall(r"(\d+) bytes spill", told)))
