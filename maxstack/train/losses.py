"""Objectives: from a model and a batch to a sum of losses over tokens. `pretrain` is the one for plain text."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxstack.data.batch import Batch
from maxstack.kernels.cross_entropy import cross_entropy
from maxstack.models import Transformer


class LossSums(NamedTuple):
    """Sums over the tokens that count, to be divided by the global number of them; `per_batch` is a mean already."""

    nll: jax.Array
    """Negative log-likelihood (nats)."""
    z: jax.Array
    """z-loss, weighted."""
    per_batch: jax.Array
    """Losses that are means over a micro-batch, such as the load balancing of experts."""
    expert_load: dict[str, jax.Array]
    """Tokens each expert received, by layer; empty without experts."""


Objective = Callable[[Transformer, Batch, float], LossSums]


def pretrain(model: Transformer, batch: Batch, z_loss: float) -> LossSums:
    """Next-token cross-entropy in float32, which never holds the logits.

    z-loss is `z_loss * lse^2` a token (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    """
    x, reports = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
    total, aux = cross_entropy(
        x, model.unembedding(), batch.labels, batch.weights, z_loss=z_loss, softcap=model.config.logit_softcap
    )
    nll = jnp.sum(jax.lax.stop_gradient(aux.nll) * batch.weights)
    moe = [report["moe_loss"].sum() for report in reports.values() if "moe_loss" in report]
    load = {name: report["expert_load"] for name, report in reports.items() if "expert_load" in report}
    return LossSums(nll, total - nll, sum(moe, start=jnp.zeros(())), load)


def differentiable(sums: LossSums, tokens: jax.Array, micro_batches: int) -> jax.Array:
    """A micro-batch's share of the loss of the whole step: what is differentiated, and adds up over micro-batches."""
    return (sums.nll + sums.z) / tokens + sums.per_batch / micro_batches
