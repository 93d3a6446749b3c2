"""Long chunks written into pages on TPUs: whole pages are copied, quantized on their way.

    grid     sequences × the pages that a chunk of `t` tokens may touch
    step     new tokens of a page arrive (Pallas' pipeline) │ read the page, if only a part of it is new │
             quantize, turn, put beside what was there │ start to write; the page before the last one is written by now

XLA moves the chunk first, so that it begins where its page does: two passes over new tokens, none over a pool.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from maxstack.kernels.paged_attention.cache import LARGEST, Pool

LANES = 128
VMEM_BYTES = 10 << 20
"""Of two pages being written and two of new tokens; a v5e gives a kernel 16 MiB unless it asks for more."""
SLOTS = 2


def declined(pools: list[Pool]) -> str | None:
    """Why chunks are not written page by page; None if they are."""
    page, (_, t, k, h) = _page(pools[0]), pools[0].new_btkh.shape
    if t < page:
        return f"{t} tokens fill no page of {page}"
    if page % LANES or h % 64:
        return f"pages of {page} tokens with {h} components; it needs multiples of {LANES} and 64"
    if any(pool.pages.dtype == jnp.uint8 for pool in pools):
        return "pairs of 4-bit numbers in uint8 are made for the CPU"
    bits = sum(8 * pool.new_btkh.dtype.itemsize + _bits(pool.pages.dtype) for pool in pools)
    held = SLOTS * k * page * h * bits // 8
    return f"{held >> 20} MiB of pages do not fit" if held > VMEM_BYTES else None


def append_pages(
    pools: list[Pool],
    table_bp: Int[Array, "b p"],
    lengths_b: Int[Array, "b"],
    counts_b: Int[Array, "b"],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> list[tuple[Array, Array | None]]:
    """(pages, scale) of each pool with the first `counts_b` new tokens behind `lengths_b`; the old ones are used up."""
    page, t, count = _page(pools[0]), pools[0].new_btkh.shape[1], pools[0].pages.shape[0]
    b, entries = table_bp.shape
    touched = (t + 2 * page - 2) // page
    logical = (lengths_b // page)[:, None] + jnp.arange(touched)
    where = jnp.take_along_axis(table_bp, jnp.clip(logical, 0, entries - 1), axis=1)
    begin = (lengths_b % page)[:, None] - page * jnp.arange(
        touched
    )  # of the chunk, counted from a page's first token
    from_, to = jnp.clip(begin, 0, page), jnp.clip(begin + jnp.clip(counts_b, 0, t)[:, None], 0, page)
    usable = (logical >= 0) & (logical < entries) & (where >= 0) & (where < count) & (to > from_)
    plan = [x.reshape(-1).astype(jnp.int32) for x in (jnp.where(usable, where, -1), from_, to)]

    new = [_from_page_start(pool.new_btkh, lengths_b % page, touched * page) for pool in pools]
    held = [array for pool in pools for array in (pool.pages, pool.scale) if array is not None]
    written = pl.pallas_call(
        functools.partial(
            _kernel,
            turned=[pool.turned for pool in pools],
            quantized=pools[0].scale is not None,
            touched=touched,
        ),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in held],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(b, touched),
            in_specs=[
                pl.BlockSpec((1, x.shape[1], page, x.shape[3]), lambda i, j, *_: (i, 0, j, 0)) for x in new
            ]
            + [pl.BlockSpec(memory_space=pl.ANY)] * len(held),
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(held),
            scratch_shapes=[
                *(pltpu.VMEM((SLOTS, *array.shape[1:]), array.dtype) for array in held),
                pltpu.SemaphoreType.DMA((SLOTS,)),
                pltpu.SemaphoreType.DMA,
                pltpu.SMEM((SLOTS,), jnp.int32),
            ],
        ),
        input_output_aliases={len(plan) + len(new) + i: i for i in range(len(held))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="append_pages",
    )(*plan, *new, *held)
    arrays = iter(written)
    return [(next(arrays), None if pool.scale is None else next(arrays)) for pool in pools]


def _from_page_start(x_btkh, begin_b, size: int):
    """[b, k, size, h]: tokens from place `begin_b` on. A sequence at a time: XLA would gather them number by number."""
    t, room = x_btkh.shape[1], size - x_btkh.shape[1]

    def moved(row):
        x, begin = row
        x = jnp.pad(jnp.swapaxes(x, 0, 1), ((0, 0), (room, room), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(x, room - begin, t + room, axis=1)

    return jax.lax.map(moved, (x_btkh, begin_b))


def _kernel(where_ref, from_ref, to_ref, *refs, turned: list[bool], quantized: bool, touched: int):
    """One page. `pending` says which slots are being written."""
    count = len(turned) * (2 if quantized else 1)
    new, refs = refs[: len(turned)], refs[len(turned) + count :]  # the pools come again, as outputs
    hbm, buffers, (writes, reads, pending) = refs[:count], refs[count : 2 * count], refs[2 * count :]
    step = pl.program_id(0) * touched + pl.program_id(1)
    slot = jax.lax.rem(step, SLOTS)
    where, begin, end = where_ref[step], from_ref[step], to_ref[step]
    page = buffers[-1].shape[-1]

    def copies(slot, where, *, write: bool):
        pairs = [(buffer.at[slot], pool.at[where]) for pool, buffer in zip(hbm, buffers, strict=True)]
        if write:
            return [pltpu.make_async_copy(*pair, writes.at[slot]) for pair in pairs]
        return [pltpu.make_async_copy(pool, buffer, reads) for buffer, pool in pairs]

    def finish(slot):
        @pl.when(pending[slot] == 1)
        def _():
            _wait(copies(slot, 0, write=True))
            pending[slot] = 0

    @pl.when(step == 0)
    def _():
        for i in range(SLOTS):
            pending[i] = 0

    @pl.when(where >= 0)
    def _():
        finish(slot)

        @pl.when((begin > 0) | (end < page))
        def _():
            _wait(_started(copies(slot, where, write=False)))

        _put(new, turned, [buffer.at[slot] for buffer in buffers], begin, end)
        _started(copies(slot, where, write=True))
        pending[slot] = 1

    @pl.when(step == pl.num_programs(0) * touched - 1)
    def _():
        for i in range(SLOTS):
            finish(i)


def _started(copies):
    for copy in copies:
        copy.start()
    return copies


def _wait(copies):
    for copy in copies:
        copy.wait()


def _put(new, turned, buffers, begin, end):
    """Tokens [begin, end) of each block [1, k, page, h] into the page in `buffers`."""
    width = len(buffers) // len(new)
    for i, (x, turn) in enumerate(zip(new, turned, strict=True)):
        pages, scale = (*buffers[i * width : (i + 1) * width], None)[:2]
        for head in range(x.shape[1]):
            _put_head(x[0, head].astype(jnp.float32), pages.at[head], scale, head, turn, begin, end)


def _put_head(x, page_ref, scale_ref, head: int, turn: bool, begin, end):
    """Tokens [begin, end) of x [page, h] into a page of one head, and their scales."""
    tokens = x.shape[0]

    def among(shape, axis: int):
        at = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (at >= begin) & (at < end)

    if scale_ref is not None:
        largest = LARGEST[jnp.dtype(page_ref.dtype)]
        scale = jnp.max(jnp.abs(x.T), axis=0, keepdims=True) / largest  # tokens are lanes, as in the pool
        scale_ref[head : head + 1] = jnp.where(among((1, tokens), 1), scale, scale_ref[head : head + 1])
        scale = jnp.max(jnp.abs(x), axis=1, keepdims=True) / largest
        inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1.0), 0.0)
        x = jnp.clip(jnp.round(x * inverse), -largest, largest)
    x = x.T if turn else x
    kept = jnp.where(among(x.shape, 1 if turn else 0), x, wide(page_ref[...]))
    page_ref[...] = narrow(kept, page_ref.dtype)


def wide(x):
    """Float32; integers by way of int32, the one way that every chip has."""
    return (
        x.astype(jnp.int32).astype(jnp.float32)
        if jnp.issubdtype(x.dtype, jnp.integer)
        else x.astype(jnp.float32)
    )


def narrow(x, dtype):
    return x.astype(jnp.int32).astype(dtype) if jnp.issubdtype(dtype, jnp.integer) else x.astype(dtype)


def _page(pool: Pool) -> int:
    return pool.pages.shape[3 if pool.turned else 2]


def _bits(dtype) -> int:
    return 4 if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize
