"""Held-out loss and bits per byte, for each source."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxstack import sharding
from maxstack.data.batch import Batch
from maxstack.data.held_out import HeldOut
from maxstack.models import tree
from maxstack.train.losses import pretrain
from maxstack.train.state import Arrays, Layout


class HeldOutLoss(NamedTuple):
    """What a source's held-out text costs the model."""

    nll: float
    """Nats a token."""
    bits_per_byte: float
    """Bits a byte of text, the tokens that end documents included."""


def evaluation_step(plan: Layout) -> Callable[[Arrays, Arrays, Batch], tuple[jax.Array, jax.Array]]:
    """A compiled function: sum of nats and number of tokens of a batch [b, t]."""

    def sums(params: Arrays, buffers: Arrays, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = tree.rebuild(plan.model, {**params, **buffers})
        return pretrain(model, batch, 0.0).nll, jnp.sum(batch.weights)

    return jax.jit(sums, out_shardings=plan.replicated)


def evaluate(
    step: Callable[[Arrays, Arrays, Batch], tuple[jax.Array, jax.Array]], plan: Layout, params: Arrays,
    buffers: Arrays, rows: HeldOut, stopping: Callable[[], bool],
) -> HeldOutLoss | None:  # fmt: skip
    """The mean over all held-out rows of a source; None when it was broken off because the run is `stopping`."""
    where = sharding.batch_sharding(plan.devices)
    sums = []
    with jax.set_mesh(plan.devices):
        for local in rows:
            if stopping():
                return None
            # Else all batches would be queued at once, and a stop would wait for all of them.
            jax.block_until_ready(sums[-1:])
            shape = (rows.batch_rows, rows.seq_len)
            sums.append(step(params, buffers, sharding.global_arrays(where, local, shape)))
    nll, tokens = (math.fsum(float(value) for value in column) for column in zip(*sums, strict=True))
    return HeldOutLoss(nll / tokens, nll / math.log(2) / rows.bytes)
