"""Attention over latent pages for Hopper: three warpgroups for a piece of work and 64 of its query rows.

A block is half a page, [components, 64 tokens]; two are in shared memory, 72 KiB each at 576 components, beside 72
KiB of queries. Its first components are the values too, so nothing is read twice. One compute warpgroup weighs the
first half of a page, the other one the second half; each sums half of the values' components, over both. Time
downwards; L is a block, P its weights, `→` and `←` are barriers:

    memory        compute 0                          compute 1
    ------        ---------                          ---------
    L₀ →          S = Q·L₀        tensor cores       |
    L₁ →          top, P₀ = 2^S                      |
                  P₀ →                               wait P₀
                  O[:half] += P₀·L₀ᵀ                 O[half:] += P₀·L₀ᵀ
       ← L₀ free  |                                  S = Q·L₁        tensor cores
    L₂ →          |                                  top, P₁ = 2^S
                  wait P₁                            P₁ →
                  O[:half] += P₁·L₁ᵀ                 O[half:] += P₁·L₁ᵀ
       ← L₁ free  S = Q·L₂                           |
    L₃ →          ...                                ...

P takes the place of the block's rotated part, which only its logits need: without it the four would not fit. The
largest logits go from one warpgroup to the other beside P.
"""

# One body of a kernel and its scratch: in parts it would be longer.
# ruff: noqa: C901, PLR0915

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from maxstack.kernels.attention.mosaic_gpu_tile import (
    COMPUTE,
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    ROW,
    across,
    add_products,
    product,
    row_of,
    zeros,
)
from maxstack.kernels.paged_attention.cache import LatentCache, head_size, page_size
from maxstack.kernels.paged_attention.mosaic_gpu_page import HIDDEN, PAGE, ROWS, SMS, clear_values, tiles
from maxstack.kernels.paged_attention.plan import Options, Pieces, pieces

TILE = 64
"""Query rows of a block of threads, and tokens of a block of latents: `wgmma` multiplies 64 rows."""
MOST = 576
"""Components: two blocks and the queries take 216 of 227 KiB."""


def declined(q_btnh, cache: LatentCache, value_size: int) -> str | None:
    """Why it cannot serve a call, from shapes and types."""
    size = head_size(cache)
    if page_size(cache) != PAGE:
        return f"pages have {page_size(cache)} tokens; it needs {PAGE}"
    if cache.pages.dtype != jnp.bfloat16 or q_btnh.dtype != jnp.bfloat16:
        return (
            f"latents are {cache.pages.dtype} and queries {q_btnh.dtype}; it needs bfloat16; XLA serves them"
        )
    if size % TILE or value_size % (2 * TILE) or not value_size + TILE <= size <= MOST:
        return (
            f"latents have {size} components, {value_size} of them values; it needs a multiple of 64 up to {MOST}, "
            "and a multiple of 128 that leaves 64"
        )
    return None


def default_splits(q_btnh, table_pages: int) -> int:
    """So many that each SM has a block of threads, if sequences are long enough."""
    b, t, n, _ = q_btnh.shape
    each = max(1, min(t, TILE // n))
    return max(1, min(-(-SMS // (b * -(-t // each) * -(-each * n // TILE))), table_pages))


def run(
    q_btnh: Float[Array, "b t n h"], cache: LatentCache, table_bp: Int[Array, "b p"], lengths_b: Int[Array, "b"],
    options: Options, value_size: int, through_shared: bool,
) -> tuple[tuple[Array, Array, Array], int]:  # fmt: skip
    """(sums of weighted values [r, 1, m, w], largest logits and sums of weights [r, 1, m]; queries a piece); powers
    and logits of 2."""
    n = q_btnh.shape[2]
    work, each = pieces(q_btnh, 1, lengths_b, options, PAGE, table_bp.shape[1], TILE)
    m = work.q_rkmh.shape[2]
    work = work._replace(q_rkmh=jnp.pad(work.q_rkmh, ((0, 0), (0, 0), (0, -m % TILE), (0, 0))))
    out, top, totals = _call(work, cache.pages, table_bp, options, each, n, value_size, through_shared)
    return (out[:, None, :m], top[:, None, :m], totals.sum(1)[:, None, :m]), each


def _call(
    work: Pieces,
    pages,
    table_bp,
    options: Options,
    each: int,
    group: int,
    value_size: int,
    through_shared: bool,
):
    """([r, m, w], [r, m], [r, 2, m]): each compute warpgroup sums the weights of its own blocks."""
    r = len(work.first_r)
    m, h = work.q_rkmh.shape[2:]
    half, f32 = value_size // COMPUTE, jnp.float32
    scratch = {
        "q_s": plgpu.SMEM((1, TILE, h), jnp.bfloat16, transforms=tiles(h, jnp.bfloat16)),
        "blocks_s": plgpu.SMEM((COMPUTE, h, TILE), jnp.bfloat16, transforms=tiles(TILE, jnp.bfloat16)),
        "top_s": plgpu.SMEM((COMPUTE, TILE), f32),
        "q_ready": plgpu.Barrier(),
        "ready": plgpu.Barrier(num_barriers=COMPUTE),
        "weighed": plgpu.Barrier(num_barriers=COMPUTE),
        "free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=COMPUTE),
    }

    def latent_paged_attention(
        q, pages, table, sequences, ends, firsts, lasts, out, tops, totals,
        *, q_s, blocks_s, top_s, q_ready, ready, weighed, free,
    ):  # fmt: skip
        tile, piece, warpgroup = lax.axis_index("tile"), lax.axis_index("piece"), lax.axis_index("warpgroup")
        sequence, first, end = sequences[piece], firsts[piece], ends[piece]
        steps = lasts[piece] - first
        rows = pl.ds(tile * TILE, TILE)

        def unmoved(i):
            """0, but not to the compiler: addresses that no step changes it would make once, for all products, and
            keep, in more registers than there are."""
            return lax.div(i, steps)

        def left_of(i, block: int):
            """Tokens of a block before the end; none if its entry is no page."""
            there = table[sequence, first + i] >= 0
            return jnp.where(there, end - (first + i) * PAGE - block * TILE, -PAGE - each)

        def weigh(i, own: int, top, total):
            """The weights of the warpgroup's own block, into the place of its rotated part."""
            block = blocks_s.at[own + unmoved(i)]
            plgpu.barrier_wait(ready.at[own])
            logits = _scaled(product(q_s.at[unmoved(i)], block), options)
            left = left_of(i, own)
            partly = left < TILE + each - 1
            if options.window is not None:
                partly |= left > options.window

            def hide(logits):
                return jnp.where(_visible(left, tile, options, each, group), logits, -jnp.inf)

            logits = lax.cond(partly, hide, lambda logits: logits, logits)
            new_top = jnp.maximum(top, logits.max(axis=1))
            weights = jnp.exp2(logits - across(new_top, logits))
            block.at[pl.ds(value_size, TILE)][...] = weights.astype(jnp.bfloat16)
            top_s.at[own][...] = new_top
            plgpu.commit_smem()
            plgpu.barrier_arrive(weighed.at[own])
            return total * jnp.exp2(top - new_top) + weights.sum(axis=1)

        def add(i, block: int, own: int, acc, top):
            """Weighted values of a block, its half that is the warpgroup's own."""
            if block != own:
                plgpu.barrier_wait(ready.at[block])
            plgpu.barrier_wait(weighed.at[block])
            new_top = plgpu.load(top_s.at[block], layout=ROW)
            shrink = jnp.exp2(top - new_top)
            held = blocks_s.at[block + unmoved(i)]
            values = held.at[pl.ds(own * half, half)]
            left = left_of(i, block)

            @pl.when(left < TILE + each - 1)
            def _():
                clear_values(values, left, each)
                plgpu.commit_smem()

            weights = held.at[pl.ds(value_size, TILE)]
            spare = True if through_shared else None
            (acc,) = add_products(
                (acc * across(shrink, acc),), (weights,), (values.transpose((1, 0)),), spare
            )
            plgpu.barrier_arrive(free.at[block])
            return acc, new_top, shrink

        def compute(own: int):
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            plgpu.barrier_wait(q_ready)

            def step(i, carry):
                acc, top, total = carry
                for block in range(COMPUTE):
                    if block == own:
                        total = weigh(i, own, top, total)
                    acc, top, shrink = add(i, block, own, acc, top)
                    if block != own:
                        total = total * shrink
                return acc, top, total

            start = zeros(TILE, half), row_of(HIDDEN), row_of(0.0)
            acc, top, total = lax.fori_loop(0, steps, step, start)
            out.at[piece, rows, pl.ds(own * half, half)][...] = acc
            totals.at[piece, own, rows][...] = total
            if own == 0:
                tops.at[piece, rows][...] = top

        for own in range(COMPUTE):
            pl.when(warpgroup == own)(lambda own=own: compute(own))

        @pl.when(warpgroup == COMPUTE)
        def _move_memory():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            plgpu.copy_gmem_to_smem(q.at[lax.div(piece, options.splits), 0, rows], q_s.at[0], q_ready)

            def load(i, _):
                where = jnp.maximum(table[sequence, first + i], 0)
                for block in range(COMPUTE):
                    pl.when(i > 0)(lambda block=block: plgpu.barrier_wait(free.at[block]))
                    source = pages.at[where, :, pl.ds(block * TILE, TILE)]
                    plgpu.copy_gmem_to_smem(source, blocks_s.at[block], ready.at[block])

            lax.fori_loop(0, steps, load, None)

            @pl.when(steps > 0)
            def _drain():
                for block in range(COMPUTE):
                    plgpu.barrier_wait(free.at[block])

    return plgpu.kernel(
        latent_paged_attention,
        out_type=[
            jax.ShapeDtypeStruct((r, m, value_size), f32),
            jax.ShapeDtypeStruct((r, m), f32),
            jax.ShapeDtypeStruct((r, COMPUTE, m), f32),
        ],
        # The tiles of a piece follow each other: what the first reads the others find in the L2 cache.
        grid=(m // TILE, r),
        grid_names=("tile", "piece"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="latent_paged_attention",
    )(work.q_rkmh, pages, table_bp, work.sequences_r, work.ends_r, work.first_r, work.last_r)


def _scaled(products, options: Options):
    """Logits in powers of two."""
    base2 = math.log2(math.e)
    if options.softcap is None:
        return products * (options.scale * base2)
    return jnp.tanh(products * (options.scale / options.softcap)) * (options.softcap * base2)


def _visible(left, tile, options: Options, each: int, group: int):
    """[rows, tokens]: which key a query sees; rows are (query, head), `tile` tiles are before."""
    keys = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=ROWS)
    rows = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 0, layout=ROWS) + tile * TILE
    # The key that is just behind a row's query, once a row: in the last of `each` queries everything is seen.
    behind = left - each + jnp.minimum(lax.div(rows, group), each - 1) - keys
    visible = behind >= 0
    if options.window is not None:
        visible &= behind < options.window
    return visible
