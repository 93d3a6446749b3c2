"""What backends of attention share: the derivative, and the mesh around the local programs.

On a mesh the local programs run under `jax.shard_map`; the custom derivative stands outside of it, so that no sum
over devices is added by differentiation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxstack.kernels.attention.layout import Layout
from maxstack.kernels.attention.masks import Coordinates, Options


def differentiable(forward: Callable, backward: Callable) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`attention(options, config, layout, q, k, v, sinks, at) -> (out, lse)` of two programs that see local arrays:

    - `forward(options, config, q_btnh, k_bskh, v_bskw, sinks_n, at) -> (out_btnw, lse_btn)`: output in the dtype of
      the queries; log-sum-exp of the logits, sink included, float32 or wider, -inf for a query that sees nothing.
    - `backward(options, config, q_btnh, k_bskh, v_bskw, at, lse_btn, delta_btn, dout_btnw) -> (dq, dk, dv)`:
      gradients in the dtypes of their arrays. A weight is `exp(logit - lse)`, the gradient of a logit
      `weight · (dout·v - delta)`. `lse` is +inf for a query that saw nothing (its weights are 0); `delta` is Σ dout·out
      less the cotangent of lse. Sinks need no more than these two: their gradient is made here.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
    def attention(
        options: Options, config: Any, layout: Layout | None, q_btnh, k_bskh, v_bskw, sinks_n, at: Coordinates
    ):
        run = partial(forward, options, config)
        if layout is not None:
            arrays = (
                layout.heads,
                layout.heads,
                layout.heads,
                _sinks(layout, sinks_n),
                layout.coordinates(at),
            )
            run = layout.run(run, arrays, (layout.heads, layout.lse))
        return run(q_btnh, k_bskh, v_bskw, sinks_n, at)

    def attention_fwd(options, config, layout, q_btnh, k_bskh, v_bskw, sinks_n, at):
        out, lse = attention(options, config, layout, q_btnh, k_bskh, v_bskw, sinks_n, at)
        # The names let a rematerialisation policy keep these two, so that a backward pass runs no forward again.
        out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
        return (out, lse), (q_btnh, k_bskh, v_bskw, sinks_n, at, out, lse)

    def attention_bwd(options, config, layout, kept, cotangents):
        sinks_n, at = kept[3:5]
        run = partial(_local_gradients, partial(backward, options, config), layout)
        if layout is not None:
            heads, lse, sinks = layout.heads, layout.lse, _sinks(layout, sinks_n)
            arrays = (heads, heads, heads, sinks, layout.coordinates(at), heads, lse, heads, lse)
            run = layout.run(run, arrays, (heads, heads, heads, sinks))
        return (*run(*kept, *cotangents), None)

    attention.defvjp(attention_fwd, attention_bwd)
    return attention


def _sinks(layout, sinks_n):
    return None if sinks_n is None else layout.sinks


def _local_gradients(backward, layout, q_btnh, k_bskh, v_bskw, sinks_n, at, out, lse, dout, dlse):
    delta = jnp.sum(dout.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - dlse
    dsinks = None
    if sinks_n is not None:
        dsinks = -jnp.sum(jnp.exp(sinks_n.astype(lse.dtype) - lse) * delta, axis=(0, 1))
        if layout is not None and layout.batch:
            dsinks = jax.lax.psum(dsinks, layout.batch)
        dsinks = dsinks.astype(sinks_n.dtype)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # the weights of a query that saw nothing: exp(-inf) = 0
    return (*backward(q_btnh, k_bskh, v_bskw, at, lse, delta, dout), dsinks)
