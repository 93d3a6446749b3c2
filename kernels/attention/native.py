"""Attention of whole sequences on a CPU, in C++: blocks that no query sees are skipped in each row of the batch, and a
query's result is the same to the last bit in any company and on any number of threads.

Logits and weights stay in float32; arrays in bfloat16 are made float32 a block at a time.
"""

from typing import Any

import jax.numpy as jnp

from maxstack.kernels import cpu_native
from maxstack.kernels.attention.derivative import differentiable
from maxstack.kernels.attention.masks import Coordinates, Options
from maxstack.kernels.dispatch import only_on
from maxstack.kernels.sharded import automatic_axes, varying, varying_over

LEAST_QUERIES = 128
"""Keys are laid out anew for a call, which fewer queries do not pay for."""


def declined(q_btnh, k_bskh, v_bskw, options: Options, at: Coordinates, config: object) -> str | None:
    """Why it cannot serve a call; None where it can."""
    if (reason := only_on("cpu")) is not None:
        return reason
    if config is not None:
        return f"its blocks have one size, and config is {type(config).__name__}"
    if q_btnh.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, not {q_btnh.dtype}"
    if q_btnh.shape[1] < LEAST_QUERIES:
        return f"{q_btnh.shape[1]} queries; it is for {LEAST_QUERIES} and more"
    if automatic := automatic_axes(q_btnh):
        return f"XLA deals out what lies on the axes {', '.join(automatic)}, and cannot cut a call of C++"
    if 0 in (*q_btnh.shape, *k_bskh.shape, *v_bskw.shape):
        return "an array is empty"
    return cpu_native.problem()


def _forward(options, config, q_btnh, k_bskh, v_bskw, sinks_n, at):
    arrays = (q_btnh, k_bskh, v_bskw, *(ids for ids in at if ids is not None))
    found = cpu_native.attention(q_btnh, k_bskh, v_bskw, at, **_told(options))
    out, lse = varying_over(frozenset().union(*map(varying, arrays)), found)
    if sinks_n is None:
        return out, lse
    # A sink takes weight from all keys of its head alike.
    with_sink = jnp.logaddexp(lse, sinks_n.astype(lse.dtype))
    share = jnp.where(with_sink == -jnp.inf, 0, jnp.exp(lse - jnp.where(with_sink == -jnp.inf, 0, with_sink)))
    return (out * share[..., None]).astype(out.dtype), with_sink


def _backward(options, config, q_btnh, k_bskh, v_bskw, at, lse, delta, dout):
    arrays = (q_btnh, k_bskh, v_bskw, dout)
    found = cpu_native.attention_backward(
        q_btnh, k_bskh, v_bskw, at, dout.astype(q_btnh.dtype), lse, delta, **_told(options)
    )
    return varying_over(frozenset().union(*map(varying, arrays)), found)


attention = differentiable(_forward, _backward)


def _told(options: Options) -> dict[str, Any]:
    return {
        "causal": options.causal, "scale": options.scale, "softcap": options.softcap, "window": options.window,
    }  # fmt: skip
