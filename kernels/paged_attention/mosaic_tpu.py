"""Attention over pages for TPUs: pages stream through a ring of buffers, each is used once, all its heads in turn.

    copies    page 0 | page 1 | page 2 | …           HBM → ring[i % SLOTS], as the table says
    compute            page 0 | page 1 | page 2 | …  logits = q·kᵀ × scale of k;  out += (weights × scale of v)·vᵀᵀ

The grid goes over pieces of work (sequence, queries, split); a piece loops over its pages. The cursor of the copies
runs SLOTS - 1 pages ahead of the compute and goes on into the next piece, so that the memory is never idle between
sequences. Pieces without pages cost a grid step; pages that are not used are not copied.

A piece has all kv heads and up to 128 rows of queries each; of a chunk of a prompt it has some of the heads and up to
2,048 rows, so that a page is copied for most of a chunk's queries at once.

On chips whose two cores are one device each core takes half of the pieces, with a ring and a cursor of its own.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from maxstack.kernels import dispatch
from maxstack.kernels.paged_attention.cache import KVCache, LatentCache, head_size, page_size
from maxstack.kernels.paged_attention.mosaic_tpu_page import (
    Call,
    Sums,
    block_rows,
    clear,
    finish,
    sums_shapes,
    use_page,
)
from maxstack.kernels.paged_attention.mosaic_tpu_sizes import (
    LANES,
    TWO_CORES,
    is_chunk,
    page_bytes,
    sizes_for,
    step,
)
from maxstack.kernels.paged_attention.plan import Options, Pieces, joined, pieces


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
    """One: a core goes through its pieces in turn, and a sequence alone feeds both cores where there are two: in two
    parts, or in a chunk by its heads."""
    kv_heads = 1 if isinstance(cache, LatentCache) else cache.k_pages.shape[1]
    if dispatch.chip().name not in TWO_CORES or q_btnh.shape[0] > 1 or table_pages < 2:
        return 1
    return 1 if is_chunk(q_btnh, kv_heads) and kv_heads % 2 == 0 else 2


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
    """Output and log-sum-exp of each split, float32; a final output of a chunk in the dtype of the queries. The table
    holds pages or -1."""
    b, t, n, h = q_btnh.shape
    pools = _pools(cache)
    kv_heads, page = pools[0].shape[1], page_size(cache)
    chunk = is_chunk(q_btnh, kv_heads)
    out_dtype = q_btnh.dtype if chunk and options.final else jnp.dtype(jnp.float32)
    sizes = sizes_for(q_btnh, pools, page, value_size, out_dtype)
    work, each = pieces(
        q_btnh, kv_heads, lengths_b, options, page, table_bp.shape[1], sizes["rows"],
        step=step(n // kv_heads) if chunk else 1,
    )  # fmt: skip
    latent = isinstance(cache, LatentCache)
    call = Call(options, each, sizes["heads"], latent, latent or h % LANES != 0, value_size, chunk)
    out, lse = _call(work, pools, table_bp, call, sizes["slots"], out_dtype, interpret)
    return joined(out, b, t, each, options.splits), joined(lse, b, t, each, options.splits)


def _pools(cache) -> list[Array]:
    """[keys, values, scale of keys, scale of values] or [latents, scale], all with heads behind pages.

    Keys of 64 components are handed over transposed. XLA lays out [P, k, page, 64] with the page along the lanes, so
    that no lane is empty; the transpose is then no operation, and without it XLA copies the whole pool.
    """
    if isinstance(cache, LatentCache):
        return [pool[:, None] for pool in cache if pool is not None]
    pools = [pool for pool in cache if pool is not None]
    return [jnp.swapaxes(pools[0], 2, 3), *pools[1:]] if head_size(cache) % LANES else pools


def _call(work: Pieces, pools, table_bp, call: Call, slots: int, out_dtype, interpret) -> tuple[Array, Array]:
    """(out [r, k, m, w], lse [r, k, m])."""
    options, heads = call.options, call.heads
    k, m, h = work.q_rkmh.shape[1:]
    cuts = k // heads
    work = Pieces(work.q_rkmh, *(jnp.repeat(x, cuts) for x in work[1:]))
    r = len(work.first_r)
    cores = 2 if dispatch.chip().name in TWO_CORES and r % 2 == 0 else 1
    per_core = r // cores
    narrow = work.q_rkmh.dtype == jnp.bfloat16 and pools[0].dtype != jnp.float32
    dtype = jnp.bfloat16 if narrow else jnp.float32
    q_rkmh = (work.q_rkmh.astype(jnp.float32) * options.scale).astype(dtype)
    # Rows as the form has them: [m, h], or in blocks.
    rows = (m // block_rows(m), block_rows(m)) if call.chunk else (m,)
    q_rkmh = q_rkmh.reshape(-1, k, *rows, h)
    lse_shape = (*rows[:-1], 1, rows[-1]) if call.chunk else (m, LANES)

    def at(shape, whole=1):
        def place(core, i, *_):
            piece = core * per_core + i
            cut = jax.lax.rem(piece, cuts) if cuts > 1 else 0
            return jax.lax.div(piece, whole * cuts), cut, *(0 for _ in shape)

        return pl.BlockSpec((None, heads, *shape), place)

    results = [((*rows, call.value_size), out_dtype), (lse_shape, jnp.float32)]
    if not interpret:  # else XLA may copy a pool of scales into VMEM, pages that are not in use too
        pools = [pltpu.with_memory_space_constraint(pool, pltpu.HBM) for pool in pools]
    body = functools.partial(
        _kernel, call=call, per_core=per_core, slots=slots, table_pages=table_bp.shape[1], cuts=cuts,
        pools=len(pools),
    )  # fmt: skip
    out, lse = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct((r // cuts, k, *shape), dtype) for shape, dtype in results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(cores, per_core),
            in_specs=[at((*rows, h), options.splits)] + [pl.BlockSpec(memory_space=pl.ANY)] * len(pools),
            out_specs=[at(shape) for shape, _ in results],
            scratch_shapes=[
                *(pltpu.VMEM((slots, *_part(pool, heads)), pool.dtype) for pool in pools),
                pltpu.SemaphoreType.DMA((slots,)),
                pltpu.SMEM((3,), jnp.int32),
                *sums_shapes(call, m),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(q_rkmh, r, page_bytes(pools, heads), table_bp, pools, call, results),
        interpret=interpret,
        name="paged_attention",
    )(
        table_bp.reshape(-1),
        work.sequences_r,
        work.ends_r,
        work.first_r,
        work.last_r,
        _ahead(work, cores),
        q_rkmh,
        *pools,
    )
    lse = lse if call.chunk else lse[..., 0]
    return out.reshape(r // cuts, k, m, call.value_size), lse.reshape(r // cuts, k, m)


def _part(pool, heads: int) -> tuple[int, ...]:
    """Of a page, what a piece copies."""
    return (heads, *pool.shape[2:]) if pool.ndim == 4 else pool.shape[1:]


def _cost(q, r: int, copied: int, table_bp, pools, call: Call, results):
    """For XLA's schedule: full sequences, since lengths are known at run time alone."""
    pages = r * table_bp.shape[1] // call.options.splits
    rows = call.heads * math.prod(q.shape[2:-1])
    h, tokens = q.shape[-1], math.prod(pools[0].shape[2:]) // q.shape[-1]
    logits = pages * rows * tokens
    out = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in results)
    return pl.CostEstimate(
        flops=2 * logits * (h + call.value_size),
        transcendentals=logits,
        bytes_accessed=pages * copied + r * (rows * h * q.dtype.itemsize + call.heads * out),
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
    call: Call, per_core: int, slots: int, table_pages: int, cuts: int, pools: int,
):  # fmt: skip
    """One piece. `cursor` holds (piece of the next copy, its page, pages consumed so far), of this core."""
    hbm, (out_ref, lse_ref), ring = refs[:pools], refs[pools : pools + 2], refs[pools + 2 : 2 * pools + 2]
    arrived, cursor, *sums = refs[2 * pools + 2 :]
    sums, copies = Sums(*sums), functools.partial(_copies, hbm, ring, arrived)
    first_head = functools.partial(_first_head, call.heads, cuts)
    core, i = pl.program_id(0), pl.program_id(1)
    base = core * per_core
    piece = base + i

    def entry(piece, page):
        """Page of the pool, or -1."""
        return table[sequences[piece] * table_pages + page]

    def fetch(slot):
        """Start the copy under the cursor, if there is one, and move the cursor."""
        ahead_i, page = cursor[0], cursor[1]

        @pl.when(ahead_i < per_core)
        def _():
            where = entry(base + ahead_i, page)

            @pl.when(where >= 0)
            def _():
                for copy in copies(where, slot, first_head(base + ahead_i)):
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

    clear(sums)

    @pl.loop(first[piece], last[piece])
    def _(page):
        consumed = cursor[2]
        cursor[2] = consumed + 1
        slot = jax.lax.rem(consumed, slots)
        fetch(jax.lax.rem(consumed + slots - 1, slots))  # the slot of the page before, which is done with
        where = entry(piece, page)

        @pl.when(where >= 0)
        def _():
            for copy in copies(where, slot, first_head(piece)):
                copy.wait()
            buffers = [buffer.at[slot] for buffer in ring]
            use_page(call, q_ref, buffers, page, ends[piece], first_head(piece), sums)

    finish(call, sums, out_ref, lse_ref)


def _first_head(heads: int, cuts: int, piece):
    """Of a piece: those of a cut of the heads lie side by side."""
    return 0 if cuts == 1 else jax.lax.rem(piece, cuts) * heads


def _copies(pools, ring, arrived, where, slot, first_head) -> list:
    """Of a page into a slot, of as many kv heads as it holds. Scales are copied whole: a tile has all heads."""

    def part(pool, buffer):
        whole = buffer.shape[1] == pool.shape[1]
        return pool.at[where] if whole else pool.at[where, pl.ds(first_head, buffer.shape[1])]

    return [
        pltpu.make_async_copy(part(pool, buffer), buffer.at[slot], arrived.at[slot])
        for pool, buffer in zip(pools, ring, strict=True)
    ]
