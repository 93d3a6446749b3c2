"""Attention in blocks, as XLA compiles it: the weights of all pairs are never held at once.

Forward and backward follow FlashAttention-2 (Dao 2023, arXiv:2307.08691): the backward pass makes the weights
again from the kept log-sum-exp. One step serves some pairs (batch row, kv head) with all `g` query heads of each,
as many as keep its logits inside a processor's caches; a call that fits whole (short, or decoding) is one step
without a loop. Inside of a step:

- few query blocks: each is unrolled, with the static range of keys that indices allow, in one piece;
- many: loops over query blocks and over the key blocks that are visible by the bounds of positions and segments.
"""

from functools import partial

import jax
import jax.numpy as jnp

from maxstack.kernels.attention import looped, tile, unrolled
from maxstack.kernels.attention.blocks import Blocks, blocks_for, pairs_a_step
from maxstack.kernels.attention.derivative import differentiable
from maxstack.kernels.attention.masks import Coordinates, Options


def declined(q_btnh, k_bskh, v_bskw, options: Options, at: Coordinates, config: object) -> str | None:
    """Why this backend cannot serve a call: only for blocks of another one."""
    if config is None or isinstance(config, Blocks):
        return None
    return f"it takes blocks.Blocks, and config is {type(config).__name__}"


def _forward(options, blocks, q_btnh, k_bskh, v_bskw, sinks_n, at):
    b, t, n, _ = q_btnh.shape
    s, k, _ = v_bskw.shape[1:]
    blocks = blocks or blocks_for("forward", q_btnh, k_bskh, v_bskw)
    drive = _drive(t, s, at, blocks)
    q, kk, v = _pairs_q(q_btnh, k), _pairs_kv(k_bskh), _pairs_kv(v_bskw)
    top, total, out = _in_steps(
        lambda q, kk, v, at: drive.forward(q, kk, v, at, options, blocks),
        blocks,
        (q, kk, v, _pairs_at(at, k)),
        q,
        s,
        _alike(at, b, k),
    )
    lse = jnp.where(total == 0, -jnp.inf, tile.finite(top) + jnp.log(total))
    if sinks_n is not None:
        lse = jnp.logaddexp(lse, jnp.tile(sinks_n.astype(lse.dtype).reshape(k, n // k, 1), (b, 1, 1)))
    out = out * jnp.where(lse == -jnp.inf, 0, jnp.exp(tile.finite(top) - lse))[..., None]
    return _unpaired(out.astype(q_btnh.dtype), b), _unpaired(lse[..., None], b)[..., 0]


def _backward(options, blocks, q_btnh, k_bskh, v_bskw, at, lse, delta, dout):
    b, t, n, h = q_btnh.shape
    s, k = k_bskh.shape[1:3]
    blocks = blocks or blocks_for("backward", q_btnh, k_bskh, v_bskw)
    drive = _drive(t, s, at, blocks)
    q, kk, v = _pairs_q(q_btnh, k), _pairs_kv(k_bskh), _pairs_kv(v_bskw)
    arrays = (q, kk, jnp.swapaxes(kk, 1, 2), v, _pairs_q(dout.astype(q.dtype), k))
    rest = (_pairs_q(lse[..., None], k)[..., 0], _pairs_q(delta[..., None], k)[..., 0], _pairs_at(at, k))
    step = partial(_backward_step, drive, options, blocks)
    dq, dk, dv = _in_steps(step, blocks, (*arrays, *rest), q, s, _alike(at, b, k))
    # dq comes transposed: inside of the steps XLA would fold the transpose into the product that made it.
    dq = jnp.moveaxis(dq.reshape(b, k, h, n // k, t), 4, 1)
    dq = jnp.swapaxes(dq, 3, 4).reshape(b, t, n, h)
    dk, dv = (jnp.swapaxes(g.reshape(b, k, *g.shape[1:]), 1, 2) for g in (dk, dv))
    return dq.astype(q_btnh.dtype), dk.astype(k_bskh.dtype), dv.astype(v_bskw.dtype)


attention = differentiable(_forward, _backward)


def _backward_step(drive, options, blocks, q, k, k_t, v, dout, lse, delta, at):
    return drive.backward(q, k, k_t, v, dout, lse, delta, at, options, blocks)


def _drive(t: int, s: int, at: Coordinates, blocks: Blocks):
    """Which driver of tiles serves this length; long ranges of keys are looped over whatever the queries, and so are
    those of packed rows, of which most are hidden."""
    few = -(-t // blocks.query) <= (1 if at.q_segments is not None else blocks.unrolled)
    return unrolled if few and s <= blocks.unrolled * blocks.key else looped


def _alike(at: Coordinates, b: int, k: int) -> int:
    """Pairs that may share a step: those of one row where rows are packed, each in its own way."""
    return b * k if at.q_segments is None else k


def _in_steps(step, blocks: Blocks, arrays, q_rgth, s: int, alike: int):
    """`step(*arrays)` a few pairs at a time, at most `alike`; every array has the pairs first."""
    pairs, g, t, _ = q_rgth.shape
    few_keys = min(s, blocks.unrolled * blocks.key)
    size = pairs_a_step(alike, 4 * g * min(t, blocks.query) * few_keys, blocks)
    if size == pairs:
        return step(*arrays)
    cut = jax.tree.map(lambda a: a.reshape(pairs // size, size, *a.shape[1:]), arrays)
    out = jax.lax.map(lambda a: step(*a), cut)
    return jax.tree.map(lambda a: a.reshape(pairs, *a.shape[2:]), out)


def _pairs_q(q_btnh, k: int):
    """[b·k, g, t, h]: query heads beside the kv head that they share."""
    b, t, n, h = q_btnh.shape
    return jnp.moveaxis(q_btnh.reshape(b, t, k, n // k, h), 1, 3).reshape(b * k, n // k, t, h)


def _pairs_kv(k_bskh):
    b, s, k, h = k_bskh.shape
    return jnp.swapaxes(k_bskh, 1, 2).reshape(b * k, s, h)


def _pairs_at(at: Coordinates, k: int) -> Coordinates:
    return Coordinates(*(None if c is None else jnp.repeat(c, k, axis=0) for c in at))


def _unpaired(x_rgth, b: int):
    """[b, t, n, h] of what `_pairs_q` made."""
    r, g, t, h = x_rgth.shape
    return jnp.moveaxis(x_rgth.reshape(b, r // b, g, t, h), 3, 1).reshape(b, t, r // b * g, h)
