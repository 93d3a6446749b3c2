"""Attention on Hopper GPUs: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) in Mosaic GPU.

A block of threads is three warpgroups. One moves memory: it asks TMA for blocks of keys and values, `stages` ahead, and
holds 24 registers a thread. Two compute, 64 queries each, with 240. They share the blocks of keys, and take turns:
while one weighs logits, which is all exp2, the other has the tensor cores.

Forward, time downwards; Kᵢ, Vᵢ are blocks of keys and values, `→` and `←` are barriers::

    memory             compute 0                       compute 1
    ------             ---------                       ---------
    K₀ →               wait K₀                         (waits for its turn)
    V₀ →               S = Q·K₀ᵀ        tensor cores
    K₁ →               ------------- turn passes -------------
    V₁ →               mask, top, P = 2^S              wait K₀
                       O, total shrink                 S = Q·K₀ᵀ        tensor cores
                       ------------- turn passes -------------
                       wait V₀                         mask, top, P = 2^S
                       O += P·V₀        tensor cores   O, total shrink
       ← V₀ free       wait K₁                         |
    V₂ →               S = Q·K₁ᵀ        tensor cores   |
                       ------------- turn passes -------------
       ← K₀ free       ...                             wait V₀
    K₂ →                                               O += P·V₀        tensor cores

P goes from registers into the second product; it never is in memory. Which blocks are visited at all, and which of
these need a mask, is in a *span* of four numbers a warpgroup (`mosaic_gpu_spans`), from XLA. Both warpgroups pass
every barrier of every block that either visits: one that does not need a block lets it go unread.

Backward, two kernels, each a sum in registers, hence deterministic:

                 tensor cores             exp2                      tensor cores
    dq           S = Q·Kᵀ, dP = dO·Vᵀ     P = 2^S, dS = P·dP        dQ += dS·K               2·64 queries stay
    dk and dv    Sᵀ = K·Qᵀ, dPᵀ = V·dOᵀ   Pᵀ = 2^Sᵀ, dSᵀ = Pᵀ·dPᵀ   dV += Pᵀ·dO, dK += dSᵀ·Q  2·64 keys stay

What does not stay streams: keys, or the queries of all heads that share the keys, one head after another. Sums S start
at -lse and sums dP at -delta, so that neither is taken off afterwards. The two warpgroups take no turns: each step of
one begins where its block arrives, and drifts into the other's exp2. Two sums of head size 192 or 256 do not fit a
warpgroup's registers: there both warpgroups keep the same 64 keys, one sums dV and the other dK; Sᵀ is multiplied
twice, 5 products for 4.

`delta` is Σ dO·O less the cotangent of lse. A sink is a first logit without a value.
"""

import jax.numpy as jnp

from maxstack.kernels import dispatch
from maxstack.kernels.attention.derivative import differentiable
from maxstack.kernels.attention.masks import Coordinates, Options
from maxstack.kernels.attention.mosaic_gpu_dkv import keys_gradients
from maxstack.kernels.attention.mosaic_gpu_dq import queries_gradient
from maxstack.kernels.attention.mosaic_gpu_forward import forward
from maxstack.kernels.attention.mosaic_gpu_tile import COMPUTE, LOG2E, LOW, ROWS, Blocks, blocks_for

HEAD_SIZES = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
"""(of queries and keys, of values) that were compiled for the hardware, without spilling a register
(`benchmarks/kernel_registers.py`)."""


def declined(q_btnh, k_bskh, v_bskw, options: Options, at: Coordinates, config: object) -> str | None:
    """Why this backend cannot serve a call, from shapes, types and chip; None where it can."""
    if (reason := dispatch.only_on("gpu")) is not None:
        return reason
    chip, sizes = dispatch.chip().name, (q_btnh.shape[-1], v_bskw.shape[-1])
    if chip not in ("sm90", "sm90a"):
        return f"{chip}: wgmma and TMA need Hopper (sm90); XLA serves it"
    if q_btnh.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q_btnh.dtype}: wgmma multiplies bfloat16 and float16; cast, or XLA serves it"
    if sizes not in HEAD_SIZES:
        known = ", ".join(f"{h}" if h == w else f"{h}/{w}" for h, w in HEAD_SIZES)
        return f"head size {sizes[0]}/{sizes[1]} is not one of {known}; pad to the next one, or XLA serves it"
    if q_btnh.shape[1] < ROWS:
        return f"{q_btnh.shape[1]} queries: a tile is {ROWS} rows, which would be mostly empty; XLA serves it"
    if config is not None and not isinstance(config, Blocks):
        return f"it takes mosaic_gpu_tile.Blocks, and config is {type(config).__name__}"
    if options.scale <= 0:
        return (
            f"scale {options.scale}: the largest logit is found before it is scaled, so it must be positive"
        )
    return None


def _forward(options, blocks, q_btnh, k_bskh, v_bskw, sinks_n, at):
    blocks = blocks or blocks_for("forward", q_btnh, v_bskw, options.softcap, at)
    out, lse_bnt = forward(options, blocks, q_btnh, k_bskh, v_bskw, sinks_n, at)
    return out, jnp.swapaxes(lse_bnt[:, :, : q_btnh.shape[1]], 1, 2)


def _backward(options, blocks, q_btnh, k_bskh, v_bskw, at, lse, delta, dout):
    blocks = blocks or blocks_for("backward", q_btnh, v_bskw, options.softcap, at)
    # The weights of a query that saw nothing, or is none: 2^(S - 1e30) = 0.
    lse = _by_head(jnp.where(lse == jnp.inf, -LOW, lse * LOG2E), -LOW)
    arrays = (q_btnh, k_bskh, v_bskw, dout.astype(q_btnh.dtype), lse, _by_head(delta, 0.0), at)
    dq = queries_gradient(options, blocks, *arrays)
    dk, dv = keys_gradients(options, blocks, *arrays)
    return dq, dk, dv


attention = differentiable(_forward, _backward)


def _by_head(x_btn, fill: float):
    """[b, n, T]: the sequence last, filled up to whole blocks of queries."""
    missing = -x_btn.shape[1] % (COMPUTE * ROWS)
    return jnp.pad(jnp.swapaxes(x_btn, 1, 2), ((0, 0), (0, 0), (0, missing)), constant_values=fill)
