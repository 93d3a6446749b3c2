"""Attention over pages for TPUs: pages stream through a ring of buffers, each is used once, all its heads in turn.

    copies    page 0 | page 1 | page 2 | …           HBM → ring[i % SLOTS], as the table says
    compute            page 0 | page 1 | page 2 | …  logits = q·kᵀ × scale of k;  out += (weights × scale of v)·vᵀᵀ

The grid goes over pieces of work (sequence, queries, split); a piece loops over its pages. The cursor of the copies
runs SLOTS - 1 pages ahead of the compute and goes on into the next piece, so that the memory is never idle between
sequences. Pieces without pages cost a grid step; pages that are not used are not copied.

On chips whose two cores are one device each core takes half of the pieces, with a ring and a cursor of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from maxstack.kernels import dispatch, tiles
from maxstack.kernels.paged_attention.cache import KVCache, LatentCache, head_size, page_size
from maxstack.kernels.paged_attention.plan import Options, Pieces, joined, pieces

SLOTS = 4
"""Pages in flight. Fewer, where pages are large, so that they take at most `RING_BYTES`."""
RING_BYTES = 8 << 20
"""Of 16 MiB that a kernel may use on a v5e unless it asks for more."""
MOST_ROWS = 128
"""Query rows of a piece; a matrix unit has 128 (v5) or 256 (v6e, v7x) columns."""
LANES = 128
TWO_CORES = ("v4", "v5p")


def declined(q_btnh, cache: KVCache | LatentCache, value_size: int) -> str | None:
    """Why this backend cannot serve a call; None if it can."""
    pool = cache.pages if isinstance(cache, LatentCache) else cache.k_pages
    if page_size(cache) % LANES:
        return f"pages have {page_size(cache)} tokens; it needs a multiple of {LANES}"
    if head_size(cache) % 64 or value_size % 64:
        return f"heads have {head_size(cache)} and {value_size} components; it needs multiples of 64"
    if pool.dtype == jnp.uint8:
        return "its 4-bit pages are jnp.int4, these are pairs in uint8; make the cache on the TPU"
    return dispatch.only_on("tpu")


def default_splits(q_btnh, cache, table_pages: int) -> int:
    """One: a core goes through its pieces in turn, and a sequence alone feeds both cores where there are two."""
    return 2 if dispatch.chip().name in TWO_CORES and q_btnh.shape[0] == 1 and table_pages > 1 else 1


def paged_attention(
    q_btnh: Float[Array, "b t n h"],
    cache: KVCache | LatentCache,
    table_bp: Int[Array, "b p"],
    lengths_b: Int[Array, "b"],
    options: Options,
    value_size: int,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "s b t n w"], Float[Array, "s b t n"]]:
    """Output and log-sum-exp of each split, float32. The table holds pages or -1."""
    b, t = q_btnh.shape[:2]
    pools = _pools(cache)
    kv_heads, page = pools[0].shape[1], page_size(cache)
    sizes = _sizes(q_btnh, pools, page)
    work, each = pieces(q_btnh, kv_heads, lengths_b, options, page, table_bp.shape[1], sizes["rows"])
    latent = isinstance(cache, LatentCache)
    out, lse = _call(work, pools, latent, table_bp, options, value_size, each, sizes["slots"], interpret)
    return joined(out, b, t, each, options.splits), joined(lse[..., 0], b, t, each, options.splits)


def _pools(cache) -> list[Array]:
    """[keys, values, scale of keys, scale of values] or [latents, scale], all with heads behind pages.

    Keys of 64 components are handed over transposed. XLA lays out [P, k, page, 64] with the page along the lanes, so
    that no lane is empty; the transpose is then no operation, and without it XLA copies the whole pool.
    """
    if isinstance(cache, LatentCache):
        return [pool[:, None] for pool in cache if pool is not None]
    pools = [pool for pool in cache if pool is not None]
    return [jnp.swapaxes(pools[0], 2, 3), *pools[1:]] if head_size(cache) % LANES else pools


def _sizes(q_btnh, pools, page: int) -> tiles.Sizes:
    """Query rows of a piece and pages in flight: what the tables have, else as many as said above."""
    b, t, n, h = q_btnh.shape
    page_bytes = sum(_bytes(pool) for pool in pools) // pools[0].shape[0]
    rule = {"rows": MOST_ROWS, "slots": max(2, min(SLOTS, RING_BYTES // page_bytes))}
    shape = {"b": tiles.about(b), "t": t, "n": n, "k": pools[0].shape[1], "h": h, "p": page}
    axes = {"rows": (64, 128, 256), "slots": (2, 3, 4, 6, 8)}

    def fault(sizes: tiles.Sizes) -> str | None:
        slots = sizes["slots"]
        if slots < 2 or slots * page_bytes > max(RING_BYTES, 2 * page_bytes):
            return f"{slots} pages of {page_bytes} bytes in flight; it takes 2 at least, and {RING_BYTES} bytes at most"
        return None

    return tiles.chosen("paged_attention.mosaic_tpu", pools[0].dtype, shape, rule, axes=axes, fault=fault)


def _call(
    work: Pieces, pools, latent: bool, table_bp, options: Options, value_size: int, each: int, slots: int,
    interpret,
):  # fmt: skip
    """(out [r, k, m, w], lse [r, k, m, LANES]); all lanes of an lse are one number."""
    r = len(work.first_r)
    k, m, h = work.q_rkmh.shape[1:]
    cores = 2 if dispatch.chip().name in TWO_CORES and r % 2 == 0 else 1
    per_core = r // cores
    page_bytes = sum(_bytes(pool) for pool in pools) // pools[0].shape[0]
    narrow = work.q_rkmh.dtype == jnp.bfloat16 and pools[0].dtype != jnp.float32
    dtype = jnp.bfloat16 if narrow else jnp.float32
    q_rkmh = (work.q_rkmh.astype(jnp.float32) * options.scale).astype(dtype)

    def at(width, whole=1):
        return pl.BlockSpec(
            (1, k, m, width), lambda core, i, *_: (jax.lax.div(core * per_core + i, whole), 0, 0, 0)
        )

    body = functools.partial(
        _kernel, options=options, each=each, per_core=per_core, slots=slots, table_pages=table_bp.shape[1],
        pools=len(pools), latent=latent, turned=latent or h % LANES != 0, value_size=value_size,
    )  # fmt: skip
    return pl.pallas_call(
        body,
        out_shape=[
            jax.ShapeDtypeStruct((r, k, m, value_size), jnp.float32),
            jax.ShapeDtypeStruct((r, k, m, LANES), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(cores, per_core),
            in_specs=[at(h, options.splits)] + [pl.BlockSpec(memory_space=pl.ANY)] * len(pools),
            out_specs=[at(value_size), at(LANES)],
            scratch_shapes=[
                *(pltpu.VMEM((slots, *pool.shape[1:]), pool.dtype) for pool in pools),
                pltpu.SemaphoreType.DMA((slots,)),
                pltpu.SMEM((3,), jnp.int32),
                pltpu.VMEM((k, m, value_size), jnp.float32),
                pltpu.VMEM((k, m, LANES), jnp.float32),
                pltpu.VMEM((k, m, LANES), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(work, page_bytes, table_bp, pools[0].shape[-1] * pools[0].shape[-2], value_size, options),
        interpret=interpret,
        name="paged_attention",
    )(
        table_bp.reshape(-1), work.sequences_r, work.ends_r, work.first_r, work.last_r,
        _ahead(work, cores), q_rkmh, *pools,
    )  # fmt: skip


def _bytes(pool) -> int:
    return pool.size * (4 if pool.dtype == jnp.int4 else 8 * pool.dtype.itemsize) // 8


def _cost(work: Pieces, page_bytes: int, table_bp, key_numbers: int, value_size: int, options: Options):
    """For XLA's schedule: full sequences, since lengths are known at run time alone."""
    r, k, m, h = work.q_rkmh.shape
    pages = r * table_bp.shape[1] // options.splits
    logits = pages * k * m * key_numbers // h
    return pl.CostEstimate(
        flops=2 * logits * (h + value_size),
        transcendentals=logits,
        bytes_accessed=pages * page_bytes + 4 * r * k * m * (h + value_size),
    )


def _ahead(work: Pieces, cores: int) -> Array:
    """[cores · (per core + 1)]: the first piece from `i` on that has pages, or their number; counted in the core."""
    some = (work.last_r > work.first_r).reshape(cores, -1)
    per_core = some.shape[1]
    index = jnp.where(some, jnp.arange(per_core, dtype=jnp.int32), per_core)
    index = jnp.pad(index, ((0, 0), (0, 1)), constant_values=per_core)
    return jax.lax.cummin(index, axis=1, reverse=True).reshape(-1)


def _kernel(
    table, sequences, ends, first, last, ahead, q_ref, *refs,
    options: Options, each: int, per_core: int, slots: int, table_pages: int, pools: int, latent: bool,
    turned: bool, value_size: int,
):  # fmt: skip
    """One piece. `cursor` holds (piece of the next copy, its page, pages consumed so far), of this core."""
    hbm, (out_ref, lse_ref), ring = refs[:pools], refs[pools : pools + 2], refs[pools + 2 : 2 * pools + 2]
    arrived, cursor, acc, top, total = refs[2 * pools + 2 :]
    core, i = pl.program_id(0), pl.program_id(1)
    base = core * per_core
    piece = base + i

    def entry(piece, page):
        """Page of the pool, or -1."""
        return table[sequences[piece] * table_pages + page]

    def copies(where, slot):
        return [
            pltpu.make_async_copy(pool.at[where], buffer.at[slot], arrived.at[slot])
            for pool, buffer in zip(hbm, ring, strict=True)
        ]

    def fetch(slot):
        """Start the copy under the cursor, if there is one, and move the cursor."""
        ahead_i, page = cursor[0], cursor[1]

        @pl.when(ahead_i < per_core)
        def _():
            where = entry(base + ahead_i, page)

            @pl.when(where >= 0)
            def _():
                for copy in copies(where, slot):
                    copy.start()

            done = page + 1 >= last[base + ahead_i]
            next_i = jnp.where(done, ahead[core * (per_core + 1) + ahead_i + 1], ahead_i)
            cursor[0] = next_i
            cursor[1] = jnp.where(done, first[base + jnp.minimum(next_i, per_core - 1)], page + 1)

    @pl.when(i == 0)
    def _():
        begin = ahead[core * (per_core + 1)]
        cursor[0], cursor[1], cursor[2] = begin, first[base + jnp.minimum(begin, per_core - 1)], 0
        for slot in range(slots - 1):
            fetch(slot)

    acc[...] = jnp.zeros_like(acc)
    top[...] = jnp.full_like(top, -jnp.inf)
    total[...] = jnp.zeros_like(total)

    @pl.loop(first[piece], last[piece])
    def _(page):
        consumed = cursor[2]
        cursor[2] = consumed + 1
        slot = jax.lax.rem(consumed, slots)
        fetch(jax.lax.rem(consumed + slots - 1, slots))  # the slot of the page before, which is done with
        where = entry(piece, page)

        @pl.when(where >= 0)
        def _():
            for copy in copies(where, slot):
                copy.wait()
            buffers = [buffer.at[slot] for buffer in ring]
            _use_page(
                q_ref.at[0],
                buffers,
                latent,
                turned,
                page,
                ends[piece],
                acc,
                top,
                total,
                options,
                each,
                value_size,
            )

    # A piece that saw nothing has total 0 and top -inf.
    safe = jnp.where(total[...] > 0, total[...], 1.0)
    out_ref[0] = acc[...] / safe[:, :, :1]
    lse_ref[0] = top[...] + jnp.log(safe)


def _use_page(
    q_ref, buffers, latent, turned, page, end, acc, top, total, options: Options, each: int, value_size: int
):
    """Update the running softmax of every head with one page; `end` is one past the last query's position.

    Keys are [page, h], or [h, page] if `turned`.
    """
    heads, m, _ = q_ref.shape
    keys, values = (buffers[0], buffers[0]) if latent else buffers[:2]
    scales = buffers[1:] * 2 if latent else buffers[2:]
    tokens = values.shape[-1]
    dtype, exact = q_ref.dtype, keys.dtype in (jnp.int8, jnp.int4)
    left = end - page * tokens  # tokens of this page that some query sees

    if not exact:
        # What no query sees may be anything, nan too, and 0 · nan is nan. So may be what only later queries see, which
        # may be padding: there what is not finite becomes 0.
        @pl.when(left < tokens + each - 1)
        def _():
            for head in range(heads):
                lanes = jax.lax.broadcasted_iota(jnp.int32, values.shape[1:], 1)
                wide = values[head].astype(jnp.float32)
                kept = (lanes < left) & ((lanes <= left - each) | (jnp.abs(wide) < jnp.inf))
                values[head] = jnp.where(kept, wide, 0.0).astype(values.dtype)

    lanes = jax.lax.broadcasted_iota(jnp.int32, (m, tokens), 1)
    rows = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (m, tokens), 0), m // each)
    distance = left - each + rows - lanes  # of position of the query and of the key
    visible = distance >= 0
    if options.window is not None:
        visible &= distance < options.window
    for head in range(heads):
        logits = _dot(q_ref[head], keys[head].astype(dtype), ((1,), (0 if turned else 1,)))
        if scales:
            logits = logits * scales[0][head][None]
        if options.softcap is not None:
            logits = options.softcap * jnp.tanh(logits / options.softcap)
        logits = jnp.where(visible, logits, -jnp.inf)
        before = top[head, :, :1]
        after = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        base = jnp.where(after == -jnp.inf, 0.0, after)
        keep = jnp.exp(before - base)
        weights = jnp.exp(logits - base)
        sums = total[head, :, :1] * keep + jnp.sum(weights, axis=1, keepdims=True)
        total[head] = jnp.broadcast_to(sums, total.shape[1:])
        top[head] = jnp.broadcast_to(after, top.shape[1:])
        if scales:
            weights = jnp.where(visible, weights * scales[1][head][None], 0.0)
        part = _dot(weights.astype(dtype), values[head, :value_size].astype(dtype), ((1,), (1,)))
        acc[head] = acc[head] * keep + part


def _dot(a, b, contract):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
