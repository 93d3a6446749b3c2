"""What the Hopper kernels of attention over pages share: sizes, blocks of shared memory, values that must not count."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from maxstack.kernels import dispatch
from maxstack.kernels.paged_attention.plan import Options

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


def seen(values, otherwise: float, *, left, options: Options, each: int, group: int):
    """`values` [tokens, m] with `otherwise` for keys that a query does not see; `left` keys are at or before the last
    of `each` queries. Most pages are seen whole: they are left as they are, without a mask."""
    tokens, m = values.shape
    partly = left < tokens + each - 1
    if options.window is not None:
        partly |= left > options.window

    def hide(values):
        keys = plgpu.broadcasted_iota(jnp.int32, (tokens, m), 0, layout=ROWS)
        behind = left - 1 - keys  # the last query
        for later in range(1, each):
            rows = plgpu.broadcasted_iota(jnp.int32, (tokens, m), 1, layout=ROWS)
            behind = behind - jnp.where(rows < later * group, 1, 0)
        visible = behind >= 0
        if options.window is not None:
            visible &= behind < options.window
        return jnp.where(visible, values, otherwise)

    return lax.cond(partly, hide, lambda values: values, values)
