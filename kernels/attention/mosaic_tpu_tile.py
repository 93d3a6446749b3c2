"""What the TPU kernels of attention share: one chunk of keys against one block of queries, keys down, queries across.

A tile of logits is [chunk of keys, rows of queries]. So the statistics of a query are one lane of a [1, rows] row,
largest and sum run over sublanes, which is elementwise but for the last eight, and head sizes below 128 fill all lanes
of what is summed, [head size, rows].
"""

import functools
import operator
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from maxstack.kernels.attention.masks import Options
from maxstack.kernels.attention.mosaic_tpu_tiling import LANES, Scalars, Tiling

LOG2_E = 1.4426950408889634
"""Logits are held times this: the chip's own exponential has base 2."""


def product(left, right, left_dim: int, right_dim: int):
    """Contracts these dimensions into float32; float32 inputs are not rounded to bfloat16 on the way."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, precision=precision, preferred_element_type=jnp.float32)


def logits(options: Options, k_ch, q_rh):
    """[chunk, rows] in base 2, and the tanh of a soft cap (None without one), which its derivative needs."""
    raw = product(k_ch, q_rh, 1, 1)
    if options.softcap is None:
        return raw * (options.scale * LOG2_E), None
    tanh = jnp.tanh(raw * (options.scale / options.softcap))
    return tanh * (options.softcap * LOG2_E), tanh


def visible(options: Options, tiling: Tiling, i, chunk, q_ids: Mapping, kv_ids: Mapping):
    """Mask [chunk, rows] of query block i. Ids are [1, rows] and [1, chunk] by name, "segment" and "position", as far
    as they are given; a position that is not given is the index."""
    shape = (tiling.chunk, tiling.rows)
    index = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + chunk * tiling.chunk
    parts = []
    if tiling.padded_keys:
        parts.append(index < tiling.s)
    if "segment" in q_ids:
        kv_segment = _column(kv_ids["segment"])
        parts += [kv_segment == q_ids["segment"], kv_segment > 0]
    if options.causal or options.window is not None:
        position = q_ids["position"] if "position" in q_ids else _indices(tiling, i)
        key = _column(kv_ids["position"]) if "position" in kv_ids else index
        if options.causal:
            parts.append(key <= position)
        if options.window is not None:
            parts.append(key > position - options.window)
    mask = jnp.broadcast_to(parts[0], shape)
    for part in parts[1:]:
        mask = mask & part
    return mask


def _indices(tiling: Tiling, i):
    """[1, rows]: indices of the queries of block i; rows go through the heads one after another."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, tiling.rows), 1)
    return (lane if tiling.heads == 1 else jax.lax.rem(lane, tiling.query)) + i * tiling.query


def _column(row):
    """[chunk, 1] of [1, chunk]; whole registers are transposed."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def each_chunk(scalars: Scalars, ref, row, i, j, body: Callable) -> None:
    """`body(c, masked)` for the chunks of key block j that query block i sees; c counts from the block's first.

    A block without partly hidden chunks is straight code, in which products of one chunk can overlap with
    exponentials of another. In the others each chunk is tried.
    """
    chunks = scalars.tiling.chunks
    masked = [scalars.needs_mask(ref, row, i, j * chunks + c) for c in range(chunks)]
    some = functools.reduce(operator.or_, masked)

    def unmasked():
        for c in range(chunks):
            body(c, False)

    if some is False:
        unmasked()
        return
    pl.when(jnp.logical_not(some))(unmasked)

    @pl.when(some)
    def _():
        @pl.loop(0, chunks)
        def _(c):
            @pl.when(scalars.has_work(ref, row, i, j * chunks + c))
            def _():
                body(c, True)
