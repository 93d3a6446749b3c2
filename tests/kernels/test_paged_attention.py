"""Attention over pages against float64 numpy: values, ranges, pages that move, splits, what is written and refused."""

import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.kernels import Unsupported, cpu_native
from maxstack.kernels.dispatch import Chip, compiling_for
from maxstack.kernels.paged_attention import (
    append_kv,
    append_latent,
    bytes_moved,
    init_cache,
    init_latent_cache,
    latent_paged_attention,
    paged_attention,
)  # fmt: skip
from tests.kernels.paged import (
    PAGE_TYPES,
    brute_force,
    held,
    latent_cache,
    moved,
    paged,
    queries,
    rounded,
    stale,
)

# Float32 against float64: a few roundings of sums of tens of terms of size 1.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
LENGTHS = (0, 1, 9, 32)
HERE = ["xla", "reference", *(["cpu_native"] if cpu_native.available() else [])]
SINKS = np.array([0.3, -1.0, 0.0, 2.0])
run = jax.jit(
    paged_attention,
    static_argnames=("window", "softcap", "scale", "splits", "return_lse", "implementation", "debug"),
)


PAIRS = list(itertools.product((1, 3), (None, 5), (None, 1.5), (False, True)))
CASES = [("float32", *pair) for pair in PAIRS] + [
    (kind, *pair) for kind in PAGE_TYPES[1:] for pair in ((1, None, None, False), (3, 5, 1.5, True))
]


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize(("kind", "t", "window", "softcap", "sunk"), CASES)
def test_every_option_pair_equals_brute_force(implementation, kind, t, window, softcap, sunk):
    if implementation == "cpu_native" and kind == "int4":
        pytest.skip("it takes two int4 a byte")
    made = paged(LENGTHS, kind=kind)
    q = queries(4, t, 4, 8)
    options = {"window": window, "softcap": softcap, "scale": 0.5}
    wanted = brute_force(
        np.asarray(q, np.float64), made.k, made.v, LENGTHS, sinks=SINKS if sunk else None, **options
    )
    found = run(
        q, made.cache, made.table, made.lengths, sinks=jnp.asarray(SINKS, jnp.float32) if sunk else None,
        splits=2, return_lse=True, implementation=implementation, **options,
    )  # fmt: skip
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 32), min_size=3, max_size=3),
    window=st.sampled_from([None, 1, 11]),
    splits=st.sampled_from([1, 3]),
    t=st.sampled_from([1, 9]),
    seed=st.integers(0, 99),
    implementation=st.sampled_from(["auto", "xla"]),
)
def test_any_lengths_windows_and_splits_equal_brute_force(lengths, window, splits, t, seed, implementation):
    made, q = paged(lengths, seed=seed), queries(3, t, 2, 8, seed=seed)
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, lengths, window=window)
    found = run(
        q, made.cache, made.table, made.lengths, window=window, splits=splits, return_lse=True,
        implementation=implementation,
    )  # fmt: skip
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


def test_sequences_that_hold_nothing_give_zeros_and_no_lse():
    made = paged((0, 0))
    out, lse = run(queries(2, 2, 4, 8), made.cache, made.table, made.lengths, return_lse=True)
    assert not out.any()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("kind", ["float32", "int8", "packed int4"])
def test_where_pages_lie_changes_no_bit(kind):
    made, q = paged(LENGTHS, kind=kind), queries(4, 2, 4, 8)
    other = moved(made)
    one = run(q, made.cache, made.table, made.lengths, return_lse=True)
    two = run(q, other.cache, other.table, other.lengths, return_lse=True)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_splits_change_roundings_alone():
    made, q = paged((5, 32, 17)), queries(3, 1, 4, 8)
    whole = run(q, made.cache, made.table, made.lengths, splits=1)
    for splits in (2, 3, 9):
        parts = run(q, made.cache, made.table, made.lengths, splits=splits)
        # Outputs are means of values of size 1: a few units of the last place of float32.
        np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", HERE)
def test_bad_entries_hide_their_positions_and_show_no_other_sequence(implementation):
    made, q = paged((20, 32)), queries(2, 1, 4, 8)
    table = made.table.copy()
    table[0, 1], table[1, 0], table[1, 3] = -5, len(made.cache.k_pages), 2**31 - 1
    hidden = {(0, s) for s in range(8, 16)} | {(1, s) for s in (*range(8), *range(24, 32))}
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, made.lengths, hidden=hidden)
    found = run(q, made.cache, table, made.lengths, return_lse=True, implementation=implementation)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("implementation", HERE)
def test_padding_of_a_chunk_reads_stale_pages_and_spoils_no_token(implementation, value, splits):
    real, padding = (
        np.array([9, 2, 31], np.int32),
        3,
    )  # tokens; the padding of the second is in pages of its own
    made = stale(paged(real, kind="bfloat16"), value)
    q = queries(3, 2 + padding, 4, 8)
    found = run(
        q,
        made.cache,
        made.table,
        real + padding,
        return_lse=True,
        splits=splits,
        implementation=implementation,
    )
    wanted = brute_force(np.asarray(q, np.float64)[:, :2], made.k, made.v, real)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one[:, :2], other, **CLOSE)


@pytest.mark.parametrize("implementation", HERE)
def test_positions_past_the_table_do_not_exist(implementation):
    made, q = paged((32, 32)), queries(2, 2, 4, 8)
    lengths = np.array([32, 40], np.int32)
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.v, lengths, window=20)
    found = run(q, made.cache, made.table, lengths, window=20, return_lse=True, implementation=implementation)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


def test_debug_names_the_entry_and_the_length():
    made, q = paged((20, 32)), queries(2, 1, 4, 8)
    paged_attention(q, made.cache, made.table, made.lengths, debug=True)
    table = made.table.copy()
    table[0, 2] = 11
    with pytest.raises(ValueError, match=r"page 2 of sequence 0 \(length 20\) is entry 11; .* pages 0 to 10"):
        paged_attention(q, made.cache, table, made.lengths, debug=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="page 2 of sequence 0"):
        jax.block_until_ready(run(q, made.cache, table, made.lengths, debug=True))
    table[0, 2:] = -1  # never needed
    paged_attention(q, made.cache, table, np.array([16, 32]), debug=True)
    table[0, 0] = -1  # before the window
    paged_attention(q, made.cache, table, np.array([16, 32]), window=8, debug=True)
    with pytest.raises(ValueError, match="sequence 1 has length 33; its 4 pages of 8 hold 0 to 32"):
        paged_attention(q, made.cache, made.table, np.array([20, 33]), debug=True)


ON_CPU, ON_TPU = Chip("cpu", "cpu"), Chip("tpu", "v5e")


@pytest.mark.parametrize(
    ("kind", "chip"),
    # XLA for the CPU cannot run the TPU's loop over jnp.int4.
    [(kind, ON_CPU) for kind in ("float32", "int8", "int4", "packed int4")]
    + [(kind, ON_TPU) for kind in ("bfloat16", "int8")],
)
def test_appended_pages_equal_those_made_in_numpy(kind, chip):
    with compiling_for(ON_TPU if kind == "int4" else chip):
        cache = init_cache(6, 2, 8, page=4, dtype=kind.removeprefix("packed "))
    random = np.random.default_rng(0)
    k, v = random.normal(size=(2, 2, 7, 2, 8))
    table = np.array([[3, 0, 5], [1, 4, -1]], np.int32)
    lengths, counts = np.array([0, 3], np.int32), np.array([5, 7], np.int32)
    kept = {(0, j): (table[0, j // 4], j % 4) for j in range(5)}
    kept |= {(1, j): (table[1, (3 + j) // 4], (3 + j) % 4) for j in range(5)}  # then the table ends
    wanted = jax.tree.map(lambda pool: np.array(pool.astype(jnp.float32)), cache)
    for x, pages, scales in ((k, wanted.k_pages, wanted.k_scale), (v, wanted.v_pages, wanted.v_scale)):
        numbers, scale, _ = rounded(x.astype(np.float32), kind)
        for (i, j), (p, place) in kept.items():
            axis = 1 if pages is wanted.k_pages else 2
            row = np.asarray(held(numbers[i, j], kind, 1).astype(jnp.float32))
            np.moveaxis(pages[p], axis, 0)[place] = row
            if scale is not None:
                scales[p, :, place] = scale[i, j]
    new = jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)
    with compiling_for(chip):
        found = jax.jit(lambda *args: append_kv(*args))(cache, *new, table, lengths, counts)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # Scales are a division apart in the last place; numbers are the same.
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2e-7, atol=0)


def test_a_chunk_written_at_once_is_attended_like_tokens_one_by_one():
    random = np.random.default_rng(2)
    k, v = jnp.asarray(random.normal(size=(2, 2, 6, 2, 8)), jnp.float32)
    table, lengths = np.array([[2, 0], [3, 1]], np.int32), np.array([3, 0], np.int32)
    start = append_kv(
        init_cache(4, 2, 8, page=8, dtype="int8"), k[:, :3], v[:, :3], table, np.zeros(2, np.int32)
    )
    q = queries(2, 6, 4, 8)
    chunk = run(q, append_kv(start, k, v, table, lengths), table, lengths + 6)
    cache = start
    for j in range(6):
        cache = jax.jit(append_kv)(cache, k[:, j : j + 1], v[:, j : j + 1], table, lengths + j)
        one = run(q[:, j], cache, table, lengths + j + 1)
        np.testing.assert_allclose(chunk[:, j], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_latents_are_keys_of_one_head_whose_first_components_are_values(kind, implementation):
    made = paged(LENGTHS, heads=1, size=8, kind=kind)
    q = queries(4, 2, 4, 8)
    out, lse = latent_paged_attention(
        q, latent_cache(made, kind), made.table, made.lengths, value_size=6, scale=0.3, window=7, splits=2,
        return_lse=True, implementation=implementation,
    )  # fmt: skip
    wanted = brute_force(np.asarray(q, np.float64), made.k, made.k[..., :6], LENGTHS, window=7, scale=0.3)
    np.testing.assert_allclose(out, wanted[0], **CLOSE)
    np.testing.assert_allclose(lse, wanted[1], **CLOSE)


def test_appended_latents_are_attended():
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    table, none = np.array([[1, 3], [2, 0]], np.int32), np.zeros(2, np.int32)
    cache = append_latent(init_latent_cache(4, 8, page=4, dtype="float32"), latents, table, none)
    q = queries(2, 1, 3, 8)
    out = latent_paged_attention(q[:, 0], cache, table, none + 5, value_size=8, scale=1.0)
    k = np.asarray(latents, np.float64)[:, :, None]
    wanted, _ = brute_force(np.asarray(q, np.float64), k, k, none + 5, scale=1.0)
    np.testing.assert_allclose(out, wanted[:, 0], **CLOSE)


POOL = (333, 2, 16, 24)  # no other array has its size


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_compiled_programs_hold_no_copy_of_the_pool(kind):
    cache = jax.eval_shape(lambda: init_cache(*POOL[:2], POOL[3], page=POOL[2], dtype=kind))
    held_bytes = sum(pool.size * pool.dtype.itemsize for pool in cache if pool is not None)
    new = jax.ShapeDtypeStruct((2, 1, 2, 24), jnp.float32)
    table, lengths = jax.ShapeDtypeStruct((2, 3), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    write = jax.jit(append_kv, donate_argnums=0).lower(cache, new, new, table, lengths).compile()
    read = run.lower(jax.ShapeDtypeStruct((2, 4, 24), jnp.bfloat16), cache, table, lengths).compile()
    for program in (write, read):
        assert program.memory_analysis().temp_size_in_bytes < held_bytes / 2
        # A dimension of 333 in what an operation makes is the pool; tuples, parameters and updates in place are none.
        makers = [
            line
            for line in program.as_text().splitlines()
            if "[333," in line.split(" = ")[-1].split("(")[0]
            and any(f" {maker}(" in line for maker in ("copy", "convert", "transpose", "broadcast", "select"))
        ]
        assert not makers, "\n".join(makers)


def test_bytes_of_a_call_are_counted():
    lengths, q = np.array([100, 3]), (2, 8, 16)
    for kind, number in (("bfloat16", 2), ("int8", 1), ("int4", 0.5)):
        cache = jax.eval_shape(lambda kind=kind: init_cache(9, 4, 16, page=128, dtype=kind))
        scales = 0 if kind == "bfloat16" else 8
        around = 2 * 2 * 8 * 16 * 2
        assert bytes_moved(cache, lengths, q) == 103 * 4 * (32 * number + scales) + around
        assert bytes_moved(cache, lengths, q, window=10) == 13 * 4 * (32 * number + scales) + around
    latent = jax.eval_shape(lambda: init_latent_cache(9, 24, page=128))
    assert bytes_moved(latent, lengths, (2, 8, 24), value_size=16) == 103 * 48 + 2 * 8 * (24 + 16) * 2


@pytest.fixture
def no_shape_checks():
    """Shape annotations are checked in tests only; a user meets the function's own words."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("no_shape_checks")
def test_bad_calls_are_refused_with_the_numbers():
    made, q = paged((3, 9)), queries(2, 1, 4, 8)
    call = lambda q=q, cache=made.cache, table=made.table, lengths=made.lengths, **o: paged_attention(  # noqa: E731
        q, cache, table, lengths, **o
    )
    with pytest.raises(ValueError, match="query heads 3 must be a multiple of kv heads 2"):
        call(queries(2, 1, 3, 8))
    with pytest.raises(ValueError, match="queries have 6 components, cached keys 8"):
        call(queries(2, 1, 4, 6))
    with pytest.raises(ValueError, match="3 sequences of queries, 2 of the page table and 2 lengths"):
        call(queries(3, 1, 4, 8))
    with pytest.raises(ValueError, match="window is 0 positions"):
        call(window=0)
    with pytest.raises(ValueError, match="splits is 0"):
        call(splits=0)
    with pytest.raises(ValueError, match=r"sinks \(3,\) must have one number for each of 4"):
        call(sinks=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"k_scale is \(11, 2, 8\); pages of float32 take None"):
        call(cache=made.cache._replace(k_scale=jnp.zeros((11, 2, 8))))
    with pytest.raises(ValueError, match=r"key pages .* and value pages .* disagree"):
        call(cache=made.cache._replace(v_pages=jnp.zeros((11, 3, 8, 8))))
    with pytest.raises(TypeError, match="not float16"):
        call(
            cache=made.cache._replace(
                k_pages=jnp.zeros((11, 2, 8, 8), jnp.float16), v_pages=jnp.zeros((11, 2, 8, 8), jnp.float16)
            )
        )
    with pytest.raises(TypeError, match="pages of 'fp8' are not known"):
        init_cache(4, 2, 8, dtype="fp8")
    with pytest.raises(ValueError, match="their number, 7, must be even"):
        init_cache(4, 2, 7, dtype="int4")
    with pytest.raises(ValueError, match=r"append_kv: k is .* takes \[b, t, 2, 8\] with b 2"):
        append_kv(made.cache, jnp.zeros((2, 1, 3, 8)), jnp.zeros((2, 1, 3, 8)), made.table, made.lengths)
    with pytest.raises(Unsupported, match="'mosaic_tpu' cannot serve this call: it needs a TPU"):
        call(implementation="mosaic_tpu")
    with (
        compiling_for(Chip("tpu", "v5e")),
        pytest.raises(
            Unsupported,
            match="'mosaic_tpu' cannot serve this call: pages have 8 tokens; it needs a multiple of 128",
        ),
    ):
        call(implementation="mosaic_tpu")


def test_heads_cut_over_devices_equal_one():
    made, q = paged((20, 32), kind="int8"), queries(2, 1, 4, 8)
    mesh = jax.make_mesh((2,), ("tensor",))
    heads, whole = jax.P(None, "tensor"), jax.P()
    cut = jax.shard_map(
        lambda q, cache, table, lengths: paged_attention(q, cache, table, lengths, splits=2),
        mesh=mesh, in_specs=(heads, heads, whole, whole), out_specs=heads,
    )  # fmt: skip
    arrays = (q[:, 0], made.cache, jnp.asarray(made.table), jnp.asarray(made.lengths))
    placed = (
        jax.device_put(a, jax.NamedSharding(mesh, spec))
        for a, spec in zip(arrays, (heads, heads, whole, whole))
    )
    np.testing.assert_array_equal(jax.jit(cut)(*placed), run(*arrays, splits=2))
    with pytest.raises(Unsupported, match=r"lie on a mesh; call it inside jax.shard_map"):
        paged_attention(jax.device_put(arrays[0], jax.NamedSharding(mesh, heads)), *arrays[1:])
