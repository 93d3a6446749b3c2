"""Cross-entropy of a large vocabulary: the public functions, their argument checks, the choice of a backend."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels import Unsupported
from maxstack.kernels.cross_entropy import reference, xla
from maxstack.kernels.cross_entropy.layout import Layout, Options
from maxstack.kernels.dispatch import choose
from maxstack.kernels.sharded import dim_axes, explicit_mesh, spec

Implementation = Literal["auto", "xla", "reference", "mosaic_gpu", "mosaic_tpu"]
_NOT_BUILT = "it is not built yet; 'xla' serves the call"
BACKENDS = {"xla": None, "reference": None, "mosaic_gpu": _NOT_BUILT, "mosaic_tpu": _NOT_BUILT}
NAMED_ONLY = ("reference", "mosaic_gpu", "mosaic_tpu")


class TokenStatistics(NamedTuple):
    """What each token got; outside of differentiation (see `token_log_probs` for a differentiable form)."""

    nll: Float[Array, "..."]
    """Negative log-probability of the label (nats)."""
    lse: Float[Array, "..."]
    """Log-sum-exp of the logits, the square of which `z_loss` weighs."""


def cross_entropy(
    x_td: Float[Array, "*t d"],
    w_dv: Float[Array, "d v"],
    labels_t: Int[Array, "*t"],
    weights_t: Float[Array, "*t"] | None = None,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    implementation: Implementation = "auto",
    chunk: int | None = None,
) -> tuple[Float[Array, ""], TokenStatistics]:
    """`(Σ weight · (nll + z_loss · lse²), statistics)` of logits `x·w`, which are never held for all tokens.

    Logits are multiplied in the dtype of `x_td` and summed, normalised and kept in float32 (float64 for float64),
    `chunk` tokens at a time (default: see `xla.chunk_of`). When differentiated, the gradients are made in the
    forward pass, where the logits are at hand: three matrix products in all, not four. A label outside
    `[0, v)` counts as a logit of 0; give such tokens weight 0. Tokens of weight 0 are gathered behind the others, and
    chunks of nothing else cost nothing; their statistics are 0, and so is the gradient of such a weight itself.
    `softcap` makes logits `softcap·tanh(logits/softcap)`.

    On a mesh with explicit axes tokens may be cut along any leading dimension of `x_td`, and `w_dv` along `v`
    (partial sums are exchanged, a few numbers a token) and along `d` over axes that also cut the tokens (gathered).
    Raises ValueError for shapes that disagree, TypeError for dtypes, Unsupported for layouts and backends.
    """
    options, layout, labels_t, weights_t = _prepare(
        x_td, w_dv, labels_t, weights_t, float(z_loss), softcap, implementation, chunk
    )
    if implementation == "reference" or labels_t.size == 0:  # of no token there is nothing to hold
        nll, lse = reference.token_losses(x_td, w_dv, labels_t, options)
        loss = jnp.sum(weights_t * (nll + options.z_loss * lse**2))
    else:
        loss, nll, lse = xla.weighted_loss(options, layout, x_td, w_dv, labels_t, weights_t)
    shown = (jnp.where(weights_t != 0, jax.lax.stop_gradient(each), 0) for each in (nll, lse))
    return loss, TokenStatistics(*shown)


def token_log_probs(
    x_td: Float[Array, "*t d"],
    w_dv: Float[Array, "d v"],
    labels_t: Int[Array, "*t"],
    *,
    softcap: float | None = None,
    implementation: Implementation = "auto",
    chunk: int | None = None,
) -> tuple[Float[Array, "*t"], Float[Array, "*t"]]:
    """Log-probability of each label and log-sum-exp of each token's logits, both differentiable.

    For objectives that are no weighted sum of token losses (preference, policy gradients). The backward pass
    makes the logits again: four matrix products. Otherwise as `cross_entropy`.
    """
    options, layout, labels_t, _ = _prepare(x_td, w_dv, labels_t, None, 0.0, softcap, implementation, chunk)
    if implementation == "reference" or labels_t.size == 0:
        nll, lse = reference.token_losses(x_td, w_dv, labels_t, options)
    else:
        nll, lse = xla.token_losses(options, layout, x_td, w_dv, labels_t)
    return -nll, lse


def _prepare(x_td, w_dv, labels_t, weights_t, z_loss, softcap, implementation, chunk):
    """Checked and completed arguments: (options, layout, labels, weights)."""
    choose("cross_entropy", implementation, BACKENDS, named_only=NAMED_ONLY)
    _check(x_td, w_dv, labels_t, weights_t, softcap, chunk)
    wide = jnp.promote_types(x_td.dtype, jnp.float32)
    options = Options(z_loss=z_loss, softcap=softcap, chunk=chunk)
    weights_t = jnp.ones(labels_t.shape, wide) if weights_t is None else weights_t.astype(wide)
    mesh = explicit_mesh(x_td, w_dv)
    if mesh is None:
        return options, None, labels_t, weights_t
    *lead, x_d = dim_axes(x_td)
    w_d, w_v = dim_axes(w_dv)
    layout = Layout(mesh=mesh, lead=tuple(lead), embed=w_d, vocab=w_v)
    if x_d:
        raise Unsupported(f"cross_entropy: the width of x is cut over {x_d}; reshard it to be whole")
    if not set(w_d) <= set(layout.tokens):
        raise Unsupported(
            f"cross_entropy: w's width is cut over {w_d}, tokens over {layout.tokens}; gather w first"
        )
    if set(w_v) & set(layout.tokens):
        raise Unsupported(
            f"cross_entropy: w's vocabulary and the tokens are both cut over {w_v}; reshard one of them"
        )
    together = spec(*lead)
    return options, layout, jax.reshard(labels_t, together), jax.reshard(weights_t, together)


def _check(x_td, w_dv, labels_t, weights_t, softcap, chunk):
    """Raise for a call that no backend can serve."""
    if x_td.ndim == 0 or w_dv.ndim != 2 or 0 in w_dv.shape:
        raise ValueError(
            f"cross_entropy: x must be [..., d] and w [d, v] and hold something, not {x_td.shape} and {w_dv.shape}"
        )
    if x_td.shape[-1] != w_dv.shape[0]:
        raise ValueError(
            f"cross_entropy: x has width {x_td.shape[-1]}, w_dv {w_dv.shape} takes {w_dv.shape[0]}"
        )
    if labels_t.shape != x_td.shape[:-1]:
        raise ValueError(
            f"cross_entropy: labels {labels_t.shape} must be the leading shape of x {x_td.shape}"
        )
    if weights_t is not None and weights_t.shape != labels_t.shape:
        raise ValueError(
            f"cross_entropy: weights {weights_t.shape} must have the shape of labels {labels_t.shape}"
        )
    if x_td.dtype != w_dv.dtype:
        raise TypeError(
            f"cross_entropy: x is {x_td.dtype} and w {w_dv.dtype}; cast one of them where it is seen"
        )
    if not jnp.issubdtype(x_td.dtype, jnp.floating):
        raise TypeError(f"cross_entropy: x and w must be floating-point, not {x_td.dtype}")
    if not jnp.issubdtype(labels_t.dtype, jnp.integer):
        raise TypeError(f"cross_entropy: labels must be integers, not {labels_t.dtype}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"cross_entropy: softcap is {softcap}; it must be positive, or None for no cap")
    if chunk is not None and chunk < 1:
        raise ValueError(f"cross_entropy: chunk is {chunk} tokens; it must be positive")
