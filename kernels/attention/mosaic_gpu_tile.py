"""What the Hopper kernels of attention share: sizes of blocks, scratch, products, and the mask inside of a tile."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from maxstack.kernels import tiles
from maxstack.kernels.attention.masks import Coordinates, Options

LOG2E = math.log2(math.e)
ROWS = 64
"""Rows of a tile of one warpgroup: `wgmma` multiplies 64 at a time."""
COMPUTE = 2
"""Warpgroups of a block that compute; one more moves memory."""
# A block is launched with 168 registers for each of 384 threads, which the warpgroups share out: 2·240 + 24 = 3·168.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24
TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)
COLUMN = TILE.reduce(0)
LOW = -1e30
"""The largest logit before any was seen: finite, so that a hidden one, -inf, weighs exp2(-inf - LOW) = 0."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Sizes of the blocks on Hopper; they change speed and shared memory, not the result."""

    forward_key: int
    """Keys a step of the forward kernel (positions); queries are 2·64 a block."""
    dq_key: int
    """Keys a step of the kernel of the queries' gradient (positions)."""
    dkv_query: int
    """Queries a step of the kernel of the keys' and values' gradients (positions)."""
    split_dkv: bool
    """One warpgroup sums the keys' gradient and the other the values', for the same 64 keys; else each sums both,
    of 64 keys of its own. For head sizes whose two sums do not fit one warpgroup's registers."""
    stages: int = 2
    """Steps whose blocks are in shared memory at a time."""
    through_shared: bool = False
    """Left operands in registers go through shared memory instead, and sums are added after each product: what the
    interpreter of GPU kernels can follow. Nothing else differs."""

    @staticmethod
    def of(h: int, w: int, softcap: float | None = None, packed: bool = False) -> "Blocks":
        """For a head size of queries and keys, and one of values. The slope of a soft cap needs registers too, and so
        do segments."""
        split = h + w > (256 if softcap is None else 192)
        if h > 192:
            queries = 64 if softcap is None else 32
            keys = 32 if softcap is None and not packed else 16
            return Blocks(forward_key=64, dq_key=keys, dkv_query=queries, split_dkv=split)
        return Blocks(forward_key=128, dq_key=64, dkv_query=64, split_dkv=split)


AXES = {
    "forward": {"forward_key": (64, 128, 256)},
    "backward": {"dq_key": (32, 64, 128), "dkv_query": (32, 64, 128)},
}


def blocks_for(
    which: str, q_btnh: jax.Array, v_bskw: jax.Array, softcap: float | None, at: Coordinates
) -> Blocks:
    """What the tables have for the "forward" or "backward" pass of a call, else `Blocks.of`."""
    (t, h), (s, w) = q_btnh.shape[1::2], v_bskw.shape[1::2]
    packed = at.q_segments is not None
    shape = {"t": tiles.about(t), "s": tiles.about(s), "h": h, "w": w}
    shape |= {"cap": int(softcap is not None), "packed": int(packed)}
    blocks, axes = Blocks.of(h, w, softcap, packed), AXES[which]
    rule = {name: getattr(blocks, name) for name in axes}
    found: dict[str, Any] = tiles.chosen(
        f"attention.mosaic_gpu.{which}", q_btnh.dtype, shape, rule, axes=axes, fault=_fault
    )
    return replace(blocks, **found)


def _fault(sizes: tiles.Sizes) -> str | None:
    """A product takes 8 to 256 columns; blocks are swizzled by 32 bytes at least."""
    wrong = {name: size for name, size in sizes.items() if size % 16 or size > 256}
    return f"blocks of {wrong}; they must be multiples of 16 up to 256" if wrong else None


def shared(shape: tuple[int, ...], dtype, widest: int = 128):
    """A block as `wgmma` and TMA want it: tiles of 8 rows, swizzled over the widest span that divides a row (bytes).

    A right operand needs as many rows as the span has numbers, and both operands the same span: hence `widest`.
    """
    span = next(span for span in (128, 64, 32) if span <= widest and shape[-1] * 2 % span == 0)
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, span // 2)), plgpu.SwizzleTransform(span))
    )


def launch(
    body: Callable[..., None],
    inputs: dict[str, jax.Array | None],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    scratch: dict[str, Any],
    grid: tuple[int, int, int],
) -> tuple[jax.Array, ...]:
    """Runs `body(of, *outputs, **scratch)`, `of` the inputs by name; the grid is (head, group of rows, batch row)."""
    given = {name: array for name, array in inputs.items() if array is not None}

    def kernel(*refs, **scratch):
        body(dict(zip(given, refs, strict=False)), *refs[len(given) :], **scratch)

    return plgpu.kernel(
        kernel,
        out_type=outputs,
        scratch_types=scratch,
        grid=grid,
        grid_names=("head", "group", "row"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=body.__name__,
    )(*given.values())


def stream(first, last, stages: int, free, fetch: Callable[[Any, Any], None]) -> None:
    """What the warpgroup that moves memory does: `fetch(step, slot)` of each step, into the slot that the step
    `stages` before has left, and at the end it waits until all are left. `free` is their barrier."""

    def slot_of(step):
        return lax.rem(step - first, jnp.int32(stages))

    def load(step, _):
        pl.when(step - first >= stages)(lambda: plgpu.barrier_wait(free.at[slot_of(step)]))
        fetch(step, slot_of(step))

    def drain(step, _):
        plgpu.barrier_wait(free.at[slot_of(step)])

    lax.fori_loop(first, last, load, None)
    lax.fori_loop(jnp.maximum(last - stages, first), last, drain, None)


def in_eights(x: jax.Array) -> jax.Array:
    """`x` with its sequence, the second dimension, filled up to whole tiles; the rest of a block TMA fills itself."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)))


def zeros(*shape: int) -> jax.Array:
    """A sum in the registers of a warpgroup."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE)


def row_of(x: jax.Array | float) -> jax.Array:
    """One number for each row of a tile."""
    return plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), ROW)


def product(a, b) -> jax.Array:
    """a @ b of two blocks in shared memory, waited for."""

    def multiply(total):
        plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def add_products(
    totals: tuple[jax.Array, ...], lefts: tuple, rights: tuple, spare: Any
) -> tuple[jax.Array, ...]:
    """total + left @ right of each, begun one after another and waited for together.

    A left operand is in registers or in shared memory; `spare` is where the interpreter finds those in registers and
    says that it interprets, None on the hardware.
    """
    if spare is None:

        def multiply(held):
            for total, left, right in zip(held, lefts, rights, strict=True):
                plgpu.wgmma(total, left, right)

        held: Any = tuple(plgpu.ACC.init(total) for total in totals)
        return pl.run_state(multiply)(held)
    sums = []
    for total, left, right in zip(totals, lefts, rights, strict=True):
        if isinstance(left, jax.Array):
            spare[...] = left
            plgpu.commit_smem()
            left = spare
        sums.append(total + product(left, right))
    return tuple(sums)


def across(row: jax.Array, like: jax.Array) -> jax.Array:
    """A number a row, for each column of a tile."""
    return lax.broadcast_in_dim(row, like.shape, [0])


def capped(products: jax.Array, options: Options) -> jax.Array:
    """What `log_factor` makes logits of: the products themselves, or the tanh of a soft cap.

    tanh y = 1 - 2 / (1 + e^2y): `tanh.approx` is wrong by 2^-11, which a soft cap of 50 makes 0.02 of a logit. There
    is no approximate reciprocal to call, but 1/x = rsqrt(x)².
    """
    if options.softcap is None:
        return products
    root = lax.rsqrt(jnp.exp2(products * (2 * LOG2E * options.scale / options.softcap)) + 1)
    return 1 - 2 * root * root


def log_factor(options: Options) -> float:
    """Logits in powers of two are this times `capped`. It is left to be folded into what follows."""
    return (options.scale if options.softcap is None else options.softcap) * LOG2E


@dataclass(frozen=True)
class Side:
    """The queries or the keys of a tile, along its rows or its columns."""

    start: jax.Array
    """Index of the first."""
    along: int
    """0: each has a row of the tile, 1: a column."""
    ids: list[jax.Array]
    """Positions, then segments, of those that are given; in the layout of a row or a column."""


def masked(
    x: jax.Array, options: Options, q: Side, kv: Side, keys: int | None, given: tuple[bool, bool], hidden
):
    """`x` of a tile, with `hidden` where a query does not see a key.

    `given` says whether there are positions, and segments; `keys` is the number of keys where blocks reach beyond.
    """

    def index(side: Side):
        return plgpu.broadcasted_iota(jnp.int32, x.shape, side.along, layout=TILE) + side.start

    def spread(side: Side, which: int):
        return lax.broadcast_in_dim(side.ids[which], x.shape, [side.along])

    positioned, packed = given
    tests = []
    if options.causal or options.window is not None:
        q_at, kv_at = (spread(side, 0) if positioned else index(side) for side in (q, kv))
        if options.causal:
            tests.append(q_at >= kv_at)
        if options.window is not None:
            tests.append(q_at - kv_at < options.window)
    if packed:
        kv_segments = spread(kv, int(positioned))
        tests += [spread(q, int(positioned)) == kv_segments, kv_segments > 0]
    if keys is not None:
        tests.append(index(kv) < keys)
    if not tests:
        return x
    seen = tests[0]
    for test in tests[1:]:
        seen = seen & test
    return jnp.where(seen, x, hidden)


def weights_and_gradients(options: Options, logits, dweights, lse: jax.Array, delta: jax.Array, hide, spare):
    """(P, dS) of a tile of the backward pass, in float32.

    `logits` and `dweights` are (left, right) of a product in shared memory; `lse`, in powers of two, and `delta` are
    spread over the tile. The sums start at what would be taken from them afterwards, which then needs no registers.
    """
    factor = log_factor(options)
    start = lse * (-1 / factor) if options.softcap is None else zeros(*lse.shape)
    lefts, rights = zip(logits, dweights, strict=True)
    x, dp = add_products((start, -delta), lefts, rights, spare)
    if options.softcap is None:
        p = jnp.exp2(hide(x) * factor)
        return p, p * dp
    x = capped(x, options)
    p = jnp.exp2(hide(x) * factor - lse)
    return p, p * dp * (1 - x * x)
