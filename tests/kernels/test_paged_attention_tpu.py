"""The TPU kernel of attention over pages: numbers and races in the interpreter, machine code of every chip."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from maxstack.kernels.dispatch import Chip, compiling_for
from maxstack.kernels.paged_attention import (
    append_kv,
    append_latent,
    init_cache,
    init_latent_cache,
    latent_paged_attention,
    mosaic_tpu,
    mosaic_tpu_append,
    mosaic_tpu_sizes,
    paged_attention,
    plan,
)
from tests.kernels.chips import TPUS, compiled_for, needs_libtpu
from tests.kernels.paged import brute_force, latent_cache, moved, paged, queries, rounded, stale

# Weights and values meet in bfloat16 (8 bits): a hundredth of outputs of size 1, on the safe side.
CLOSE = {"rtol": 0.0, "atol": 1.5e-2}
EXACT = {"rtol": 2e-5, "atol": 2e-5}
CAREFUL = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan")


def interpreted(q, cache, table, lengths, sinks=None, chip="v5e", value_size=None, scale=None, **options):
    """(out, lse) of the kernel in the interpreter; no race."""
    size = q.shape[-1]
    options = plan.Options(**{"window": None, "softcap": None, "scale": scale or size**-0.5} | options)
    with compiling_for(Chip("tpu", chip)):
        parts = mosaic_tpu.paged_attention(
            q, cache, plan.usable(table, cache[0].shape[0]), jnp.asarray(lengths), options, value_size or size,
            interpret=CAREFUL,
        )  # fmt: skip
        out, lse = plan.merged(*parts, sinks)
    jax.block_until_ready(out)
    assert not interpret_pallas_call.races.races_found
    return out, lse


CASES = {
    # name: (pages, dtype of queries, queries a sequence, lengths, options, tolerance)
    "float32": ("float32", "float32", 1, (0, 200, 256, 1), {}, EXACT),
    "bfloat16 window, cap": (
        "bfloat16",
        "bfloat16",
        1,
        (300, 0, 129),
        {"window": 140, "softcap": 2.0},
        CLOSE,
    ),
    "int8 in 2 parts": ("int8", "bfloat16", 1, (384, 130), {"splits": 2}, CLOSE),
    "int4 chunk of 5": ("int4", "bfloat16", 5, (3, 270), {"window": 150}, CLOSE),
    "int8, exact products": ("int8", "float32", 3, (131, 129, 2), {"splits": 3}, EXACT),
}


def quick_and_slow(quick, cases):
    """The cases, all but the quick ones marked slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


QUICK = ("bfloat16 window, cap", "int8, exact products")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_interpreted_kernel_equals_brute_force_without_races(case, size):
    kind, dtype, t, lengths, options, tolerance = CASES[case]
    made = paged(lengths, heads=2, size=size, page=128, entries=3, kind=kind)
    q = queries(len(lengths), t, 4, size, dtype)
    sinks = np.array([0.5, -1, 0, 1])
    found = interpreted(q, made.cache, made.table, made.lengths, jnp.asarray(sinks, jnp.float32), **options)
    options = {name: value for name, value in options.items() if name != "splits"}
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, lengths, sinks=sinks, **options)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance["rtol"], atol=tolerance["atol"])


@pytest.mark.slow
def test_bad_entries_are_hidden():
    made, q = paged((300, 256), heads=1, size=64, page=128, entries=3), queries(2, 1, 2, 64)
    table = made.table.copy()
    table[0, 1], table[1, 0] = -7, 10**6
    hidden = {(0, s) for s in range(128, 256)} | {(1, s) for s in range(128)}
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, made.lengths, hidden=hidden)
    for one, other in zip(interpreted(q, made.cache, table, made.lengths), wanted, strict=True):
        np.testing.assert_allclose(one, other, **EXACT)


@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_padding_of_a_chunk_reads_stale_pages_and_spoils_no_token(value):
    real, padding = np.array([126, 60], np.int32), 3
    made = stale(paged(real, heads=1, size=64, page=128, entries=2, kind="bfloat16"), value)
    q = queries(2, 1 + padding, 2, 64, "bfloat16")
    found = interpreted(q, made.cache, made.table, real + padding)
    wanted = brute_force(np.asarray(q, np.float64)[:, :1], made.k, made.v, real)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one[:, :1], other, **CLOSE)


APPENDED = [("int8", 64), ("bfloat16", 128)] + [
    pytest.param(*each, marks=pytest.mark.slow)
    for each in itertools.product(("float32", "bfloat16", "int8", "int4"), (64, 128))
]


@pytest.mark.parametrize(("kind", "size"), APPENDED)
def test_long_chunks_are_written_page_by_page_and_nothing_else_is(kind, size, monkeypatch):
    monkeypatch.setattr(
        mosaic_tpu_append,
        "append_pages",
        functools.partial(mosaic_tpu_append.append_pages, interpret=CAREFUL),
    )
    t, lengths, counts = 300, np.array([100, 0, 256], np.int32), np.array([300, 130, 140], np.int32)
    table = np.array([[3, 7, 0, 5], [1, 99, 9, 9], [8, 8, 2, 6]], np.int32)
    random = np.random.default_rng(0)
    made = paged(
        (512, 512), heads=2, size=size, page=128, entries=4, spare=2, kind=kind
    )  # all 10 pages hold something
    x = {name: random.normal(size=(3, t, 2, size)).astype(np.float32) for name in ("k", "v")}
    wanted = [None if pool is None else np.array(pool.astype(jnp.float32)) for pool in made.cache]
    for pages, scales, name, axis in ((0, 2, "k", 1), (1, 3, "v", 2)):
        numbers, scale, _ = rounded(x[name], kind)
        for i, j in itertools.product(range(3), range(t)):
            entry, place = divmod(lengths[i] + j, 128)
            if j < counts[i] and entry < 4 and table[i, entry] < 10:
                np.moveaxis(wanted[pages][table[i, entry]], axis, 0)[place] = numbers[i, j]
                if scale is not None:
                    wanted[scales][table[i, entry], :, place] = scale[i, j]
    with compiling_for(Chip("tpu", "v5e")):
        found = append_kv(made.cache, jnp.asarray(x["k"]), jnp.asarray(x["v"]), table, lengths, counts)
        jax.block_until_ready(found)
    assert not interpret_pallas_call.races.races_found
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            # Scales are a division apart in the last place; numbers are the same.
            np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2e-7, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_long_chunks_of_latents_are_written_page_by_page(kind, monkeypatch):
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(2, 200, 64)), jnp.float32)
    table, lengths = np.array([[1, 3, 4], [2, 0, 5]], np.int32), np.array([100, 0], np.int32)
    with compiling_for(Chip("tpu", "v5e")):
        cache = init_latent_cache(6, 64, dtype=kind)
        monkeypatch.setattr(mosaic_tpu_append, "declined", lambda pools: "token by token")
        wanted = append_latent(cache, latents, table, lengths)
        monkeypatch.undo()
        monkeypatch.setattr(
            mosaic_tpu_append,
            "append_pages",
            functools.partial(mosaic_tpu_append.append_pages, interpret=CAREFUL),
        )
        found = append_latent(cache, latents, table, lengths)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=2e-7, atol=0)


@pytest.mark.slow
def test_where_pages_lie_changes_no_bit():
    made, q = (
        paged((300, 0, 129), size=64, page=128, entries=3, kind="int8"),
        queries(3, 1, 4, 64, "bfloat16"),
    )
    other = moved(made)
    one = interpreted(q, made.cache, made.table, made.lengths)
    two = interpreted(q, other.cache, other.table, other.lengths)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_queries_are_tiled_and_two_cores_share_pieces(monkeypatch):
    monkeypatch.setattr(mosaic_tpu_sizes, "MOST_ROWS", 4)  # two queries a piece: 5 are padded to 6
    made, q = paged((140, 0), heads=1, size=64, page=128, entries=2), queries(2, 5, 2, 64)
    found = interpreted(q, made.cache, made.table, made.lengths, chip="v5p", window=20)
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, made.lengths, window=20)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **EXACT)


@pytest.mark.parametrize("kind", [pytest.param("float32", marks=pytest.mark.slow), "int8"])
def test_latents(kind):
    made = paged((200, 7), heads=1, size=128, page=128, entries=2, kind=kind)
    q = queries(2, 2, 4, 128)
    found = interpreted(q, latent_cache(made, kind), made.table, made.lengths, value_size=64, scale=0.1)
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.k[..., :64], made.lengths, scale=0.1)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **EXACT)


# (query heads, kv heads, head size) of models with 1, 8 and 70 billion weights; 64 sequences of up to 8,192 tokens.
MODELS = {"1B": (32, 8, 64), "8B": (32, 8, 128), "70B": (64, 8, 128)}
POOL, SEQUENCES, ENTRIES = 4096, 64, 64


def compiled(chip, model, kind, t, **options):
    """Attention of a serving step of a model; t is queries a sequence."""
    n, k, h = MODELS[model]
    with compiling_for(Chip("tpu", chip)):
        cache = jax.eval_shape(lambda: init_cache(POOL, k, h, dtype=kind))
    b = SEQUENCES if t == 1 else 4
    return compiled_for(
        chip,
        lambda *args: paged_attention(*args, **options),
        jax.ShapeDtypeStruct((b, n, h) if t == 1 else (b, t, n, h), jnp.bfloat16),
        cache,
        jax.ShapeDtypeStruct((b, ENTRIES), jnp.int32),
        jax.ShapeDtypeStruct((b,), jnp.int32),
    )


def assert_kernel_without_copies(program):
    """The kernel is there, and what it holds beside its arguments is small: XLA made no copy of a pool for it."""
    assert "tpu_custom_call" in program.as_text()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 5


@needs_libtpu
@pytest.mark.parametrize(("chip", "model", "kind"), [("v5e", "1B", "int8"), ("v7x", "8B", "int4")])
def test_serving_shapes_compile(chip, model, kind):
    assert_kernel_without_copies(compiled(chip, model, kind, 1, window=4096, softcap=30.0))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "model", "kind", "t"),
    list(itertools.product(TPUS, MODELS, ("bfloat16", "int8", "int4"), (1, 4, 256))),
)
def test_every_serving_shape_compiles(chip, model, kind, t):
    assert_kernel_without_copies(compiled(chip, model, kind, t))


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "kind"),
    [("v6e", "bfloat16")]
    + [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in itertools.product(TPUS, ("bfloat16", "int8", "int4"))
    ],
)
def test_latents_compile(chip, kind):
    """DeepSeek-V3: 128 heads over latents of 512 + 64."""
    with compiling_for(Chip("tpu", chip)):
        cache = jax.eval_shape(lambda: init_latent_cache(POOL, 576, dtype=kind))
    program = compiled_for(
        chip,
        lambda *args: latent_paged_attention(*args, value_size=512, scale=0.07),
        jax.ShapeDtypeStruct((SEQUENCES, 128, 576), jnp.bfloat16),
        cache,
        jax.ShapeDtypeStruct((SEQUENCES, ENTRIES), jnp.int32),
        jax.ShapeDtypeStruct((SEQUENCES,), jnp.int32),
    )
    assert_kernel_without_copies(program)


WRITTEN = list(itertools.product(TPUS, ("bfloat16", "int8", "int4"), (64, 128), (1, 512)))


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "kind", "size", "t"),
    [
        ("v5e", "int8", 64, 1),
        ("v5e", "int8", 64, 512),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in WRITTEN),
    ],
)
def test_written_pages_are_not_copied(chip, kind, size, t):
    """Beside its arguments and results the program needs room for new tokens, and copies none of a pool."""
    with compiling_for(Chip("tpu", chip)):
        cache = jax.eval_shape(lambda: init_cache(POOL, 8, size, dtype=kind))
    b = SEQUENCES if t == 1 else 2
    new = jax.ShapeDtypeStruct((b, t, 8, size), jnp.bfloat16)
    table, lengths = jax.ShapeDtypeStruct((b, ENTRIES), jnp.int32), jax.ShapeDtypeStruct((b,), jnp.int32)
    program = compiled_for(chip, append_kv, cache, new, new, table, lengths, donate_argnums=0)
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / (50 if t == 1 else 20)
    text = program.as_text() or ""
    assert ("append_pages" if t > 1 else "append_token") in text
    # A pool has 4,096 pages, and nothing else has. Inside of a fusion a copy is but a way to read.
    parts = [part for part in text.split("\n\n") if not part.startswith(("%fused", "%copy_fusion"))]
    copies = re.findall(r"= \S*\[4096,\S* (?:copy|transpose|copy-start|convert|select)\(", "".join(parts))
    assert not copies, copies
