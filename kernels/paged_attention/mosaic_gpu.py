"""Attention over pages for Hopper: one warpgroup for each piece of work (sequence, queries, split) and kv head.

The products are turned around, for a matrix unit wants 64 rows and decoding has 8 queries: keys are the rows.

    logits [page, m] = K [page, h] · qᵀ          out [h, m] += Vᵀ [h, page] · weights [page, m]

    copies (TMA)   page 0 | page 1 | page 2 |          | page 3 …            STAGES - 1 pages ahead of the compute
    warpgroup               K0·q, softmax, P to shared memory | ↑ refill | V0·P | K1·q, …

The one barrier of a page, after the weights are in shared memory, also says that every thread is done with the page
before; only then is its buffer filled again. Pages of 8 and 4 bits become bfloat16 in registers, on their way into
the product; components of queries and tokens of weights lie in the order that widening gives (`hopper_widen`). Scales
multiply logits and weights. Pages that are seen whole have no mask. Shared memory holds one piece of bfloat16 heads of
128 an SM (198 KiB), two of int8 and three of int4, which overlap: one waits for its memory while another computes.

Heads of 256 go by halves of a page, so that three stages fit. Values of 96 components lie in 128 rows, for the matrix
unit takes 64 at a time; what the last 32 give is left behind.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from maxstack.kernels import tiles as sizes_of
from maxstack.kernels.hopper_widen import ordered, store_turned, widened
from maxstack.kernels.paged_attention import mosaic_gpu_latent
from maxstack.kernels.paged_attention.cache import KVCache, LatentCache, head_size, page_size
from maxstack.kernels.paged_attention.mosaic_gpu_page import (
    HIDDEN,
    PAGE,
    ROWS,
    SMS,
    clear_values,
    not_hopper,
    seen,
    tiles,
)
from maxstack.kernels.paged_attention.plan import Options, Pieces, joined, pieces

STAGES = 3
HEAD_SIZES = (64, 96, 128, 256)
MOST_ROWS = 32
"""Query rows of a piece; logits and output take registers a thread and row."""
MOST_ROWS_LARGE = 16
"""Of large heads, and of bfloat16 heads of 96 and 128, where clearing values takes registers too: with 32 ptxas
spills."""
BY_KEY = ROWS.reduce(1)
BY_QUERY = ROWS.reduce(0)


def declined(q_btnh, cache: KVCache | LatentCache, value_size: int) -> str | None:
    """Why this backend cannot serve a call; None if it can."""
    if isinstance(cache, LatentCache):
        return mosaic_gpu_latent.declined(q_btnh, cache, value_size) or not_hopper()
    if page_size(cache) != PAGE:
        return f"pages have {page_size(cache)} tokens; it needs {PAGE}"
    if head_size(cache) not in HEAD_SIZES:
        return f"heads have {head_size(cache)} components; it needs 64, 96, 128 or 256"
    kind = cache.k_pages.dtype
    if kind not in (jnp.bfloat16, jnp.int8, jnp.int4):
        return f"pages are {kind}; it needs bfloat16, int8 or int4 (made by init_cache for a GPU)"
    if kind == jnp.int4 and head_size(cache) == 96:
        return "int4 pages of heads of 96: 48 bytes are no whole tile of shared memory; int8 pages are served"
    if q_btnh.dtype != jnp.bfloat16:
        return f"queries are {q_btnh.dtype}; its products take bfloat16"
    if q_btnh.shape[2] // cache.k_pages.shape[1] > MOST_ROWS:
        return (
            f"{q_btnh.shape[2] // cache.k_pages.shape[1]} query heads share a kv head; it takes {MOST_ROWS}"
        )
    return not_hopper()


def default_splits(q_btnh, cache, table_pages: int) -> int:
    """So many that each SM has two warpgroups, if sequences are long enough."""
    if isinstance(cache, LatentCache):
        return mosaic_gpu_latent.default_splits(q_btnh, table_pages)
    (b, t, n, _), k = q_btnh.shape, cache.k_pages.shape[1]
    each = max(1, min(t, _most_rows(cache) // (n // k)))
    usual = max(1, min(-(-2 * SMS // (b * k * -(-t // each))), table_pages))
    shape = {"b": b, "t": t, "n": n, "k": k, "h": head_size(cache), "p": sizes_of.about(table_pages)}
    axes = {
        "splits": tuple(sorted({max(1, min(usual * part // 4, table_pages)) for part in (1, 2, 4, 8, 16)}))
    }

    def fault(sizes: sizes_of.Sizes) -> str | None:
        splits = sizes["splits"]
        return f"{splits} parts of {table_pages} pages" if splits > table_pages else None

    name = "paged_attention.mosaic_gpu"
    return sizes_of.chosen(name, cache.k_pages.dtype, shape, {"splits": usual}, axes=axes, fault=fault)[
        "splits"
    ]


def _most_rows(cache: KVCache) -> int:
    size, kind = head_size(cache), cache.k_pages.dtype
    return MOST_ROWS_LARGE if size > 128 or (kind == jnp.bfloat16 and size > 64) else MOST_ROWS


def _bits(kind) -> int:
    return 8 if kind == jnp.int8 else 4


def _tokens(h: int) -> int:
    """Of a step: a page, or half of one where three pages do not fit shared memory."""
    return PAGE if h <= 128 else PAGE // 2


def paged_attention(
    q_btnh: Float[Array, "b t n h"],
    cache: KVCache | LatentCache,
    table_bp: Int[Array, "b p"],
    lengths_b: Int[Array, "b"],
    options: Options,
    value_size: int,
    *,
    through_shared: bool = False,
) -> tuple[Float[Array, "s b t n w"], Float[Array, "s b t n"]]:
    """Output and log-sum-exp of each split, float32. The table holds pages or -1.

    `through_shared` lets widened pages pass through shared memory, which the interpreter needs: it has no products
    with an operand in registers. Nothing else differs.
    """
    b, t = q_btnh.shape[:2]
    if isinstance(cache, LatentCache):
        (out, top, total), each = mosaic_gpu_latent.run(
            q_btnh, cache, table_bp, lengths_b, options, value_size, through_shared
        )
    else:
        (out, top, total), each = _run(q_btnh, cache, table_bp, lengths_b, options, through_shared)
    safe = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, (top + jnp.log2(safe)) * math.log(2), -jnp.inf)
    out = out / safe[..., None]
    return joined(out, b, t, each, options.splits), joined(lse, b, t, each, options.splits)


def _run(q_btnh, cache: KVCache, table_bp, lengths_b, options: Options, through_shared: bool):
    """As `mosaic_gpu_latent.run`, for each kv head."""
    work, each = pieces(
        q_btnh, cache.k_pages.shape[1], lengths_b, options, PAGE, table_bp.shape[1], _most_rows(cache)
    )
    m, h = work.q_rkmh.shape[2:]
    work = work._replace(q_rkmh=jnp.pad(work.q_rkmh, ((0, 0), (0, 0), (0, -m % 8), (0, 0))))
    out, top, total = _call(work, cache, table_bp, options, each, m // each, through_shared)
    return (jnp.swapaxes(out[:, :, :h, :m], 2, 3), top[..., :m], total[..., :m]), each


def _call(
    work: Pieces, cache: KVCache, table_bp, options: Options, each: int, group: int, through_shared: bool
):
    """Sums of weighted values [r, k, rows, m], of which the first h count; largest logits and sums of weights
    [r, k, m]; powers and logits of 2."""
    r = len(work.first_r)
    k, m, h = work.q_rkmh.shape[1:]
    kind, f32 = cache.k_pages.dtype, jnp.float32
    exact = kind == jnp.bfloat16
    copies = 1 if exact else 2
    tokens, rows = _tokens(h), -(-h // 64) * 64
    scratch = {
        "q": plgpu.SMEM((m, h), jnp.bfloat16, transforms=tiles(h, jnp.bfloat16)),
        "weights": plgpu.SMEM((2, m, tokens), jnp.bfloat16, transforms=tiles(tokens, jnp.bfloat16)),
        "k": plgpu.SMEM((STAGES, tokens, h), kind, transforms=tiles(h, kind)),
        "v": plgpu.SMEM((STAGES, rows, tokens), kind, transforms=tiles(tokens, kind)),
        "q_here": plgpu.Barrier(),
        "k_here": plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
        "v_here": plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
    }
    if not exact:
        scratch |= {name: plgpu.SMEM((STAGES, tokens), f32) for name in ("k_scale", "v_scale")}
        if through_shared:
            scratch["wide_k"] = plgpu.SMEM((tokens, h), jnp.bfloat16, transforms=tiles(h, jnp.bfloat16))
            scratch["wide_v"] = plgpu.SMEM(
                (rows, tokens), jnp.bfloat16, transforms=tiles(tokens, jnp.bfloat16)
            )
    q_rkmh = work.q_rkmh if exact else ordered(work.q_rkmh, _bits(kind))
    inputs = {
        "q": q_rkmh, "k": cache.k_pages, "v": cache.v_pages, "table": table_bp, "sequences": work.sequences_r,
        "ends": work.ends_r, "first": work.first_r, "last": work.last_r,
    }  # fmt: skip
    if not exact:
        inputs |= {"k_scale": cache.k_scale, "v_scale": cache.v_scale}

    def paged_attention(*refs):
        given, outs, kept = refs[: len(inputs)], refs[len(inputs) : len(inputs) + 3], refs[len(inputs) + 3 :]
        named = dict(zip(inputs, given, strict=True)), dict(zip(scratch, kept, strict=True))
        _kernel(*named, outs, options, each, group)

    return plgpu.kernel(
        paged_attention,
        out_type=[
            jax.ShapeDtypeStruct((r, k, rows, m), f32),
            jax.ShapeDtypeStruct((r, k, m), f32),
            jax.ShapeDtypeStruct((r, k, m), f32),
        ],
        grid=(k, r),
        grid_names=("head", "piece"),
        scratch_types=list(scratch.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs.values())


def _kernel(given, kept, outs, options: Options, each: int, group: int):
    """One piece and kv head. Step `i` of the piece uses buffers `i % STAGES`, and weights `i % 2`."""
    head, piece = lax.axis_index("head"), lax.axis_index("piece")
    sequence, first, end = given["sequences"][piece], given["first"][piece], given["ends"][piece]
    (rows, tokens), (m, h) = kept["v"].shape[1:], kept["q"].shape
    parts = PAGE // tokens  # steps of a page
    steps = (given["last"][piece] - first) * parts

    def fetch(i):
        where = jnp.maximum(given["table"][sequence, first + lax.div(i, parts)], 0)
        slot, some = lax.rem(i, STAGES), pl.ds(lax.rem(i, parts) * tokens, tokens)
        for name, at in (("k", some), ("k_scale", some), ("v", (slice(None), some)), ("v_scale", some)):
            if name in given:
                at = at if isinstance(at, tuple) else (at,)
                target, here = kept[name].at[slot], kept[f"{name[0]}_here"].at[slot]
                target = target.at[pl.ds(0, h)] if name == "v" and rows != h else target
                plgpu.copy_gmem_to_smem(given[name].at[where, head, *at], target, here)

    plgpu.copy_gmem_to_smem(given["q"].at[lax.div(piece, options.splits), head], kept["q"], kept["q_here"])
    for i in range(STAGES):
        pl.when(i < steps)(functools.partial(fetch, i))
    plgpu.barrier_wait(kept["q_here"])

    def step(i, carry):
        out, top, total = carry
        slot, parity = lax.rem(i, STAGES), lax.rem(i, 2)
        # Tokens of this step before the end; none if its entry is no page.
        there = given["table"][sequence, first + lax.div(i, parts)] >= 0
        left = jnp.where(there, end - first * PAGE - i * tokens, -PAGE - each)

        only_visible = functools.partial(seen, left=left, options=options, each=each, group=group)

        plgpu.barrier_wait(kept["k_here"].at[slot])
        logits = only_visible(_logits(kept, slot, tokens, m, options), -jnp.inf)
        new_top = jnp.maximum(top, logits.max(0))
        keep = jnp.exp2(top - new_top)
        weights = jnp.exp2(logits - lax.broadcast_in_dim(new_top, (tokens, m), [1]))
        total = total * keep + weights.sum(0)

        plgpu.barrier_wait(kept["v_here"].at[slot])
        if "v_scale" in kept:
            scale = plgpu.load(kept["v_scale"].at[slot], layout=BY_KEY)
            # What no query sees may be anything, nan too, and 0 · nan is nan.
            weights = only_visible(weights * lax.broadcast_in_dim(scale, (tokens, m), [0]), 0.0)
        else:
            clear = functools.partial(clear_values, kept["v"].at[slot], left, each)
            pl.when(left < tokens + each - 1)(clear)
        _store_turned(weights.astype(jnp.bfloat16), parity, kept)
        plgpu.commit_smem()

        # All threads are past the step before: its buffer is free.
        @pl.when((i > 0) & (i - 1 + STAGES < steps))
        def _():
            fetch(i - 1 + STAGES)

        part = _product(kept, "v", slot, kept["weights"].at[parity].T, (rows, m))
        return out * lax.broadcast_in_dim(keep, (rows, m), [1]) + part, new_top, total

    start = (
        plgpu.layout_cast(jnp.zeros((rows, m), jnp.float32), ROWS),
        plgpu.layout_cast(jnp.full((m,), HIDDEN, jnp.float32), BY_QUERY),
        plgpu.layout_cast(jnp.zeros((m,), jnp.float32), BY_QUERY),
    )
    for ref, value in zip(outs, lax.fori_loop(0, steps, step, start), strict=True):
        ref[piece, head] = value


def _logits(kept, slot, tokens: int, m: int, options: Options):
    """[tokens, m], so that a weight is 2 to their power."""
    logits = _product(kept, "k", slot, kept["q"].T, (tokens, m))
    base2 = math.log2(math.e)
    factor = options.scale * (base2 if options.softcap is None else 1 / options.softcap)
    if "k_scale" in kept:
        scale = plgpu.load(kept["k_scale"].at[slot], layout=BY_KEY) * factor
        logits = logits * lax.broadcast_in_dim(scale, (tokens, m), [0])
    else:
        logits = logits * factor
    return logits if options.softcap is None else jnp.tanh(logits) * (options.softcap * base2)


def _product(kept, name: str, slot, right, shape):
    """`pages · right` in float32; few bits become bfloat16 in registers, or through shared memory that is there."""
    pages = kept[name].at[slot]
    if pages.dtype != jnp.bfloat16:
        wide = kept.get(f"wide_{name}")
        pages = widened(pages, by_hand=wide is None)
        if wide is not None:
            wide[...] = pages
            plgpu.commit_smem()
            pages = wide

    def multiply(sum_ref):
        plgpu.wgmma(sum_ref, pages, right)
        return sum_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _store_turned(weights, parity, kept) -> None:
    """Weights turned around, tokens in the order in which the values have them."""
    kind, ref = kept["v"].dtype, kept["weights"].at[parity]
    if kind == jnp.bfloat16:
        ref.T[...] = plgpu.layout_cast(weights, plgpu.Layout.WGMMA_TRANSPOSED)
        return
    lies = tiles(weights.shape[0], jnp.bfloat16)
    store_turned(weights, ref, lies, _bits(kind), by_hand="wide_v" not in kept)
