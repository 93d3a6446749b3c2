"""One new token of each sequence written into pages on TPUs, without a loop of XLA's over the sequences.

    read     strip 0 | strip 1 | strip 2 | …            the page, or of keys the few rows around the token
    put                strip 0 | strip 1 | strip 2 | …  quantized, beside what was there
    write                        strip 0 | strip 1 | …  two sequences share no page, so that the order is free

Values lie with their tokens along the lanes, and memory is written in whole lanes: so a page of them is read and
written for one token, 2·k·h·page numbers. Of keys it is a strip of `STRIP` tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from maxstack.kernels.paged_attention.cache import LARGEST, Pool
from maxstack.kernels.paged_attention.mosaic_tpu_append import LANES, narrow, wide

MOST_TOKENS = 8
"""Of a sequence at once; each is a call of its own."""
SLOTS, AHEAD = 4, 2
"""Strips in flight, and how many steps ahead they are read."""
SUBLANES = 8
STRIP_BYTES = 32
"""Rows of a tile: 8 of 4 bytes, 16 of 2, 32 of 1."""


def declined(pools: list[Pool]) -> str | None:
    """Why tokens are not written one call for all sequences; None if they are."""
    page, (_, t, _, h) = page_of(pools[0]), pools[0].new_btkh.shape
    if t > MOST_TOKENS:
        return f"{t} tokens a sequence; it takes {MOST_TOKENS} at most"
    if page % LANES or h % 64:
        return f"pages of {page} tokens with {h} components; it needs multiples of {LANES} and 64"
    if any(pool.pages.dtype == jnp.uint8 for pool in pools):
        return "pairs of 4-bit numbers in uint8 are made for the CPU"
    return None


def append_token(
    pools: list[Pool], page_b: Int[Array, "b"], place_b: Int[Array, "b"], *,
    interpret: bool | pltpu.InterpretParams = False,
) -> list[tuple[Array, Array | None]]:  # fmt: skip
    """(pages, scale) of each pool with the one new token of each sequence at its place of its page; the old ones are
    used up. A page that the pool has not is that of a token to drop."""
    count, b = pools[0].pages.shape[0], len(page_b)
    page_b = jnp.where((page_b >= 0) & (page_b < count), page_b, -1).astype(jnp.int32)
    new = [filled(pool.new_btkh[:, 0]) for pool in pools]
    held = [array for pool in pools for array in (pool.pages, pool.scale) if array is not None]
    written = pl.pallas_call(
        functools.partial(_kernel, turned=[pool.turned for pool in pools], scaled=pools[0].scale is not None),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in held],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b,),
            in_specs=[pl.BlockSpec((1, *x.shape[1:]), lambda i, *_: (i, 0, 0)) for x in new]
            + [pl.BlockSpec(memory_space=pl.ANY)] * len(held),
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(held),
            scratch_shapes=[
                *(
                    pltpu.VMEM((SLOTS, *shape), array.dtype)
                    for shape, array in zip(strips(pools), held, strict=True)
                ),
                pltpu.SemaphoreType.DMA((SLOTS,)),
                pltpu.SemaphoreType.DMA((SLOTS,)),
            ],
        ),
        input_output_aliases={2 + len(new) + i: i for i in range(len(held))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="append_token",
    )(page_b, place_b.astype(jnp.int32), *new, *held)
    arrays = iter(written)
    return [(next(arrays), None if pool.scale is None else next(arrays)) for pool in pools]


def page_of(pool: Pool) -> int:
    """Tokens of a page."""
    return pool.pages.shape[3 if pool.turned else 2]


def strip(dtype: jnp.dtype) -> int:
    """Rows of keys that are read and written for one."""
    return 2 * STRIP_BYTES if dtype == jnp.int4 else STRIP_BYTES // jnp.dtype(dtype).itemsize


def strips(pools: list[Pool]) -> list[tuple[int, ...]]:
    """What is read and written of each array for one token."""
    found: list[tuple[int, ...]] = []
    for pool in pools:
        _, k, *page = pool.pages.shape
        found.append((k, *page) if pool.turned else (k, strip(pool.pages.dtype), page[1]))
        found += [] if pool.scale is None else [pool.scale.shape[1:]]
    return found


def filled(x_bkh: Array) -> Array:
    """In float32, heads and components filled up to whole tiles, which can be turned."""
    _, k, h = x_bkh.shape
    return jnp.pad(x_bkh.astype(jnp.float32), ((0, 0), (0, -k % SUBLANES), (0, -h % LANES)))


def _kernel(page_ref, place_ref, *refs, turned: list[bool], scaled: bool):  # noqa: C901, a ring of copies
    """One sequence's token."""
    count = len(turned) * (2 if scaled else 1)
    new, refs = refs[: len(turned)], refs[len(turned) + count :]  # the pools come again, as outputs
    hbm, buffers, (reads, writes) = refs[:count], refs[count : 2 * count], refs[2 * count :]
    i, last = pl.program_id(0), pl.num_programs(0) - 1
    rows = [buffer.shape[2] for buffer in buffers]

    def copies(j, *, write: bool):
        """Those of sequence `j`."""
        slot, where, place = jax.lax.rem(j, SLOTS), page_ref[j], place_ref[j]
        for at, (pool, buffer) in enumerate(zip(hbm, buffers, strict=True)):
            keys = at % (2 if scaled else 1) == 0 and not turned[at // (2 if scaled else 1)]
            start = pl.multiple_of(jax.lax.div(place, rows[at]) * rows[at], rows[at])
            part = pool.at[where, :, pl.ds(start, rows[at])] if keys else pool.at[where]
            pair = (buffer.at[slot], part) if write else (part, buffer.at[slot])
            yield pltpu.make_async_copy(*pair, (writes if write else reads).at[slot])

    def each(j, do, *, write: bool):
        @pl.when((j >= 0) & (j <= last) & (page_ref[jnp.clip(j, 0, last)] >= 0))
        def _():
            for copy in copies(j, write=write):
                do(copy)

    start, wait = (lambda copy: copy.start()), (lambda copy: copy.wait())

    @pl.when(i == 0)
    def _():
        for j in range(AHEAD):
            each(j, start, write=False)

    each(i + AHEAD - SLOTS, wait, write=True)
    each(i + AHEAD, start, write=False)

    @pl.when(page_ref[i] >= 0)
    def _():
        slot = jax.lax.rem(i, SLOTS)
        for copy in copies(i, write=False):
            copy.wait()
        width = 2 if scaled else 1
        for at, (x, turn) in enumerate(zip(new, turned, strict=True)):
            own = [buffer.at[slot] for buffer in buffers[at * width : (at + 1) * width]]
            _put(x[0], own[0], own[1] if scaled else None, turn, place_ref[i])
        for copy in copies(i, write=True):
            copy.start()

    @pl.when(i == last)
    def _():
        for back in range(SLOTS - AHEAD - 1, -1, -1):
            each(i - back, wait, write=True)


def _put(x_kh, page_ref, scale_ref, turn: bool, place):
    """A token's heads, filled up, at its place of a strip."""
    heads, shape = page_ref.shape[0], page_ref.shape[1:]
    if scale_ref is not None:
        largest = LARGEST[jnp.dtype(page_ref.dtype)]
        scale_k1 = jnp.max(jnp.abs(x_kh), axis=1, keepdims=True) / largest
        inverse = jnp.where(scale_k1 > 0, 1 / jnp.where(scale_k1 > 0, scale_k1, 1.0), 0.0)
        x_kh = jnp.clip(jnp.round(x_kh * inverse), -largest, largest)
        here = jax.lax.broadcasted_iota(jnp.int32, scale_ref.shape, 1) == place
        scale_ref[...] = jnp.where(here, scale_k1[:heads], scale_ref[...])
    at = jax.lax.broadcasted_iota(jnp.int32, shape, 1 if turn else 0)
    here = at == (place if turn else jax.lax.rem(place, shape[0]))
    x_hk = x_kh.T if turn else x_kh
    for head in range(heads):
        row = x_hk[: shape[0], head : head + 1] if turn else x_kh[head : head + 1, : shape[1]]
        page_ref[head] = narrow(jnp.where(here, row, wide(page_ref[head])), page_ref.dtype)
