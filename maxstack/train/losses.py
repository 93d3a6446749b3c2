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
    """Sums over the tokens that count, to be divided by the global number of them; `per_batch` is a mean already.

    Only `nll` is needed. A sum over tokens is the same however a step is split into micro-batches. A mean counts by the
    micro-batch's share of the step's real tokens; that is the mean over the step only where it is linear in the tokens:
    the router's z-loss is, the auxiliary loss of experts is not (`balance_terms` in maxstack/models/moe.py).
    """

    nll: jax.Array
    """Negative log-likelihood (nats)."""
    z: jax.Array | float = 0.0
    """z-loss, weighted; or what else is added to the loss of a token."""
    per_batch: jax.Array | float = 0.0
    """Losses that are means over the real tokens of a micro-batch, such as the load balancing of experts."""
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


def share_of_step(sums: LossSums, batch: Batch, tokens: jax.Array, real: jax.Array) -> LossSums:
    """What a micro-batch adds to the mean losses of a step of so many `tokens` that count and `real` tokens.

    This adds up over micro-batches; one of padding alone adds nothing.
    """
    share = real_tokens(batch) / real
    return sums._replace(nll=sums.nll / tokens, z=sums.z / tokens, per_batch=sums.per_batch * share)


def real_tokens(batch: Batch) -> jax.Array:
    """Tokens that are no padding: those a model sees, whether or not their loss counts."""
    return jnp.sum(batch.segment_ids > 0).astype(jnp.float32)
