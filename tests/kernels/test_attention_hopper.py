"""Attention for Hopper: numbers and races in the GPU interpreter, machine code from the real compiler."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kernel_registers import kernel_resources
from benchmarks.kernel_shapes import MASKS, MODELS, attention_of
from maxstack.kernels.attention import attention, mosaic_gpu, mosaic_gpu_spans
from maxstack.kernels.attention.masks import Coordinates, Options
from maxstack.kernels.attention.mosaic_gpu_tile import Blocks
from maxstack.kernels.dispatch import CPU, Chip, compiling_for
from tests.kernels.chips import HOPPER, needs_cuda_compiler
from tests.kernels.hopper_interpreter import interpreted, races_in

# Weights are rounded to bfloat16 (2^-9) before the second product, as are their gradients and the results.
CLOSE = 8e-3
LSE_CLOSE = 1e-5
"""Of logits of size 1: products of bfloat16 summed in float32."""
NOWHERE = Coordinates(None, None, None, None)


def sees(t, s, segments, positions, causal, window):
    """[b, t, s] from the definition: what the docstring of the public function says."""
    b = 1 if segments is None and positions is None else len((segments or positions)[0])
    seen = np.zeros((b, t, s), bool)
    for row, i, j in itertools.product(range(b), range(t), range(s)):
        at_q, at_kv = (i, j) if positions is None else (positions[0][row, i], positions[1][row, j])
        visible = not causal or at_kv <= at_q
        visible &= window is None or at_q - at_kv < window
        if segments is not None:
            visible &= segments[0][row, i] == segments[1][row, j] and segments[1][row, j] > 0
        seen[row, i, j] = visible
    return seen


def brute_force(q, k, v, dout, dlse, seen, softcap, sinks):
    """out, lse and the gradients of q, k, v, sinks for cotangents of out and lse; float64."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    repeats = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5
    wide_k, wide_v = np.repeat(k, repeats, 2), np.repeat(v, repeats, 2)
    logits = np.einsum("btnh,bsnh->bnts", q, wide_k) * scale
    slope = 1.0
    if softcap is not None:
        slope = 1 - np.tanh(logits / softcap) ** 2
        logits = softcap * np.tanh(logits / softcap)
    logits = np.where(seen[:, None], logits, -np.inf)
    terms = logits
    if sinks is not None:
        column = np.broadcast_to(np.asarray(sinks, np.float64)[None, :, None, None], (*logits.shape[:3], 1))
        terms = np.concatenate([logits, column], -1)
    with np.errstate(divide="ignore"):
        top = np.maximum(terms.max(-1), -1e300)
        lse = top + np.log(np.exp(terms - top[..., None]).sum(-1))
    weights = np.exp(logits - np.where(np.isfinite(lse), lse, np.inf)[..., None])
    out = np.einsum("bnts,bsnw->btnw", weights, wide_v)
    dweights = np.einsum("btnw,bsnw->bnts", dout, wide_v)
    delta = (dout * out).sum(-1).swapaxes(1, 2) - dlse.swapaxes(1, 2)
    dlogits = weights * (dweights - delta[..., None]) * slope * scale
    dq = np.einsum("bnts,bsnh->btnh", dlogits, wide_k)
    shared = (*k.shape[:3], repeats, -1)
    dk = np.einsum("bnts,btnh->bsnh", dlogits, q).reshape(shared).sum(3)
    dv = np.einsum("bnts,btnw->bsnw", weights, dout).reshape(shared).sum(3)
    dsinks = None if sinks is None else -(np.exp(terms[..., -1] - lse) * delta).sum((0, 2))
    return out, lse.swapaxes(1, 2), dq, dk, dv, dsinks


def packed_ids(random, b, length, documents):
    """Rows of documents one after another, and padding, 0, at the end."""
    return np.sort(random.integers(1, documents + 1, (b, length)), 1) * (np.arange(length) < 0.9 * length)


def compare(
    b, t, s, n, k, h, w, *, causal=True, window=None, softcap=None, packed=False, scattered=False, positioned=False,
    sunk=False, dtype=jnp.bfloat16, backward=True, **sizes,
):  # fmt: skip
    """Runs the kernels in the interpreter, with races detected, and compares with `brute_force`."""
    random = np.random.default_rng(0)
    q, keys, v, dout = (
        jnp.asarray(random.normal(size=shape), dtype)
        for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, w), (b, t, n, w))
    )
    segments = positions = sinks = None
    if packed:
        segments = (packed_ids(random, b, t, 3), packed_ids(random, b, s, 3))
    if scattered:
        segments = (random.integers(0, 3, (b, t)), random.integers(0, 3, (b, s)))
    if positioned:
        positions = (random.integers(0, s, (b, t)), random.integers(0, s, (b, s)))
    if sunk:
        sinks = jnp.asarray(random.normal(size=n), jnp.float32)
    seen = np.broadcast_to(sees(t, s, segments, positions, causal, window), (b, t, s))
    at = Coordinates(*(segments or (None, None)), *(positions or (None, None)))
    at = Coordinates(*(None if x is None else jnp.asarray(x, jnp.int32) for x in at))
    # A query that sees nothing has lse -inf, of which nobody takes a gradient.
    some = seen.any(-1)[..., None] | sunk
    dlse = jnp.asarray(random.normal(size=(b, t, n)) * some, jnp.float32)
    options = Options(causal=causal, window=window, softcap=softcap, scale=h**-0.5)
    blocks = dataclasses.replace(Blocks.of(h, w, softcap, packed), through_shared=True, **sizes)

    @jax.jit
    def run(q, keys, v, sinks, dout, dlse, at):
        def attend(q, keys, v, sinks):
            return mosaic_gpu.attention(options, blocks, None, q, keys, v, sinks, at)

        if not backward:
            return attend(q, keys, v, sinks)
        outputs, pull = jax.vjp(attend, q, keys, v, sinks)
        return (*outputs, *pull((dout, dlse)))

    # Beyond the end of an array TMA gives zeros.
    beyond = {"out_of_bounds_reads": "uninitialized", "uninitialized_memory": "zero"}
    whole = t % 128 == 0 and s % 128 == 0
    with interpreted(**({} if whole else beyond)) as reports:
        got = jax.block_until_ready(run(q, keys, v, sinks, dout, dlse, at))
    assert len(reports) == (3 if backward else 1)
    assert not races_in(reports)
    wanted = brute_force(q, keys, v, dout, dlse, seen, softcap, sinks)
    assert np.array_equal(np.isfinite(got[1]), np.isfinite(wanted[1]))
    finite = np.isfinite(wanted[1])
    np.testing.assert_allclose(np.asarray(got[1])[finite], wanted[1][finite], atol=LSE_CLOSE * (softcap or 1))
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    for name, ours, theirs in zip(names, got, wanted, strict=False):
        if name != "lse" and theirs is not None:
            ours = np.asarray(ours, np.float64)
            error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            assert error < CLOSE, f"{name}: {error:.2e} of its norm"
            assert np.isfinite(ours).all(), name
    hidden = ~some[..., 0]
    assert (np.asarray(got[0], np.float32)[hidden] == 0).all()
    if backward:
        assert (np.asarray(got[2], np.float32)[hidden] == 0).all()


def test_packed_rows_window_cap_and_sinks_with_gradients():
    compare(1, 136, 136, 2, 1, 64, 64, packed=True, window=70, softcap=3.0, sunk=True, forward_key=64)


@pytest.mark.slow
def test_causal_without_ids_blocks_that_need_no_mask_and_split_sums():
    compare(1, 256, 256, 1, 1, 64, 64, forward_key=64, split_dkv=True)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(192, 128), (256, 256), (96, 96), (128, 128)])
def test_head_sizes(sizes):
    compare(1, 128, 128, 1, 1, *sizes)


@pytest.mark.slow
def test_packed_heads_of_256():
    compare(1, 128, 128, 1, 1, 256, 256, packed=True)


@pytest.mark.slow
def test_any_ids_and_positions():
    compare(2, 200, 136, 4, 2, 64, 64, scattered=True, positioned=True, window=90, forward_key=64)


@pytest.mark.slow
def test_not_causal_float16():
    compare(1, 136, 264, 2, 1, 64, 64, causal=False, dtype=jnp.float16, softcap=2.0)


def mesh_case(rows: int):
    """(mesh, q, k, v, dout, sinks, ids) of `rows` rows and two kv heads, cut over as many devices."""
    random = np.random.default_rng(0)
    mesh = jax.make_mesh((rows, 2), ("data", "tensor"), devices=jax.devices()[: 2 * rows])
    heads = jax.NamedSharding(mesh, jax.P("data", None, "tensor", None))
    arrays = [
        jax.device_put(jnp.asarray(random.normal(size=(rows, 128, n, 64)), jnp.bfloat16), heads)
        for n in (4, 2, 2, 4)
    ]
    sinks = jax.device_put(
        jnp.asarray(random.normal(size=4), jnp.float32), jax.NamedSharding(mesh, jax.P("tensor"))
    )
    ids = jax.device_put(
        jnp.asarray(packed_ids(random, rows, 128, 3), jnp.int32), jax.NamedSharding(mesh, jax.P("data", None))
    )
    return mesh, *arrays, sinks, ids


def mesh_gradients(dout, ids, config):
    def loss(q, k, v, sinks):
        out = attention(
            q, k, v, sinks=sinks, segment_ids=ids, implementation="mosaic_gpu", config=config
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32) * dout)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_on_a_mesh_equal_float64_formulas_without_races(rows):
    mesh, q, k, v, dout, sinks, ids = mesh_case(rows)
    config = dataclasses.replace(Blocks.of(64, 64), through_shared=True)
    with jax.set_mesh(mesh), compiling_for(HOPPER), interpreted() as reports:
        found = jax.device_get(mesh_gradients(dout, ids, config)(q, k, v, sinks))
    assert not races_in(reports)
    host_ids = np.asarray(ids)
    seen = sees(128, 128, (host_ids, host_ids), None, True, None)
    q, k, v, dout = jax.device_get((q, k, v, dout))
    wanted = brute_force(q, k, v, dout, np.zeros((rows, 128, 4)), seen, None, sinks)[2:]
    for name, ours, theirs in zip(("dq", "dk", "dv", "dsinks"), found, wanted, strict=True):
        theirs = np.asarray(theirs)
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < CLOSE, f"{name}: {error:.2e} of its norm"


def test_on_a_mesh_each_device_runs_the_kernels_and_nothing_is_summed_but_the_gradient_of_sinks():
    mesh, q, k, v, dout, sinks, ids = mesh_case(4)
    with jax.set_mesh(mesh), compiling_for(HOPPER):
        text = (
            mesh_gradients(dout, ids, None)
            .trace(q, k, v, sinks)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    assert all(f"attention_{name}" in text for name in ("forward", "dq", "dkv"))
    assert text.count("stablehlo.all_reduce") == 1


@pytest.mark.parametrize("seed", range(3))
def test_spans_hold_every_visible_pair_and_whole_blocks_only_visible_ones(seed):
    random = np.random.default_rng(seed)
    t, s, q_block, kv_block, together = 21, 30, 2, 4, 2
    for causal, window, packed, scattered, positioned in itertools.product(
        (True, False), (None, 5), *[(0, 1)] * 3
    ):
        segments = positions = None
        if packed:
            segments = (packed_ids(random, 2, t, 4), packed_ids(random, 2, s, 4))
        if scattered:
            segments = (random.integers(0, 3, (2, t)), random.integers(0, 3, (2, s)))
        if positioned:
            positions = (random.integers(0, s, (2, t)), random.integers(0, s, (2, s)))
        seen = sees(t, s, segments, positions, causal, window)
        at = Coordinates(*(segments or (None, None)), *(positions or (None, None)))
        at = Coordinates(*(None if x is None else jnp.asarray(x) for x in at))
        options = Options(causal=causal, window=window, softcap=None, scale=1.0)
        pairs = mosaic_gpu_spans.pairs(at, options, t, s, q_block, kv_block)
        spans = np.asarray(mosaic_gpu_spans.spans(pairs, together))
        tight = not (packed or scattered or positioned)
        for row, group, member in itertools.product(
            range(len(spans)), range(spans.shape[1]), range(together)
        ):
            first, whole, whole_end, last = spans[row, group, member]
            queries = slice((group * together + member) * q_block, (group * together + member + 1) * q_block)
            by_block = [seen[row, queries, x : x + kv_block] for x in range(0, s, kv_block)]
            inside = [first <= x < last for x in range(len(by_block))]
            assert not any(block.any() for block, at in zip(by_block, inside, strict=True) if not at)
            for x in range(max(first, whole), min(whole_end, last)):
                assert by_block[x].all()
                assert by_block[x].shape[1] == kv_block
            if tight:
                assert all(block.any() for block, at in zip(by_block, inside, strict=True) if at)
            union = spans[row, group, together]
            assert union[mosaic_gpu_spans.FIRST] <= first <= last <= union[mosaic_gpu_spans.LAST]


def test_what_it_declines_and_why():
    def arrays(t=128, h=64, w=64, dtype=jnp.bfloat16):
        return [jax.ShapeDtypeStruct((1, t, 2, size), dtype) for size in (h, h, w)]

    options = Options(causal=True, window=None, softcap=None, scale=0.125)

    def reason(call, options=options, config=None):
        q, k, v = call
        return mosaic_gpu.declined(q, k, v, options, NOWHERE, config) or ""

    for chip, call, why in (
        (CPU, arrays(), "needs a GPU, and this is a cpu"),
        (Chip("gpu", "sm80"), arrays(), "sm80: wgmma and TMA need Hopper"),
        (Chip("gpu", "sm100"), arrays(), "sm100: wgmma and TMA need Hopper"),
        (HOPPER, arrays(dtype=jnp.float32), "float32: wgmma multiplies bfloat16 and float16"),
        (HOPPER, arrays(h=80, w=80), "head size 80/80 is not one of 64, 96, 128, 192/128, 256"),
        (HOPPER, arrays(t=1), "1 queries: a tile is 64 rows"),
    ):
        with compiling_for(chip):
            assert why in reason(call)
    with compiling_for(HOPPER):
        assert reason(arrays()) == ""
        assert "must be positive" in reason(arrays(), dataclasses.replace(options, scale=-1.0))
        assert "config is str" in reason(arrays(), config="blocks of another")


def check_compiled(model, mask):
    function, arguments = attention_of(model, 8192, mask=mask)
    rows = kernel_resources(function, *arguments)
    # The compiler takes them in any order.
    assert sorted(row["kernel"] for row in rows) == ["attention_dkv", "attention_dq", "attention_forward"]
    for row in rows:
        assert row["spilled"] == 0, row
        assert not row["serialized"], row
        assert row["shared"] <= 227 * 1024, row


@needs_cuda_compiler
@pytest.mark.slow
@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("mask", list(MASKS))
def test_hopper_code_spills_nothing_for_any_training_shape(model, mask):
    check_compiled(model, mask)
