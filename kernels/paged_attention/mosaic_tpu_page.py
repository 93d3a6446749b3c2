"""A page in VMEM and the running softmax of the queries that see it, for the kernel of mosaic_tpu.py; two forms.

Few queries, one to a hundred or so rows of a kv head, lie down and keys across: [rows, page].

    logits = q·kᵀ × scale of k        out [rows, w] += (weights × scale of v)·vᵀ

A chunk of a prompt has keys down and rows across, [page, rows], a block of rows after another: what is known of a row
is then one lane of one row, its largest logit and its sum run over sublanes, and v, which lies transposed, is the left
operand as it is. Blocks that see nothing of a page are left out; those that see all of it have no mask.

    logits = k·qᵀ × scale of k        out [w, rows] += v·(weights × scale of v)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxstack.kernels.paged_attention.plan import Options

LANES = 128


class Call(NamedTuple):
    """What is known of a call when its kernel is made."""

    options: Options
    each: int
    """Queries of a piece."""
    heads: int
    """Kv heads of a piece."""
    latent: bool
    """One pool is keys and values."""
    turned: bool
    """Keys are [h, page], not [page, h]."""
    value_size: int
    chunk: bool
    """The second form."""


class Sums(NamedTuple):
    """Of a piece, in VMEM: [heads, m, …], or [heads, blocks, …, rows of a block] of a chunk."""

    out: Any
    top: Any
    total: Any


def block_rows(m: int) -> int:
    """Rows of a block of a chunk with `m`, a multiple of 128: two matrix units wide at the most."""
    return LANES if m % (2 * LANES) else 2 * LANES


def sums_shapes(call: Call, m: int) -> list[Any]:
    """Scratch that holds `Sums`, of `m` rows a head."""
    heads, w = call.heads, call.value_size
    if not call.chunk:
        return [pltpu.VMEM((heads, m, size), jnp.float32) for size in (w, LANES, LANES)]
    rows = block_rows(m)
    return [pltpu.VMEM((heads, m // rows, size, rows), jnp.float32) for size in (w, 1, 1)]


def clear(sums: Sums) -> None:
    """Nothing is seen yet."""
    sums.out[...] = jnp.zeros_like(sums.out)
    sums.top[...] = jnp.full_like(sums.top, -jnp.inf)
    sums.total[...] = jnp.zeros_like(sums.total)


def use_page(call: Call, q_ref, buffers, page, end, first_head, sums: Sums) -> None:
    """Update the running softmax of every head of a piece with one page.

    `end` is one past the last query's position, `first_head` the place of the piece's heads in the pages' scales,
    which have all heads; other than 0 of a chunk alone.
    """
    keys, values = (buffers[0], buffers[0]) if call.latent else buffers[:2]
    scales = buffers[1:] * 2 if call.latent else buffers[2:]
    tokens = values.shape[-1]
    left = end - page * tokens  # tokens of this page that some query sees
    if keys.dtype not in (jnp.int8, jnp.int4):
        _clean(values, left, call.each)
    if call.chunk:
        _use_by_block(call, q_ref, keys, values, scales, first_head, left, sums)
    else:
        _use_by_row(call, q_ref, keys, values, scales, left, sums)


def _clean(values, left, each: int) -> None:
    """What no query sees may be anything, nan too, and 0 · nan is nan. So may be what only later queries see, which
    may be padding: there what is not finite becomes 0."""
    heads, _, tokens = values.shape

    @pl.when(left < tokens + each - 1)
    def _():
        for head in range(heads):
            lanes = jax.lax.broadcasted_iota(jnp.int32, values.shape[1:], 1)
            wide = values[head].astype(jnp.float32)
            kept = (lanes < left) & ((lanes <= left - each) | (jnp.abs(wide) < jnp.inf))
            values[head] = jnp.where(kept, wide, 0.0).astype(values.dtype)


def _visible(distance, window: int | None):
    """Whether a query sees a key that lies `distance` before it."""
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _capped(logits, softcap: float | None):
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _use_by_row(call: Call, q_ref, keys, values, scales, left, sums: Sums) -> None:
    """Rows down, keys across."""
    heads, m, _ = q_ref.shape
    tokens, dtype, (acc, top, total) = values.shape[-1], q_ref.dtype, sums
    lanes = jax.lax.broadcasted_iota(jnp.int32, (m, tokens), 1)
    rows = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (m, tokens), 0), m // call.each)
    visible = _visible(left - call.each + rows - lanes, call.options.window)
    for head in range(heads):
        logits = _dot(q_ref[head], keys[head].astype(dtype), ((1,), (0 if call.turned else 1,)))
        if scales:
            logits = logits * scales[0][head][None]
        logits = jnp.where(visible, _capped(logits, call.options.softcap), -jnp.inf)
        before = top[head, :, :1]
        after = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        base = jnp.where(after == -jnp.inf, 0.0, after)
        keep = jnp.exp(before - base)
        weights = jnp.exp(logits - base)
        added = total[head, :, :1] * keep + jnp.sum(weights, axis=1, keepdims=True)
        total[head] = jnp.broadcast_to(added, total.shape[1:])
        top[head] = jnp.broadcast_to(after, top.shape[1:])
        if scales:
            weights = jnp.where(visible, weights * scales[1][head][None], 0.0)
        part = _dot(weights.astype(dtype), values[head, : call.value_size].astype(dtype), ((1,), (1,)))
        acc[head] = acc[head] * keep + part


def _use_by_block(call: Call, q_ref, keys, values, scales, first_head, left, sums: Sums) -> None:
    """Keys down, rows across, block after block."""
    heads, blocks, rows, _ = q_ref.shape
    tokens, dtype, window = values.shape[-1], q_ref.dtype, call.options.window
    group = blocks * rows // call.each

    for head in range(heads):
        k_sh = keys[head]
        k_sh = k_sh.astype(jnp.float32).T.astype(dtype) if call.turned else k_sh.astype(dtype)
        v_ws = values[head, : call.value_size].astype(dtype)
        scale_sr = [_down(scale[pl.ds(first_head + head, 1)], rows) for scale in scales]

        def update(block, visible, *, head=head, k_sh=k_sh, v_ws=v_ws, scale_sr=scale_sr):
            logits = _dot(k_sh, q_ref[head, block], ((1,), (1,)))
            if scale_sr:
                logits = logits * scale_sr[0]
            logits = _capped(logits, call.options.softcap)
            if visible is not None:
                logits = jnp.where(visible, logits, -jnp.inf)
            before = sums.top[head, block]
            after = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
            base = jnp.where(after == -jnp.inf, 0.0, after)
            keep, weights = jnp.exp(before - base), jnp.exp(logits - base)
            sums.total[head, block] = sums.total[head, block] * keep + jnp.sum(weights, axis=0, keepdims=True)
            sums.top[head, block] = after
            if scale_sr:
                weights = weights * scale_sr[1]
                weights = weights if visible is None else jnp.where(visible, weights, 0.0)
            part = _dot(v_ws, weights.astype(dtype), ((1,), (0,)))
            sums.out[head, block] = sums.out[head, block] * keep + part

        @pl.loop(0, blocks)
        def _(block, update=update):
            # Of the first and the last query of the block, to the first key of the page.
            first = left - call.each + jax.lax.div(block * rows, group)
            last = left - call.each + jax.lax.div(block * rows + rows - 1, group)
            some, whole = last >= 0, first >= tokens - 1
            if window is not None:
                some, whole = some & (first - tokens + 1 < window), whole & (last < window)

            @pl.when(whole)
            def _():
                update(block, None)

            @pl.when(some & jnp.logical_not(whole))
            def _():
                row = block * rows + jax.lax.broadcasted_iota(jnp.int32, (tokens, rows), 1)
                key = jax.lax.broadcasted_iota(jnp.int32, (tokens, rows), 0)
                update(block, _visible(left - call.each + jax.lax.div(row, group) - key, window))


def _down(scale_1s, rows: int):
    """[s, rows] of one number a key, [1, s]."""
    square = jnp.broadcast_to(scale_1s, (LANES, scale_1s.shape[1])).T
    return jnp.concatenate([square] * (rows // LANES), axis=1)


def finish(call: Call, sums: Sums, out_ref, lse_ref) -> None:
    """Write a piece's output and log-sum-exp. What saw nothing has total 0 and top -inf."""
    if not call.chunk:
        safe = jnp.where(sums.total[...] > 0, sums.total[...], 1.0)
        out_ref[...] = sums.out[...] / safe[:, :, :1]
        lse_ref[...] = sums.top[...] + jnp.log(safe)
        return
    for head in range(call.heads):

        @pl.loop(0, sums.out.shape[1])
        def _(block, head=head):
            total = sums.total[head, block]
            safe = jnp.where(total > 0, total, 1.0)
            out_ref[head, block] = (sums.out[head, block] / safe).T.astype(out_ref.dtype)
            lse_ref[head, block] = sums.top[head, block] + jnp.log(safe)


def _dot(a, b, contract):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
