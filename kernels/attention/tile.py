"""One block of queries against one range of keys: the arithmetic of blocked attention.

`r` counts pairs (batch row, kv head), `g` the query heads of a pair, `w` the head size of values. Matrix products
take the dtype of the inputs and sum in float32 or wider; everything between them is float32 or wider.

Every product here contracts the last dimension of its left operand: XLA:CPU multiplies bf16 into float32 fast in
that form alone. This is why the backward tile works on transposed logits, and takes k transposed too.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxstack.kernels.attention.masks import Options


def _product(left, right, right_dim: int):
    """Batched over the first dimension; contracts the last of `left` with `right_dim` of `right`."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    dims = (((2,), (right_dim,)), ((0,), (0,)))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=wide)


def forward(
    q_rgth: Float[Array, "r g t h"],
    k_rsh: Float[Array, "r s h"],
    v_rsw: Float[Array, "r s w"],
    mask: Bool[Array, "#r t s"] | None,
    options: Options,
) -> tuple[Float[Array, "r g t"], Float[Array, "r g t"], Float[Array, "r g t w"]]:
    """Largest logit of each query, sum of exp(logit - largest), and that sum weighted by the values."""
    r, g, t, h = q_rgth.shape
    s, w = v_rsw.shape[1:]
    logits = _product(q_rgth.reshape(r, g * t, h), k_rsh, 2).reshape(r, g, t, s) * options.scale
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - finite(top)[..., None])
    total = jnp.sum(weights, axis=-1)
    out = _product(weights.astype(v_rsw.dtype).reshape(r, g * t, s), v_rsw, 1)
    return top, total, out.reshape(r, g, t, w)


def finite(top: Float[Array, "..."]) -> Float[Array, "..."]:
    """`top`, or 0 for a query that has seen nothing: -inf - -inf would be nan."""
    return jnp.where(top == -jnp.inf, 0, top)


def backward(
    q_rgth: Float[Array, "r g t h"],
    k_rsh: Float[Array, "r s h"],
    k_rhs: Float[Array, "r h s"],
    v_rsw: Float[Array, "r s w"],
    dout_rgtw: Float[Array, "r g t w"],
    lse_rgt: Float[Array, "r g t"],
    delta_rgt: Float[Array, "r g t"],
    mask: Bool[Array, "#r t s"] | None,
    options: Options,
) -> tuple[Float[Array, "r h g t"], Float[Array, "r s h"], Float[Array, "r s w"]]:
    """Parts of the gradients of q (transposed), k and v. `lse` is +inf for a query that saw nothing;
    `delta` is Σ dout·out less the cotangent of lse."""
    r, g, t, h = q_rgth.shape
    s, w = v_rsw.shape[1:]
    q = q_rgth.reshape(r, g * t, h)
    dout = dout_rgtw.reshape(r, g * t, w)
    logits = _product(k_rsh, q, 2).reshape(r, s, g, t) * options.scale
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    weights = jnp.exp(logits - lse_rgt[:, None])
    if mask is not None:
        weights = jnp.where(jnp.swapaxes(mask, 1, 2)[:, :, None], weights, 0)
    dweights = _product(v_rsw, dout, 2).reshape(r, s, g, t)
    dlogits = weights * (dweights - delta_rgt[:, None]) * options.scale
    if options.softcap is not None:
        dlogits = dlogits * (1 - (logits / options.softcap) ** 2)
    dlogits = dlogits.astype(q.dtype).reshape(r, s, g * t)
    dv = _product(weights.astype(dout.dtype).reshape(r, s, g * t), dout, 1)
    dk = _product(dlogits, q, 1)
    dq = _product(k_rhs, dlogits, 1).reshape(r, h, g, t)
    return dq, dk, dv
