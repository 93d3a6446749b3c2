"""A text as one vector: the mean of its tokens' final hidden states, or the last one.

The program that reads a chunk sums the chunk's tokens; chunks are added on the host. Where nobody asks, a chunk costs
what it cost without.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from maxstack.config import UserError
from maxstack.models.generation.params import SamplingParams
from maxstack.serve.errors import Unfinished

if TYPE_CHECKING:
    from maxstack.serve.engine import AsyncEngine, Prompt
    from maxstack.serve.programs import Form

POOLINGS = ("mean", "last")


class Pooled(NamedTuple):
    """Of each row's tokens in a chunk: the sum of their final hidden states, and the last one's."""

    sum_bd: Float[Array, "b d"]
    last_bd: Float[Array, "b d"]


def pool(
    form: "Form", weights: Any, x_btd: Float[Array, "b t d"], counts_b: Int[Array, "b"], wanted_b: Bool[Array, "b"]
) -> Pooled:  # fmt: skip
    """In float32; zeros, and no time, where nobody asks."""
    b, t, d = x_btd.shape
    zeros = jnp.zeros((b, d), jnp.float32)

    def asked(x_btd: Array) -> Pooled:
        h_btd = form.hidden(weights, x_btd).astype(jnp.float32)
        real_bt1 = (jnp.arange(t) < counts_b[:, None])[..., None]
        at_b = jnp.maximum(counts_b - 1, 0)
        last_bd = jnp.take_along_axis(h_btd, at_b[:, None, None], axis=1)[:, 0]
        return Pooled(jnp.sum(jnp.where(real_bt1, h_btd, 0), axis=1), last_bd)

    return jax.lax.cond(jnp.any(wanted_b), asked, lambda x: Pooled(zeros, zeros), x_btd)


class Part(NamedTuple):
    """What a chunk adds to a request's embedding."""

    start: int
    """The first token's position. A text that is read again begins again."""
    sum_d: np.ndarray
    last_d: np.ndarray


class Pool:
    """A request's embedding while its chunks come."""

    def __init__(self, pooling: str):
        self.pooling = pooling
        self._sum: np.ndarray | None = None
        self._last: np.ndarray | None = None

    def take(self, part: Part) -> None:
        """Add a chunk; one at the start of the text replaces what was there."""
        before = None if part.start == 0 else self._sum
        # Chunks in float64: their number must not matter.
        self._sum = part.sum_d.astype(np.float64) + (0 if before is None else before)
        self._last = part.last_d

    def vector(self, tokens: int) -> np.ndarray:
        """The embedding of so many tokens, float32."""
        if self._sum is None or self._last is None:
            raise RuntimeError("an embedding was asked for before its text was read")
        return (self._sum / tokens if self.pooling == "mean" else self._last).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A text as a vector, not normalised."""

    vector: np.ndarray
    """float32, as wide as the model."""
    tokens: int


async def embed(engine: "AsyncEngine", prompt: "Prompt", pooling: str = "mean", **options: Any) -> Embedding:
    """The embedding of a text. A text for its mean is read whole; one for its last token may have cached pages."""
    if pooling not in POOLINGS:
        raise UserError(f"pooling is {pooling!r}: it may be {' or '.join(POOLINGS)}")
    params = SamplingParams(max_tokens=0, temperature=0.0)
    stream = engine.open(prompt, params, pooling=pooling, **options)
    try:
        output = await stream.whole()
    finally:
        engine.abort(stream.id)
    if output.finish_reason != "length" or stream.answer.pool is None:
        reason = output.finish_reason
        raise Unfinished(f"the text was not read to its end: {reason}", reason)
    tokens = len(output.prompt_token_ids)
    return Embedding(stream.answer.pool.vector(tokens), tokens)
