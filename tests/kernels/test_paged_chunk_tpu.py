"""Chunks of a prompt over pages on a TPU: the form with keys down, in the interpreter, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.kernels.dispatch import Chip, compiling_for
from maxstack.kernels.paged_attention import (
    init_cache,
    init_latent_cache,
    latent_paged_attention,
    mosaic_tpu_sizes,
    paged_attention,
    plan,
)
from tests.kernels.chips import TPUS, compiled_for, needs_libtpu
from tests.kernels.paged import brute_force, latent_cache, paged, queries, stale
from tests.kernels.test_paged_attention_tpu import CLOSE, EXACT, interpreted

# (pages, dtype of queries, head size, query and kv heads, queries, lengths, options, tolerance). 300 rows become 384,
# in blocks of 128; 512 are two blocks of 256. Some queries stand before the first position;
# of 190 keys one block's first query sees all but one of a page.
CHUNKS = {
    "bfloat16 of 64, a window": ("bfloat16", "bfloat16", 64, (6, 2), 100, (300, 60), {"window": 70}, CLOSE),
    "int8, exact, some heads": ("int8", "float32", 128, (8, 2), 70, (190,), {}, EXACT),
    "float32, soft cap, 2 parts": (
        "float32",
        "float32",
        128,
        (4, 1),
        70,
        (256, 71),
        {"splits": 2, "softcap": 3.0},
        EXACT,
    ),
    "int4 of 64": ("int4", "bfloat16", 64, (8, 2), 40, (200, 41), {}, CLOSE),
    "bfloat16, whole blocks": ("bfloat16", "bfloat16", 128, (8, 1), 64, (384, 64), {"final": True}, CLOSE),
    "bfloat16, final, a block": ("bfloat16", "bfloat16", 128, (8, 1), 17, (140,), {"final": True}, CLOSE),
}
QUICK = ("int8, exact, some heads",)


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CHUNKS]
)
def test_chunks_equal_brute_force_without_races(case, monkeypatch):
    kind, dtype, size, (n, k), t, lengths, options, tolerance = CHUNKS[case]
    if "some heads" in case:  # which a piece then has one of
        monkeypatch.setattr(mosaic_tpu_sizes, "CHUNK_BYTES", 1 << 20)
    made = paged(lengths, heads=k, size=size, page=128, entries=3, kind=kind)
    q = queries(len(lengths), t, n, size, dtype)
    sinks = None if options.get("final") else np.linspace(-1, 1, n)
    given = None if sinks is None else jnp.asarray(sinks, jnp.float32)
    found = interpreted(q, made.cache, made.table, made.lengths, given, **options)
    assert found[0].dtype == (jnp.bfloat16 if options.get("final") else jnp.float32)
    options = {name: value for name, value in options.items() if name not in ("splits", "final")}
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, lengths, sinks=sinks, **options)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float64), other, rtol=tolerance["rtol"], atol=tolerance["atol"]
        )


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_padding_of_a_long_chunk_reads_stale_pages_and_spoils_no_token(value):
    real, padding = np.array([190, 60], np.int32), 30
    made = stale(paged(real, heads=1, size=64, page=128, entries=2, kind="bfloat16"), value)
    q = queries(2, 50 + padding, 4, 64, "bfloat16")
    found = interpreted(q, made.cache, made.table, real + padding)
    wanted = brute_force(np.asarray(q, np.float64)[:, :50], made.k, made.v, real)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one[:, :50], other, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_chunks_of_latents(kind):
    made = paged((200, 17), heads=1, size=128, page=128, entries=2, kind=kind)
    q = queries(2, 16, 16, 128)
    found = interpreted(q, latent_cache(made, kind), made.table, made.lengths, value_size=64, scale=0.1)
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.k[..., :64], made.lengths, scale=0.1)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **EXACT)


@pytest.mark.slow
def test_two_cores_share_the_heads_of_a_chunk_and_tiles_of_queries_change_nothing(monkeypatch):
    made, q = paged((300,), heads=2, size=64, page=128, entries=3), queries(1, 70, 8, 64)
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, made.lengths)
    for rows in (2048, 128):
        monkeypatch.setattr(mosaic_tpu_sizes, "CHUNK_ROWS", rows)
        for one, other in zip(
            interpreted(q, made.cache, made.table, made.lengths, chip="v5p"), wanted, strict=True
        ):
            np.testing.assert_allclose(one, other, **EXACT)


def test_a_piece_of_a_chunk_has_no_page_behind_its_last_key():
    options = plan.Options(window=None, softcap=None, scale=1.0)
    q, lengths = jnp.zeros((1, 256, 8, 64)), jnp.array([500])
    work, each = plan.pieces(q, 2, lengths, options, 128, 8, most_rows=512, step=32)
    assert each == 128
    assert work.ends_r.tolist() == [372, 500]
    assert work.last_r.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("model", "t", "rows", "heads"),
    [
        ((32, 8, 128), 256, 1024, 4),
        ((64, 8, 128), 256, 2048, 2),
        ((9, 3, 64), 100, 384, 3),
        ((128, 1, 576), 64, 1024, 1),
    ],
)
def test_a_chunk_copies_its_pages_for_many_rows_at_once(model, t, rows, heads):
    n, k, h = model
    q = jnp.zeros((1, t, n, h), jnp.bfloat16)
    pools = [jnp.zeros((1, k, 128, h), jnp.bfloat16)] * 2
    with compiling_for(Chip("tpu", "v5e")):
        sizes = mosaic_tpu_sizes.sizes_for(q, pools, 128, min(h, 512), jnp.bfloat16)
        few = mosaic_tpu_sizes.sizes_for(q[:, :8], pools, 128, min(h, 512), jnp.bfloat16)
    lengths, options = jnp.array([9000]), plan.Options(window=None, softcap=None, scale=1.0)
    step = mosaic_tpu_sizes.step(n // k)
    work, _ = plan.pieces(q, k, lengths, options, 128, 80, sizes["rows"], step)
    assert (work.q_rkmh.shape[2], sizes["heads"]) == (rows, heads)
    assert few == {"rows": 128, "heads": k, "slots": 4}


def chunk_program(chip, kind, model, **options):
    """64 queries of each of 4 sequences of up to 8,192 tokens."""
    n, k, h = model
    latent = k == 1
    with compiling_for(Chip("tpu", chip)):
        make = (
            (lambda: init_latent_cache(256, h, dtype=kind))
            if latent
            else (lambda: init_cache(256, k, h, dtype=kind))
        )
        cache = jax.eval_shape(make)
    function = latent_paged_attention if latent else paged_attention
    options |= {"value_size": 512, "scale": 0.07} if latent else {}
    q = jax.ShapeDtypeStruct((4, 64, n, h), jnp.bfloat16)
    table, lengths = jax.ShapeDtypeStruct((4, 64), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    return compiled_for(chip, lambda *args: function(*args, **options), q, cache, table, lengths)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_chunks_of_latents_and_of_odd_groups_compile(chip, kind):
    """DeepSeek-V3's 128 heads over latents of 512 + 64, and 3 query heads to a kv head of 64."""
    for model, options in (((128, 1, 576), {}), ((9, 3, 64), {"window": 1000, "softcap": 30.0})):
        assert "tpu_custom_call" in str(chunk_program(chip, kind, model, **options).as_text())
