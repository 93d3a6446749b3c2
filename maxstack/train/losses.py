"""Objectives: from a model and a batch to a sum of losses over tokens. `pretrain` is the one for plain text.

One of your own is a function of the same signature (docs/extend.md).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxstack.config import UserError
from maxstack.data.batch import Batch
from maxstack.kernels.cross_entropy import cross_entropy
from maxstack.models import Transformer


class LossSums(NamedTuple):
    """Sums over the tokens that count, to be divided by the global number of them; `per_batch` is a mean already."""

    nll: jax.Array
    """Negative log-likelihood (nats)."""
    z: jax.Array | float = 0.0
    """z-loss, weighted; or what else is added to the loss of a token."""
    per_batch: jax.Array | float = 0.0
    """Losses that are means over a micro-batch, such as the load balancing of experts."""
    expert_load: dict[str, jax.Array] = {}
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
    return LossSums(nll, total - nll, *of_experts(reports))


def of_experts(reports: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The last two fields of LossSums, from what `Transformer.hidden` reports: balancing needs both."""
    moe = [report["moe_loss"].sum() for report in reports.values() if "moe_loss" in report]
    load = {name: report["expert_load"] for name, report in reports.items() if "expert_load" in report}
    return sum(moe, start=jnp.zeros(())), load


OBJECTIVES: Mapping[str, Objective] = {"pretrain": pretrain}


def objective_of(wanted: str | Objective) -> Objective:
    """The objective that a run names, or gives. Raises UserError for an unknown name and for what is no function."""
    if isinstance(wanted, str):
        if wanted not in OBJECTIVES:
            raise UserError(
                f"objective is {wanted!r}: the known ones are {', '.join(sorted(OBJECTIVES))}; one of your own is "
                "given in the run file as a function (docs/extend.md)"
            )
        return OBJECTIVES[wanted]
    if not callable(wanted):
        raise UserError(
            f"objective is {wanted!r}: give a name or a function (model, batch, z_loss) -> LossSums"
        )
    return wanted


def differentiable(sums: LossSums, tokens: jax.Array, micro_batches: int) -> jax.Array:
    """A micro-batch's share of the loss of the whole step: what is differentiated, and adds up over micro-batches."""
    return (sums.nll + sums.z) / tokens + sums.per_batch / micro_batches
