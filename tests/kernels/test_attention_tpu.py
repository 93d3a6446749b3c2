"""Attention in Mosaic TPU kernels: against float64 in the interpreter, and compiled for chips that are not here."""

import contextlib
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from maxstack.kernels import Unsupported, dispatch
from maxstack.kernels.attention import attention, mosaic_tpu_backward, mosaic_tpu_forward, mosaic_tpu_tiling
from maxstack.kernels.attention.blocks import Blocks
from maxstack.kernels.attention.masks import Coordinates, Options, visible
from maxstack.kernels.attention.mosaic_tpu import DEFAULT, TpuBlocks
from maxstack.kernels.attention.mosaic_tpu_tiling import LANES, Scalars, tile
from maxstack.kernels.dispatch import Chip, chip_of, compiling_for
from tests.kernels.chips import TPUS, as_users_compile, compiled_for, device_of, needs_libtpu, shapes

SMALL = TpuBlocks(rows=128, key=128, chunk=128, backward_rows=128, backward_key=128, backward_chunk=128)
# Two chunks a block, all heads of a kv head in a block of rows, and a kernel of its own for dq.
PAIRS = TpuBlocks(
    rows=256, key=256, chunk=128, backward_rows=256, backward_key=256, backward_chunk=128, dq_mib=0
)
# Float32 against float64: roundings of sums of some hundred terms of size 1. The interpreter's products are exact ones.
CLOSE = 2e-5
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def on_paper(q, k, v, sinks, mask, scale, softcap, dout, dlse):
    """out, lse and the gradients of Σ dout·out + Σ dlse·lse, in float64, from the formulas; mask is [b, t, s]."""
    b, t, n, _ = q.shape
    g = n // k.shape[2]
    kk, vv = (np.repeat(a, g, axis=2) for a in (k, v))
    raw = np.einsum("btnh,bsnh->bnts", q, kk) * scale
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    logits = np.where(mask[:, None], logits, -np.inf)
    sink = (
        np.full((b, n, t, 1), -np.inf)
        if sinks is None
        else np.broadcast_to(sinks[:, None, None], (b, n, t, 1))
    )
    lse = np.logaddexp.reduce(np.concatenate([logits, sink], -1), axis=-1)
    kept = np.where(np.isfinite(lse), lse, 0.0)
    weights = np.exp(logits - kept[..., None])
    out = np.einsum("bnts,bsnw->btnw", weights, vv)
    dlse = np.where(np.isfinite(lse), np.swapaxes(dlse, 1, 2), 0.0)
    delta = np.swapaxes((dout * out).sum(-1), 1, 2) - dlse
    dlogits = weights * (np.einsum("btnw,bsnw->bnts", dout, vv) - delta[..., None])
    if softcap is not None:
        dlogits = dlogits * (1 - np.tanh(raw / softcap) ** 2)
    dq = np.einsum("bnts,bsnh->btnh", dlogits, kk) * scale
    dk = np.einsum("bnts,btnh->bsnh", dlogits, q) * scale
    dv = np.einsum("bnts,btnw->bsnw", weights, dout)
    dk, dv = (a.reshape(*a.shape[:2], -1, g, a.shape[3]).sum(3) for a in (dk, dv))
    found = [out, np.swapaxes(lse, 1, 2), dq, dk, dv]
    return found if sinks is None else [*found, -(np.exp(sink[..., 0] - kept) * delta).sum((0, 2))]


def brute_mask(b, t, s, segments, positions, causal, window):
    """Every pair, by the definition."""
    mask = np.ones((b, t, s), bool)
    for row, i, j in itertools.product(range(b), range(t), range(s)):
        distance = i - j if positions is None else positions[0][row, i] - positions[1][row, j]
        hidden = (causal and distance < 0) or (window is not None and distance >= window)
        if segments is not None:
            hidden = hidden or segments[0][row, i] != segments[1][row, j] or segments[1][row, j] == 0
        mask[row, i, j] = not hidden
    return mask


class Case:
    """One call with random inputs, and what comes of it."""

    def __init__(
        self, *, b=1, t=150, s=None, n=2, k=1, h=16, w=16, packed=False, placed=False, sunk=False, seed=0, **options
    ):  # fmt: skip
        s = t if s is None else s
        random = np.random.default_rng(seed)
        sizes = ((b, t, n, h), (b, s, k, h), (b, s, k, w))
        self.q, self.k, self.v = (random.normal(size=size) for size in sizes)
        self.dout, self.dlse = random.normal(size=(b, t, n, w)), random.normal(size=(b, t, n))
        self.sinks = random.normal(size=n) if sunk else None
        self.segments = self.positions = None
        if packed:  # 0 is padding; queries of segment 3 find no key
            ids = random.integers(0, 4, (b, t)), random.integers(0, 3, (b, s))
            self.segments = tuple(np.sort(part) for part in ids)
        if placed:
            shuffled = random.permuted(np.tile(np.arange(s), (b, 1)), axis=1)
            self.positions = np.sort(random.integers(0, s, (b, t))), shuffled
        self.options = {"causal": True, "window": None, "softcap": None, "scale": h**-0.5} | options

    def wanted(self):
        o = self.options
        (b, t), s = self.q.shape[:2], self.k.shape[1]
        mask = brute_mask(b, t, s, self.segments, self.positions, o["causal"], o["window"])
        arrays = (self.q, self.k, self.v, self.sinks, mask)
        return on_paper(*arrays, o["scale"], o["softcap"], self.dout, self.dlse)

    def found(self, config=SMALL, dtype=jnp.float32):
        """By the kernels, in the interpreter: memory is NaN until written, copies happen when waited for."""
        ids = {
            name: None if pair is None else tuple(jnp.asarray(ids, jnp.int32) for ids in pair)
            for name, pair in (("segment_ids", self.segments), ("positions", self.positions))
        }
        q, k, v = (jnp.asarray(a, dtype) for a in (self.q, self.k, self.v))
        sinks = None if self.sinks is None else jnp.asarray(self.sinks, jnp.float32)

        def run(q, k, v, sinks):
            return attention(
                q,
                k,
                v,
                sinks=sinks,
                return_lse=True,
                implementation="mosaic_tpu",
                config=config,
                **ids,
                **self.options,
            )

        @jax.jit
        def both(*arrays):
            (out, lse), pull = jax.vjp(run, *arrays)
            return out, lse, *pull((jnp.asarray(self.dout, out.dtype), jnp.asarray(self.dlse, lse.dtype)))

        with interpreted():
            return [np.asarray(a, np.float64) for a in jax.device_get(both(q, k, v, sinks)) if a is not None]

    def check(self, config=SMALL, dtype=jnp.float32, close=CLOSE):
        found, wanted = self.found(config, dtype), self.wanted()
        assert not races()
        for name, one, other in zip(NAMES, found, wanted, strict=False):
            np.testing.assert_allclose(one, other, rtol=close, atol=close, err_msg=name)
        assert len(found) == len(wanted)


@contextlib.contextmanager
def interpreted():
    params = pltpu.InterpretParams(
        dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan"
    )
    with compiling_for(Chip("tpu", "v5e")), pltpu.force_tpu_interpret_mode(params):
        yield


def races() -> bool:
    """Whether the last interpreted kernel had one."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


def test_the_formulas_agree_with_finite_differences():
    case = Case(t=5, s=6, n=2, k=1, h=3, w=4, packed=True, sunk=True, softcap=1.5, window=3, seed=3)
    wanted = case.wanted()

    def loss():
        out, lse = case.wanted()[:2]
        return (case.dout * out).sum() + (case.dlse * np.where(np.isfinite(lse), lse, 0)).sum()

    for array, gradient in zip((case.q, case.k, case.v, case.sinks), wanted[2:], strict=True):
        for index in (0, array.size // 2, array.size - 1):
            value = array.flat[index]
            sides = []
            for step in (1e-5, -1e-5):
                array.flat[index] = value + step
                sides.append(loss())
            array.flat[index] = value
            np.testing.assert_allclose(
                (sides[0] - sides[1]) / 2e-5, gradient.flat[index], rtol=1e-6, atol=1e-8
            )


CASES = {
    "all options, length no multiple of the block": Case(packed=True, sunk=True, window=40, softcap=2.0),
    "two heads a block and positions out of order": Case(t=100, s=300, placed=True, packed=True),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_float64_formulas(name):
    CASES[name].check(PAIRS if "two heads" in name else SMALL)


def test_bfloat16_is_rounded_between_products_only():
    # The weights, 8 bits of mantissa, of some ten keys; the inputs are the same rounded numbers.
    case = Case(t=128, h=8, w=8, n=1, causal=False)
    for name in ("q", "k", "v", "dout"):
        setattr(case, name, np.asarray(jnp.asarray(getattr(case, name), jnp.bfloat16), np.float64))
    case.check(dtype=jnp.bfloat16, close=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 4])
def test_gradients_on_a_mesh_equal_float64_formulas(rows):
    case = Case(b=rows, t=130, n=4, k=2, h=8, w=8, sunk=True, packed=True)
    mesh = jax.make_mesh((rows, 2), ("data", "tensor"), devices=jax.devices()[: 2 * rows])
    heads, ids = (
        jax.NamedSharding(mesh, jax.P("data", None, "tensor", None)),
        jax.NamedSharding(mesh, jax.P("data")),
    )
    with jax.set_mesh(mesh):
        arrays = [
            jax.device_put(jnp.asarray(a, jnp.float32), heads) for a in (case.q, case.k, case.v, case.dout)
        ]
        segments = tuple(jax.device_put(jnp.asarray(part, jnp.int32), ids) for part in case.segments or ())
        sinks = jax.device_put(jnp.asarray(case.sinks, jnp.float32), jax.NamedSharding(mesh, jax.P("tensor")))

        def loss(q, k, v, sinks, dout):
            out = attention(
                q, k, v, sinks=sinks, segment_ids=segments, implementation="mosaic_tpu", config=SMALL
            )
            return jnp.sum(out * dout)

        with interpreted():
            found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays[:3], sinks, arrays[3])
            found = jax.device_get(found)
    case.dlse[:] = 0
    assert not races()
    for name, one, other in zip(NAMES[2:], found, case.wanted()[2:], strict=True):
        np.testing.assert_allclose(one, other, rtol=CLOSE, atol=CLOSE, err_msg=name)


PAIRWISE = [
    dict(zip(("causal", "window", "softcap", "packed", "placed", "sunk"), values, strict=True))
    for values in (
        (False, None, None, False, False, True), (False, 60, 2.0, True, True, False),
        (True, None, 2.0, True, False, False), (True, 60, None, False, True, True),
        (False, 60, None, True, False, True), (True, None, None, False, False, False),
        (False, None, 2.0, False, True, False), (True, 60, 2.0, False, False, True),
    )
]  # fmt: skip


def test_the_sweep_has_all_pairs_of_options():
    for one, other in itertools.combinations(PAIRWISE[0], 2):
        held = {(bool(o[one]), bool(o[other])) for o in PAIRWISE}
        assert len(held) == 4, f"{one} and {other}: {held}"


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, PAIRS], ids=["small", "pairs"])
@pytest.mark.parametrize("options", PAIRWISE, ids=str)
def test_all_pairs_of_options_equal_float64_formulas(options, config):
    Case(b=2, t=200, s=200, n=4, k=2, h=24, w=16, **options).check(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "k", "t", "s"), [(6, 2, 40, 300), (3, 3, 300, 90), (8, 1, 1, 129), (32, 1, 17, 128)]
)
def test_odd_counts_of_heads_and_lengths_equal_float64_formulas(n, k, t, s):
    Case(t=t, s=s, n=n, k=k, h=16, w=32, causal=False, packed=True).check(PAIRS)


class NeverClears:
    """`jax.numpy`, in which new memory is not zero."""

    zeros_like = staticmethod(lambda ref: jnp.full(ref.shape, 3.0, ref.dtype))

    def __getattr__(self, name):
        return getattr(jnp, name)


def faults():
    """Each breaks one thing in the kernels."""
    kept = mosaic_tpu_tiling._ranges

    def one_block_short(options, tiling, q, kv, own):
        first, count = kept(options, tiling, q, kv, own)
        return first, count - (count > 1)

    def one_block_late(options, tiling, q, kv, own):
        first, count = kept(options, tiling, q, kv, own)
        return first + (count > 1), count - (count > 1)

    swapped = mosaic_tpu_backward._weights

    def swapped_lse(options, q, dout, lse_delta_ref, k, v, mask):
        return swapped(options, q, dout, lse_delta_ref[...][::-1], k, v, mask)

    return {
        "a block bound is one too low": (mosaic_tpu_tiling, "_ranges", one_block_short),
        "a block bound is one too high": (mosaic_tpu_tiling, "_ranges", one_block_late),
        "lse and delta are swapped": (mosaic_tpu_backward, "_weights", swapped_lse),
        "a partial block has no mask": (Scalars, "needs_mask", lambda *_: False),
        "a sum is not cleared": (mosaic_tpu_backward, "jnp", NeverClears()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(faults()))
def test_planted_faults_are_found(fault, monkeypatch):
    case = Case(t=300, s=300, h=8, w=8, n=1)
    wanted = case.wanted()
    monkeypatch.setattr(*faults()[fault])
    found = case.found()
    monkeypatch.undo()
    same = [np.allclose(one, other, rtol=CLOSE, atol=CLOSE) for one, other in zip(found, wanted, strict=True)]
    assert not all(same)


# Ranges and masks, without a kernel.


def random_ids(random, b, size, most):
    return jnp.asarray(np.sort(random.integers(0, most, (b, size))), jnp.int32)


@pytest.mark.parametrize("own", ["query", "key"])
@pytest.mark.parametrize("seed", range(6))
def test_ranges_leave_out_no_visible_pair_and_masks_are_left_out_only_where_all_is_visible(seed, own):
    random = np.random.default_rng(seed)
    b, t, s = 2, int(random.integers(1, 600)), int(random.integers(1, 600))
    options = Options(causal=bool(seed % 2), window=[None, 1, 200][seed % 3], softcap=None, scale=1.0)
    at = Coordinates(None, None, None, None)
    if seed % 3 != 0:
        at = at._replace(q_segments=random_ids(random, b, t, 4), kv_segments=random_ids(random, b, s, 4))
    if seed % 4 == 3:
        at = at._replace(q_positions=random_ids(random, b, t, s), kv_positions=random_ids(random, b, s, s))
    tiling = tile(t, s, 2, rows=256, key=256, chunk=128)
    scalars = Scalars(options, tiling, at, own)
    ref = np.asarray(scalars.array)
    mask = visible(at, options, t, s)
    mask = np.broadcast_to(np.ones((1, t, s), bool) if mask is None else np.asarray(mask), (b, t, s))
    for row, i, chunk in itertools.product(range(b), range(tiling.q_blocks), range(tiling.all_chunks)):
        j = chunk // tiling.chunks
        mine, other = (i, j) if own == "query" else (j, i)
        first, count = (scalars.read(ref, name, row, mine) for name in ("first", "count"))
        part = mask[
            row, i * tiling.query : (i + 1) * tiling.query, chunk * tiling.chunk : (chunk + 1) * tiling.chunk
        ]
        assert count <= scalars.width
        if part.any():
            assert first <= other < first + count, "a visible pair is outside of the range"
            assert scalars.has_work(ref, row, i, chunk)
        if not part.all() or part.shape[1] < tiling.chunk:
            assert scalars.needs_mask(ref, row, i, chunk)


def test_steps_without_work_fetch_nothing_and_what_comes_next_is_fetched_early():
    options, none = (
        Options(causal=True, window=None, softcap=None, scale=1.0),
        Coordinates(None, None, None, None),
    )
    tiling = tile(1024, 1024, 1, rows=128, key=128, chunk=128)
    scalars = Scalars(options, tiling, none, "query")
    ref = np.asarray(scalars.array)
    fetched = [
        int(mosaic_tpu_forward.by_queries(scalars, 0, 0, i, step, ref).j)
        for i in range(tiling.q_blocks)
        for step in range(scalars.width)
    ]
    copies = 1 + sum(one != other for one, other in itertools.pairwise(fetched))
    assert len(fetched) == 64
    assert copies <= sum(range(1, 9)), "as many blocks as are visible; repeated ones are not fetched again"


def test_a_window_takes_as_many_steps_as_it_spans_blocks():
    none = Coordinates(None, None, None, None)
    tiling = tile(8192, 8192, 1, rows=256, key=256, chunk=128)
    options = Options(causal=True, window=256, softcap=None, scale=1.0)
    assert [Scalars(options, tiling, none, own).width for own in ("query", "key")] == [2, 2]


@pytest.mark.parametrize("g", [1, 2, 3, 5, 6, 7, 8, 12, 16, 32, 71])
@pytest.mark.parametrize("t", [1, 7, 130, 5000])
def test_rows_and_chunks_fill_whole_registers(g, t):
    for rows in (128, 512, 1024):
        tiling = tile(t, t, g, rows=rows, key=1024, chunk=512)
        assert tiling.rows % LANES == 0
        assert tiling.chunk % LANES == 0
        assert tiling.heads * tiling.parts == g
        assert tiling.rows <= max(rows, LANES)
        assert tiling.q_blocks * tiling.query >= t


# The choice.


def test_auto_takes_the_kernels_on_a_tpu_and_says_why_not(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
    said = []
    monkeypatch.setattr(dispatch.log, "log", lambda level, form, *parts: said.append((level, form % parts)))

    def traced(q, **options):
        return str(jax.make_jaxpr(lambda q: attention(q, q, q, **options))(q))

    with compiling_for(Chip("tpu", "v6e")):
        assert "pallas_call" in traced(q)
        big = jax.ShapeDtypeStruct((1, 256, 4, 320), jnp.bfloat16)
        for _ in range(2):
            assert "pallas_call" not in traced(big)
        with pytest.raises(Unsupported, match="head size 320 is above 256"):
            traced(big, implementation="mosaic_tpu")
        with pytest.raises(Unsupported, match="it takes bfloat16 or float32, and q is float16"):
            traced(jax.ShapeDtypeStruct(q.shape, jnp.float16), implementation="mosaic_tpu")
        with pytest.raises(Unsupported, match=r"TpuBlocks, and config is Blocks"):
            traced(q, implementation="mosaic_tpu", config=Blocks())
        assert "pallas_call" not in traced(q, config=Blocks())
        ids, long = jnp.ones((512, 65536), jnp.int32), jax.ShapeDtypeStruct((512, 65536, 1, 64), jnp.bfloat16)
        with pytest.raises(Unsupported, match="numbers, and scalar memory holds"):
            traced(long, implementation="mosaic_tpu", segment_ids=ids)
    assert [level for level, _ in said] == [logging.INFO] * len(said)
    assert sum("head size 320" in text for _, text in said) == 1
    assert "attention on v6e: mosaic_tpu" in said[0][1]
    with pytest.raises(Unsupported, match="it needs a TPU, and this is a cpu"):
        traced(q, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match=r"chunk is 100 positions; it must be a multiple of 128"):
        TpuBlocks(chunk=100)


# Machine code.

MODELS = {  # query heads, kv heads, head size of q and k, of v
    "1B": (16, 8, 64, 64), "8B": (32, 8, 128, 128), "70B": (64, 8, 128, 128), "MLA": (16, 16, 192, 128),
    "96": (32, 32, 96, 96), "256": (16, 8, 256, 256),
}  # fmt: skip


def compiled(chip, model, t, *, packed=False, dtype=jnp.bfloat16, **options):
    """Forward and backward of one row of `t` tokens."""
    n, k, h, w = MODELS[model]

    def both(q, k, v, dout, *segments):
        run = lambda q, k, v: attention(  # noqa: E731
            q, k, v, implementation="mosaic_tpu", segment_ids=segments[0] if packed else None, **options
        )
        out, pull = jax.vjp(run, q, k, v)
        return out, pull(dout)

    arrays = [((1, t, n, h), dtype), ((1, t, k, h), dtype), ((1, t, k, w), dtype), ((1, t, n, w), dtype)]
    return compiled_for(chip, both, *shapes(*arrays, *([((1, t), jnp.int32)] if packed else [])))


def kernels_in(program) -> int:
    return (program.as_text() or "").count('custom_call_target="tpu_custom_call"')


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "model", "t", "kernels"),
    [
        pytest.param("v5e", "1B", 2048, 2, marks=pytest.mark.slow),
        pytest.param("v6e", "MLA", 2048, 2, marks=pytest.mark.slow),
        pytest.param("v7x", "70B", 8192, 3, marks=pytest.mark.slow),
    ],
)
def test_forward_and_backward_compile(chip, model, t, kernels):
    # dq of the 70B shape is too long for the chip's memory: a third kernel makes it.
    assert kernels_in(compiled(chip, model, t, packed=True)) == kernels


@needs_libtpu
@pytest.mark.slow
def test_the_default_blocks_fit_the_smallest_memory():
    program = compiled("v5e", "256", 1000, dtype=jnp.float32, config=DEFAULT, softcap=50.0, window=300)
    assert kernels_in(program) == 3


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("t", [2048, 8192, 5000])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chip", TPUS)
def test_every_model_compiles_for_every_chip(chip, model, t):
    assert kernels_in(compiled(chip, model, t)) >= 2
    assert (
        kernels_in(compiled(chip, model, t, packed=True, dtype=jnp.float32, softcap=30.0, window=1024)) >= 2
    )


@needs_libtpu
@pytest.mark.parametrize(
    "chip", ["v5e", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5p", "v6e", "v7x"))]
)
def test_a_whole_training_step_on_four_chips_has_the_kernels_inside(chip):
    from maxstack import sharding
    from maxstack.models import llama
    from maxstack.optim import OptimConfig
    from maxstack.sharding import MeshConfig
    from maxstack.train import state as states
    from maxstack.train.losses import pretrain
    from maxstack.train.step import SafetyConfig, abstract_batch, train_step
    from maxstack.train.step import compiled as compiled_step

    mesh_config = MeshConfig(fsdp=2, tensor=2)
    first = device_of(chip)
    mesh = sharding.build_mesh(mesh_config, list(first.client.devices())[:4])
    model = llama(
        vocab_size=512,
        width=256,
        depth=2,
        heads=4,
        kv_heads=2,
        head_size=64,
        feed_forward=512,
        max_length=512,
    )
    optim = OptimConfig()
    plan = states.layout(model, optim, mesh, zero=mesh_config.zero, steps=10)
    step = train_step(plan, pretrain, optim, SafetyConfig(), 0.0, 10)
    with compiling_for(chip_of(first)), as_users_compile():
        program = compiled_step(plan, step, abstract_batch(plan, 1, 4, 512), plan.abstract(model))
    text = program.as_text() or ""
    for name in ("attention_forward", "attention_backward"):
        assert name in text
    assert kernels_in(program) >= 2
