"""Cross-entropy as it is written on paper: all logits at once, float32 (float64 for float64) inside."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels.cross_entropy.layout import Options


def token_losses(
    x_td: Float[Array, "*t d"], w_dv: Float[Array, "d v"], labels_t: Int[Array, "*t"], options: Options
) -> tuple[Float[Array, "*t"], Float[Array, "*t"]]:
    """Negative log-probability of each label, and the log-sum-exp of each token's logits."""
    wide = jnp.promote_types(x_td.dtype, jnp.float32)
    logits_tv = jnp.einsum("...d,dv->...v", x_td.astype(wide), w_dv.astype(wide))
    if options.softcap is not None:
        logits_tv = options.softcap * jnp.tanh(logits_tv / options.softcap)
    lse_t = jax.nn.logsumexp(logits_tv, axis=-1)
    # A sum with a mask, not a gather: a label outside the vocabulary counts as logit 0.
    hit_tv = labels_t[..., None] == jnp.arange(w_dv.shape[1])
    return lse_t - jnp.sum(jnp.where(hit_tv, logits_tv, 0.0), axis=-1), lse_t
