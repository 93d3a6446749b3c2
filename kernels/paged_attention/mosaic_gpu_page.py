"""What the Hopper kernels of attention over pages share: sizes, blocks of shared memory, values that must not count."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from maxstack.kernels import dispatch

PAGE = 128
SMS = 132
HIDDEN = -1e30
"""Where the running maximum starts: finite, so that a difference with it is no nan."""
ROWS = plgpu.Layout.WGMMA


def not_hopper() -> str | None:
    """The reason where this is no Hopper GPU."""
    here = dispatch.chip()
    return dispatch.only_on("gpu") or (
        None if here.name.startswith("sm90") else f"{here.name} is not Hopper (sm90)"
    )


def tiles(columns: int, kind):
    """How rows of `columns` numbers lie in shared memory: swizzled over the widest span that divides a row."""
    bits = 4 if kind == jnp.int4 else 8 * jnp.dtype(kind).itemsize
    swizzle = next(span for span in (128, 64, 32) if columns * bits // 8 % span == 0)
    return (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))


def clear_values(values_ref, left, each: int):
    """Zeros for values [rows, tokens] from `left` on, which no query sees: they may be anything, nan too, and 0 · nan
    is nan. So may those be that only later ones of `each` queries see, which may be padding: of these what is not
    finite becomes 0."""
    rows, tokens = values_ref.shape
    for row in range(0, rows, 64):  # a few registers at a time
        for column in range(0, tokens, 64):
            part = values_ref.at[pl.ds(row, 64), pl.ds(column, 64)]
            values = plgpu.load(part, layout=ROWS)
            keys = plgpu.broadcasted_iota(jnp.int32, (64, 64), 1, layout=ROWS) + column
            kept = keys < left
            if each > 1:
                kept &= (keys <= left - each) | (jnp.abs(values.astype(jnp.float32)) < jnp.inf)
            part[...] = jnp.where(kept, values, jnp.zeros_like(values))
