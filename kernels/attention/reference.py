"""Attention as it is written on paper: every logit at once, float32 (float64 for float64) inside."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from maxstack.kernels.attention.masks import Coordinates, Options, visible


def attention(
    q_btnh: Float[Array, "b t n h"],
    k_bskh: Float[Array, "b s k h"],
    v_bskw: Float[Array, "b s k w"],
    sinks_n: Float[Array, "n"] | None,
    at: Coordinates,
    options: Options,
) -> tuple[Float[Array, "b t n w"], Float[Array, "b t n"]]:
    """Output in the dtype of the queries, log-sum-exp of the logits (sink included) in float32 or wider."""
    b, t, n, h = q_btnh.shape
    s, k, w = v_bskw.shape[1:]
    wide = jnp.promote_types(q_btnh.dtype, jnp.float32)
    q = q_btnh.astype(wide).reshape(b, t, k, n // k, h)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k_bskh.astype(wide)) * options.scale
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    mask = visible(at, options, t, s)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, initial=-jnp.inf)
    sinks = None if sinks_n is None else sinks_n.astype(wide).reshape(k, n // k, 1)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    # A query that sees nothing: top is -inf, and -inf - -inf would be nan.
    safe_top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(logits - safe_top[..., None])
    total = weights.sum(-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - safe_top)
    safe_total = jnp.where(total == 0.0, 1.0, total)
    out = jnp.einsum("bkgts,bskw->btkgw", weights / safe_total[..., None], v_bskw.astype(wide))
    lse = jnp.where(total == 0.0, -jnp.inf, safe_top + jnp.log(safe_total))
    return out.reshape(b, t, n, w).astype(q_btnh.dtype), jnp.moveaxis(lse, -1, 1).reshape(b, t, n)
