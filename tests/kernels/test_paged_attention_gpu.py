"""The Hopper kernel of attention over pages: numbers and races in the interpreter, machine code with its registers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from maxstack.kernels import Unsupported
from maxstack.kernels.dispatch import Chip, compiling_for
from maxstack.kernels.paged_attention import init_cache, mosaic_gpu, paged_attention, plan
from tests.kernels.chips import HOPPER, compiled_for, needs_cuda_compiler
from tests.kernels.paged import brute_force, moved, paged, queries

# Queries, weights and values meet in bfloat16 (8 bits): a hundredth of outputs of size 1, on the safe side.
CLOSE = {"rtol": 0.0, "atol": 1.5e-2}


def interpreted(q, cache, table, lengths, sinks=None, **options):
    """(out, lse) of the kernel in the interpreter; no race."""
    options = plan.Options(**{"window": None, "softcap": None, "scale": q.shape[-1] ** -0.5} | options)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        parts = mosaic_gpu.paged_attention(
            q, cache, plan.usable(table, cache[0].shape[0]), jnp.asarray(lengths), options, q.shape[-1],
            through_shared=True,
        )  # fmt: skip
        out, lse = plan.merged(*parts, sinks)
        jax.block_until_ready(out)
    assert not gpu_callbacks.get_races().races_found
    return out, lse


CASES = {
    # name: (pages, queries a sequence, lengths, options)
    "bfloat16 window, cap": ("bfloat16", 1, (500, 0, 129), {"window": 400, "softcap": 2.0}),
    "int8 in 2 parts": ("int8", 1, (1000, 130), {"splits": 2}),
    "int4 chunk of 3": ("int4", 3, (2, 640), {"window": 150}),
    "bfloat16 chunk of 2 in 3 parts": ("bfloat16", 2, (640, 1), {"splits": 3}),
}
QUICK = ("bfloat16 window, cap", "int8 in 2 parts")


def quick_and_slow(quick, cases):
    """The cases, all but the quick ones marked slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", quick_and_slow(QUICK, CASES))
@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_interpreted_kernel_equals_brute_force_without_races(case, size):
    kind, t, lengths, options = CASES[case]
    made = paged(lengths, heads=1, size=size, page=128, entries=8, kind=kind)
    q = queries(len(lengths), t, 2, size, "bfloat16")
    sinks = np.array([0.5, -1])
    found = interpreted(q, made.cache, made.table, made.lengths, jnp.asarray(sinks, jnp.float32), **options)
    options = {name: value for name, value in options.items() if name != "splits"}
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, lengths, sinks=sinks, **options)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@pytest.mark.slow
def test_where_pages_lie_changes_no_bit_and_bad_entries_are_hidden():
    made = paged((300, 129), heads=1, size=64, page=128, entries=3, kind="bfloat16")
    q, other = queries(2, 1, 2, 64, "bfloat16"), moved(made)
    one = interpreted(q, made.cache, made.table, made.lengths)
    two = interpreted(q, other.cache, other.table, other.lengths)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    table = made.table.copy()
    table[0, 1], table[1, 0] = -7, 10**6
    hidden = {(0, s) for s in range(128, 256)} | {(1, s) for s in range(128)}
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, made.lengths, hidden=hidden)
    for found, exact in zip(interpreted(q, made.cache, table, made.lengths), wanted, strict=True):
        np.testing.assert_allclose(found, exact, **CLOSE)


# (query heads, kv heads, head size) of models with 1, 8 and 70 billion weights; 64 sequences of up to 8,192 tokens.
MODELS = {"1B": (32, 8, 64), "8B": (32, 8, 128), "70B": (64, 8, 128)}
EVERY = list(itertools.product(MODELS, ("bfloat16", "int8", "int4"), (1, 4, 256)))


@needs_cuda_compiler
@pytest.mark.parametrize(
    ("model", "kind", "t"),
    [("8B", "int8", 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in EVERY)],
)
def test_serving_shapes_compile_without_spills_and_copies(model, kind, t, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    n, k, h = MODELS[model]
    with compiling_for(HOPPER):
        cache = jax.eval_shape(lambda: init_cache(4096, k, h, dtype=kind))
    b = 64 if t == 1 else 4
    program = compiled_for(
        "h200",
        lambda *args: paged_attention(*args, window=4096, softcap=30.0),
        jax.ShapeDtypeStruct((b, n, h) if t == 1 else (b, t, n, h), jnp.bfloat16),
        cache,
        jax.ShapeDtypeStruct((b, 64), jnp.int32),
        jax.ShapeDtypeStruct((b,), jnp.int32),
    )
    said = capfd.readouterr()
    assert "0 bytes spill stores, 0 bytes spill loads" in said.out + said.err
    assert "mosaic_gpu" in (program.as_text() or "")
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 5  # no copy of a pool
    registers = [line for line in (said.out + said.err).splitlines() if "registers" in line]
    print(model, kind, t, registers, memory.temp_size_in_bytes)


def test_what_it_cannot_serve_is_said():
    made, q = paged((3,), size=64, page=128, entries=1, kind="float32"), queries(1, 1, 2, 64, "bfloat16")
    for name, chip in (("pages are float32", HOPPER), ("sm80 is not Hopper", Chip("gpu", "sm80"))):
        cache = (
            made.cache if chip == HOPPER else paged((3,), size=64, page=128, entries=1, kind="bfloat16").cache
        )
        with compiling_for(chip), pytest.raises(Unsupported, match=name):
            paged_attention(q, cache, made.table, made.lengths, implementation="mosaic_gpu")
