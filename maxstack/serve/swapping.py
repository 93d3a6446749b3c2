"""Other weights for a running engine, without a compilation and without an answer that is of both.

Requests that have begun finish on the old weights; the others wait, and begin on the new ones. Both sets are on the
device meanwhile. The prefix cache is emptied. Whatever fails, fails before the exchange, and leaves the old weights.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from maxstack.config import UserError
from maxstack.models.compiling import lies
from maxstack.models.transformer import Transformer
from maxstack.serve.errors import RequestFailed
from maxstack.serve.forms import form_for

if TYPE_CHECKING:
    from maxstack.serve.engine import AsyncEngine


class SwapFailed(RequestFailed):
    """The weights were not exchanged; the old ones serve."""


@dataclass
class Swap:
    """Weights that wait for the requests on the old ones to be over."""

    exchange: Callable[[], None]
    until: float | None
    """When it is given up, on the engine's clock."""
    done: "Future[None]" = field(default_factory=Future)


async def swap_weights(engine: "AsyncEngine", model: Transformer, within_s: float | None = None) -> None:
    """Serve another model of the same config and shapes. Raises UserError for any other, SwapFailed when those
    requests were not over after `within_s` seconds. Adapters stay as they are."""
    leaves = await asyncio.to_thread(new_leaves, engine, model)
    # Whoever stops waiting does not stop the exchange.
    await asyncio.shield(asyncio.wrap_future(engine._loop.swap(leaves, within_s)))


def new_leaves(engine: "AsyncEngine", model: Transformer) -> list[Any]:
    """The weights as the engine's form takes them, where the old ones lie. Raises UserError for those of another
    model."""
    if model.config != engine.config:
        changed = [
            name
            for name in vars(engine.config)
            if getattr(model.config, name) != getattr(engine.config, name)
        ]
        raise UserError(
            f"the new model's config differs from the one that is served in {', '.join(changed)}: only weights of the "
            "same config can take its place; start another server for this one"
        )
    _, new = form_for(model, engine.on)
    old = engine.leaves
    if len(new) != len(old):
        raise UserError(
            f"the new model has {len(new)} arrays, the one that is served {len(old)}: one of them is packed in few bits"
        )
    # On a CPU weights that lose nothing by it lie in bfloat16: what is served may need more.
    new = [
        theirs.astype(mine.dtype) if jnp.promote_types(mine.dtype, theirs.dtype) == mine.dtype else theirs
        for mine, theirs in zip(old, new, strict=True)
    ]
    for i, (mine, theirs) in enumerate(zip(old, new, strict=True)):
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            raise UserError(
                f"array {i} of the new model is {theirs.dtype} {list(theirs.shape)}, the served one's "
                f"{mine.dtype} {list(mine.shape)}: load it with the same types"
            )
    placed = [
        jax.device_put(theirs, lies(mine)) if mine.committed else theirs
        for mine, theirs in zip(old, new, strict=True)
    ]
    return jax.block_until_ready(placed)
