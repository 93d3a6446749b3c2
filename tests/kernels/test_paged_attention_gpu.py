"""The Hopper kernel of attention over pages: numbers and races in the interpreter, machine code with its registers."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.kernel_registers import said
from maxstack.kernels import Unsupported
from maxstack.kernels.dispatch import Chip, compiling_for
from maxstack.kernels.paged_attention import (
    init_cache,
    init_latent_cache,
    latent_paged_attention,
    mosaic_gpu,
    paged_attention,
    plan,
)
from tests.kernels.chips import HOPPER, compiled_for, needs_cuda_compiler
from tests.kernels.paged import brute_force, latent_cache, moved, paged, queries, stale

# Queries, weights and values meet in bfloat16 (8 bits): a hundredth of outputs of size 1, on the safe side.
CLOSE = {"rtol": 0.0, "atol": 1.5e-2}


def interpreted(q, cache, table, lengths, sinks=None, value_size=None, **options):
    """(out, lse) of the kernel in the interpreter; no race."""
    size = q.shape[-1]
    options = plan.Options(**{"window": None, "softcap": None, "scale": size**-0.5} | options)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        parts = mosaic_gpu.paged_attention(
            q, cache, plan.usable(table, cache[0].shape[0]), jnp.asarray(lengths), options, value_size or size,
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
QUICK = ("bfloat16 window, cap", "int4 chunk of 3")


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


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in [(96, "bfloat16"), (96, "int8"), (256, "bfloat16"), (256, "int8"), (256, "int4")]
    ],
)
def test_heads_of_96_and_256(size, kind):
    made = paged((200, 3), heads=1, size=size, page=128, entries=2, kind=kind)
    q = queries(2, 2, 2, size, "bfloat16")
    found = interpreted(q, made.cache, made.table, made.lengths, window=150)
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, made.lengths, window=150)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_padding_of_a_chunk_reads_stale_pages_and_spoils_no_token(value):
    real, padding = np.array([126, 60], np.int32), 3
    made = stale(paged(real, heads=1, size=64, page=128, entries=2, kind="bfloat16"), value)
    q = queries(2, 1 + padding, 2, 64, "bfloat16")
    found = interpreted(q, made.cache, made.table, real + padding)
    wanted = brute_force(np.asarray(q, np.float64)[:, :1], made.k, made.v, real)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one[:, :1], other, **CLOSE)


LATENTS = {
    # name: (components, of them values, heads, queries a sequence, lengths, options)
    "window, cap, sinks, 2 parts": (
        192,
        128,
        16,
        1,
        (300, 0, 65),
        {"window": 250, "softcap": 2.0, "splits": 2},
    ),
    "chunk of 5 in 2 tiles": (192, 128, 16, 5, (140, 3), {}),
    "DeepSeek, 70 heads": (576, 512, 70, 1, (130,), {}),
}


@pytest.mark.parametrize("case", quick_and_slow(("window, cap, sinks, 2 parts",), LATENTS))
def test_interpreted_latents_equal_brute_force_without_races(case):
    size, value_size, n, t, lengths, options = LATENTS[case]
    made = paged(lengths, heads=1, size=size, page=128, entries=3, kind="bfloat16")
    q = queries(len(lengths), t, n, size, "bfloat16")
    sinks = np.linspace(-1, 1, n)
    found = interpreted(
        q, latent_cache(made, "bfloat16"), made.table, made.lengths, jnp.asarray(sinks, jnp.float32),
        value_size=value_size, scale=0.1, **options,
    )  # fmt: skip
    options = {name: value for name, value in options.items() if name != "splits"}
    wanted = brute_force(
        np.asarray(q, np.float64),
        made.k,
        made.k[..., :value_size],
        lengths,
        sinks=sinks,
        scale=0.1,
        **options,
    )
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


# (query heads, kv heads, head size) of models with 1, 8 and 70 billion weights, and of other head sizes; 64 sequences
# of up to 8,192 tokens.
MODELS = {"1B": (32, 8, 64), "8B": (32, 8, 128), "70B": (64, 8, 128), "96": (32, 32, 96), "256": (16, 8, 256)}
EVERY = [
    each
    for each in itertools.product(MODELS, ("bfloat16", "int8", "int4"), (1, 4, 256))
    if each[:2] != ("96", "int4")
]


@needs_cuda_compiler
@pytest.mark.parametrize(
    ("model", "kind", "t"),
    [("8B", "int8", 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in EVERY)],
)
def test_serving_shapes_compile_without_spills_and_copies(model, kind, t):
    n, k, h = MODELS[model]
    with compiling_for(HOPPER):
        cache = jax.eval_shape(lambda: init_cache(4096, k, h, dtype=kind))
    assert_small_and_without_spills(
        functools.partial(paged_attention, window=4096, softcap=30.0), cache, t, n, h
    )


@needs_cuda_compiler
@pytest.mark.parametrize(
    ("n", "t"),
    [
        (128, 1),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(16, 1), (16, 4), (128, 4), (16, 256)]),
    ],
)
def test_latents_compile_without_spills_and_copies(n, t):
    """DeepSeek-V3, 128 heads over latents of 512 + 64, on one device and cut over 8."""
    with compiling_for(HOPPER):
        cache = jax.eval_shape(lambda: init_latent_cache(4096, 576))
    call = functools.partial(latent_paged_attention, value_size=512, scale=0.07)
    assert_small_and_without_spills(call, cache, t, n, 576)


def assert_small_and_without_spills(call, cache, t: int, n: int, h: int):
    """The kernel is there, keeps its registers, fits shared memory, and XLA made no copy of a pool for it."""
    b = 64 if t == 1 else 4
    arguments = (
        jax.ShapeDtypeStruct((b, n, h) if t == 1 else (b, t, n, h), jnp.bfloat16),
        cache,
        jax.ShapeDtypeStruct((b, 64), jnp.int32),
        jax.ShapeDtypeStruct((b,), jnp.int32),
    )
    with said() as words:
        program = compiled_for("h200", functools.partial(call, implementation="mosaic_gpu"), *arguments)
    assert (
        words[0].count("0 bytes spill stores, 0 bytes spill loads")
        == words[0].count("bytes spill stores")
        == 1
    )
    assert "wgmma.mma_async instructions are serialized" not in words[0]
    assert "mosaic_gpu" in (program.as_text() or "")
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 5
    print(n, h, cache[0].dtype, t, re.findall(r"Used \d+ registers", words[0]), memory.temp_size_in_bytes)


def test_what_it_cannot_serve_is_said():
    made, q = paged((3,), size=64, page=128, entries=1, kind="float32"), queries(1, 1, 2, 64, "bfloat16")
    for name, chip in (("pages are float32", HOPPER), ("sm80 is not Hopper", Chip("gpu", "sm80"))):
        cache = (
            made.cache if chip == HOPPER else paged((3,), size=64, page=128, entries=1, kind="bfloat16").cache
        )
        with compiling_for(chip), pytest.raises(Unsupported, match=name):
            paged_attention(q, cache, made.table, made.lengths, implementation="mosaic_gpu")
