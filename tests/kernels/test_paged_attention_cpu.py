"""Attention over pages in C++: any shape against float64 numpy, company that changes no bit, writing in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.kernels import Unsupported, cpu_native
from maxstack.kernels.paged_attention import KVCache, append_kv, init_cache, paged_attention
from tests.kernels.paged import brute_force, paged, queries

pytestmark = pytest.mark.skipif(not cpu_native.available(), reason="needs a C++ compiler")
KINDS = ("float32", "bfloat16", "int8", "packed int4")
# Float32 against float64: a few roundings of sums of tens of terms of size 1.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
run = jax.jit(
    lambda *args, **options: paged_attention(*args, implementation="cpu_native", **options),
    static_argnames=("window", "softcap", "scale", "splits", "return_lse"),
)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    # Heads and pages that are whole vectors of 8 or 16 floats, and such as are not.
    sizes=st.sampled_from([(8, 5), (4, 8), (8, 10), (16, 24), (20, 6), (24, 64)]),
    heads=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 5), (1, 71)]),
    t=st.sampled_from([1, 2, 7]),
    window=st.sampled_from([None, 1, 13]),
    softcap=st.sampled_from([None, 2.0]),
    splits=st.sampled_from([None, 1, 3]),
    scale=st.sampled_from([0.3, 6.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_brute_force(kind, lengths, sizes, heads, t, window, softcap, splits, scale, seed):
    (page, size), (kv, group) = sizes, heads
    size += size % 2 if kind == "packed int4" else 0
    made = paged(lengths, heads=kv, size=size, page=page, entries=-(-40 // page), kind=kind, seed=seed)
    q = queries(len(lengths), t, kv * group, size, seed=seed)
    sinks = np.random.default_rng(seed).normal(size=kv * group)
    options = {"window": window, "softcap": softcap, "scale": scale}
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, lengths, sinks=sinks, **options)
    found = run(
        q, made.cache, made.table, made.lengths, splits=splits, return_lse=True,
        sinks=jnp.asarray(sinks, jnp.float32), **options,
    )  # fmt: skip
    for one, other in zip(found, wanted, strict=True):
        # Sums of `size` products, `scale` times as large.
        np.testing.assert_allclose(one, other, **{name: scale * close for name, close in CLOSE.items()})


LONG = {"heads": 2, "size": 8, "page": 16, "entries": 80}  # pieces of 512 tokens: up to three a sequence


def test_long_sequences_in_pieces_equal_brute_force():
    lengths = (1280, 513, 40)
    made, q = paged(lengths, **LONG), queries(3, 1, 4, 8)
    for window in (None, 700):
        wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, lengths, window=window)
        found = run(q, made.cache, made.table, made.lengths, window=window, return_lse=True)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 600])
def test_a_query_gets_the_same_bits_in_any_company(kind, window):
    """Alone, in a chunk, beside sequences that make each thread take a whole one."""
    made = paged((1100,) * 2 + (3,) * 40, **LONG, kind=kind)
    q = queries(42, 5, 6, 8)
    together = run(q, made.cache, made.table, made.lengths, window=window, return_lse=True)
    few = slice(0, 2)
    chunk = run(q[few], made.cache, made.table[few], made.lengths[few], window=window, return_lse=True)
    for one, other in zip(together, chunk, strict=True):
        np.testing.assert_array_equal(one[few], other)
    for j in range(5):
        lengths = made.lengths[:1] - 4 + j
        alone = run(q[:1, j], made.cache, made.table[:1], lengths, window=window, return_lse=True)
        for one, other in zip(chunk, alone, strict=True):
            np.testing.assert_array_equal(one[:1, j], other)


def test_nan_in_one_sequence_stays_there():
    made, q = paged((20, 32, 9)), queries(3, 1, 4, 8)
    clean = run(q, made.cache, made.table, made.lengths)
    found = run(q.at[1, 0, 2, 3].set(jnp.nan), made.cache, made.table, made.lengths)
    assert np.isnan(np.asarray(found[1, 0, 2])).all()
    hurt = np.zeros(found.shape[:3], bool)
    hurt[1, 0, 2] = True
    np.testing.assert_array_equal(np.asarray(found)[~hurt], np.asarray(clean)[~hurt])


def test_logits_of_any_size_give_weights_that_sum_to_one():
    made, q = paged((32, 17)), queries(2, 1, 4, 8)
    for scale in (1e-6, 30.0, 1e4):
        wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, (32, 17), scale=scale)
        found = run(q, made.cache, made.table, made.lengths, scale=scale, return_lse=True)
        # One unit in the last place of the largest logit.
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 + 2**-22 * 20 * scale)


def test_bfloat16_queries_come_back_in_their_type():
    made, q = paged((20, 32), kind="bfloat16"), queries(2, 1, 4, 8, "bfloat16")
    out, lse = run(q, made.cache, made.table, made.lengths, return_lse=True)
    assert out.dtype == jnp.bfloat16
    wanted, wanted_lse = brute_force(np.asarray(q, np.float64), made.k, made.v, (20, 32))
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(lse, wanted_lse, **CLOSE)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_step_that_writes_and_reads_copies_no_pool(kind):
    """Several steps in one program, layers as a scan carries them: XLA's scatter copies here."""
    shape = (333, 2, 16, 24)
    cache = init_cache(shape[0], shape[1], shape[3], page=shape[2], dtype=kind)
    table = jnp.asarray([[7, 3], [5, 9]], jnp.int32)
    new = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 1, 2, 24)), jnp.float32)

    def steps(cache: KVCache, lengths):
        def step(state, k):
            cache, lengths = state
            cache = append_kv(cache, k, 2 * k, table, lengths)
            out = paged_attention(k[:, 0], cache, table, lengths + 1)
            return (cache, lengths + 1), out

        (cache, _), out = jax.lax.scan(step, (cache, lengths), new)
        return cache, out

    compiled = jax.jit(steps, donate_argnums=0).lower(cache, jnp.zeros(2, jnp.int32)).compile()
    text = str(compiled.as_text())
    assert "maxstack_write_rows" in text
    copies = [
        line
        for line in text.splitlines()
        if "[333," in line.split(" = ")[-1].split("(")[0] and " copy(" in line
    ]
    assert not copies, "\n".join(copies)
    held = sum(pool.nbytes for pool in cache if pool is not None)
    assert compiled.memory_analysis().temp_size_in_bytes < held / 2
    before = [pool.unsafe_buffer_pointer() for pool in cache if pool is not None]
    cache, out = compiled(cache, jnp.zeros(2, jnp.int32))
    assert [pool.unsafe_buffer_pointer() for pool in cache if pool is not None] == before
    k = np.asarray(new[:, :, 0], np.float64).swapaxes(0, 1)
    wanted, _ = brute_force(k[:, 3:, :, :], k, 2 * k, (4, 4))
    off = 2e-5 if kind == "float32" else 0.06  # int8: half a step of keys and values
    np.testing.assert_allclose(out[3], wanted[:, 0], rtol=off, atol=off)


def test_a_cache_that_is_kept_is_not_written():
    cache = init_cache(4, 1, 8, page=4, dtype="float32")
    ones = jnp.ones((1, 1, 1, 8))
    table, none = np.array([[2]], np.int32), np.zeros(1, np.int32)
    after = append_kv(cache, ones, ones, table, none)
    assert not np.asarray(cache.k_pages).any()
    assert np.asarray(after.k_pages).sum() == 8


def test_what_it_cannot_serve_is_refused_with_the_reason():
    made, q = paged((20,), kind="int4"), queries(1, 1, 4, 8)
    with pytest.raises(Unsupported, match="it reads two int4 of a byte"):
        paged_attention(q, made.cache, made.table, made.lengths, implementation="cpu_native")
