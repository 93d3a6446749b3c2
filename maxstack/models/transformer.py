"""The transformer: embedding, stacks of repeated layer patterns run by a scan, final norm, output projection."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from maxstack import sharding
from maxstack.config import UserError
from maxstack.kernels.attention import Implementation
from maxstack.models.attention import Context
from maxstack.models.block import BlockConfig
from maxstack.models.layers import (
    EMBEDDING_STD,
    Embedding,
    LayerNormConfig,
    NormConfig,
    Positions,
    RMSNormConfig,
    Weight,
    require,
    soft_cap,
    weight,
)  # fmt: skip
from maxstack.models.packed import PackedMatrix
from maxstack.models.remat import Remat, rematerialised
from maxstack.models.rope import RopeTables, document_lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A pattern of layers, repeated. Compile time does not grow with `repeats`."""

    pattern: tuple[BlockConfig, ...]
    """The layers of one period, in order."""
    repeats: int
    """How often the pattern occurs."""

    def __post_init__(self):
        if not self.pattern:
            raise UserError("stack.pattern has no layers: give it at least one")
        require("stack", self, 1, "repeats")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder-only transformer."""

    vocab_size: int
    """Rows of the token table (tokens)."""
    width: int
    """Dimensions of the residual stream."""
    stacks: tuple[StackConfig, ...]
    """The layers, first to last."""
    final_norm: RMSNormConfig | LayerNormConfig | NormConfig = RMSNormConfig()
    """Norm before the output projection."""
    tie_embeddings: bool = True
    """The token table is the output projection too."""
    embedding_scale: float = 1.0
    """Factor on embedded tokens (Gemma uses sqrt(width))."""
    learned_positions: bool = False
    """A learned vector for each of max_length positions is added to the embedded tokens, as in GPT-2."""
    logit_scale: float = 1.0
    """Factor on the logits."""
    logit_softcap: float | None = None
    """Logits l become logit_softcap * tanh(l / logit_softcap)."""
    max_length: int = 8192
    """Longest sequence the model is meant for (tokens)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type that products are computed in; weights stay float32, reductions and logits are float32."""
    remat: Remat = "none"
    """What each layer keeps for the backward pass; see maxstack/models/remat.py."""

    def __post_init__(self):
        require("model", self, 1, "vocab_size", "width", "max_length")
        if not self.stacks:
            raise UserError("model.stacks has no layers: give it at least one stack")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise UserError(f"model.logit_softcap is {self.logit_softcap}: it must be above 0, or None")

    @property
    def depth(self) -> int:
        """Layers in all."""
        return sum(len(stack.pattern) * stack.repeats for stack in self.stacks)

    def build(self, key: jax.Array) -> "Transformer":
        """A model with fresh float32 weights."""
        return Transformer(self, key)


Layers = Sequence[nnx.Module]


class Stack(nnx.Module):
    """The layers of one StackConfig; every weight has a leading axis of length `repeats`."""

    def __init__(self, config: StackConfig, key: jax.Array, width: int, residual_scale: float):
        def period(key: jax.Array) -> nnx.Pytree:
            keys = jax.random.split(key, len(config.pattern))
            return nnx.List(
                [b.build(k, width, residual_scale) for b, k in zip(config.pattern, keys, strict=True)]
            )

        self.layers = jax.vmap(period)(jax.random.split(key, config.repeats))


class Transformer(nnx.Module):
    """`model(tokens)` gives float32 logits; `hidden` and `unembedding` serve losses that never build them."""

    def __init__(self, config: TransformerConfig, key: jax.Array):
        embed_key, stacks_key, head_key = jax.random.split(key, 3)
        self.config = config
        self.embedding = Embedding(embed_key, config.vocab_size, config.width, config.embedding_scale)
        positions_key = jax.random.fold_in(embed_key, 1)
        self.positions: Positions | None = (
            Positions(positions_key, config.max_length, config.width) if config.learned_positions else None
        )
        keys = jax.random.split(stacks_key, len(config.stacks))
        scale = 1.0 / math.sqrt(2 * config.depth)
        self.stacks = nnx.List(
            [Stack(s, k, config.width, scale) for s, k in zip(config.stacks, keys, strict=True)]
        )
        self.final_norm = config.final_norm.build(config.width)
        head_shape = (config.width, config.vocab_size)
        head = (
            None if config.tie_embeddings else weight(head_key, head_shape, ("embed", "vocab"), EMBEDDING_STD)
        )
        self.head: Weight | PackedMatrix | None = nnx.data(head)

    def __call__(
        self, tokens_bt: Int[Array, "b t"], segment_ids_bt: Int[Array, "b t"] | None = None,
        positions_bt: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t v"]:  # fmt: skip
        """Float32 logits. Segments keep documents apart (0 is padding); positions default to 0, 1, 2, …"""
        return self.logits(self.hidden(tokens_bt, segment_ids_bt, positions_bt)[0])

    def hidden(
        self, tokens_bt: Int[Array, "b t"], segment_ids_bt: Int[Array, "b t"] | None = None,
        positions_bt: Int[Array, "b t"] | None = None, *, collect: tuple[str, ...] = (),
        implementation: Implementation = "auto",
    ) -> tuple[Float[Array, "b t d"], dict[str, Any]]:  # fmt: skip
        """What the output projection reads, and what the layers report, by "stack.layer" and stacked over repeats.

        `collect` names activations to report too ("attention", "feed_forward", "residual"), as "tap.<name>".
        """
        if positions_bt is None:
            self.check_length(tokens_bt.shape[1])
            positions_bt = sharding.constrain(
                jnp.broadcast_to(jnp.arange(tokens_bt.shape[1], dtype=jnp.int32), tokens_bt.shape),
                "batch",
                "sequence",
            )
        context = Context(positions_bt, segment_ids_bt, implementation, collect)
        tables = rope_tables(self.config, positions_bt, document_lengths(positions_bt, segment_ids_bt))
        x = self.embed(tokens_bt, positions_bt)
        reports: dict[str, Any] = {}
        for i, stack in enumerate(self.stacks):
            x, aux = run_stack(cast(Layers, stack.layers), x, tables, context, self.config.remat)
            reports |= {f"{i}.{j}": layer_aux for j, layer_aux in enumerate(aux)}
        return self.final_norm(x), reports

    def embed(self, tokens_bt: Int[Array, "b t"], positions_bt: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """What the first layer reads, in the compute type."""
        dtype = jnp.dtype(self.config.dtype)
        x = self.embedding(tokens_bt, dtype)
        return x if self.positions is None else x + self.positions(positions_bt, dtype)

    def check_length(self, length: int) -> None:
        """Raise UserError for more tokens than there are learned positions."""
        if self.positions is not None and length > self.config.max_length:
            raise UserError(
                f"{length} tokens are given to a model that has learned {self.config.max_length} positions: "
                "shorten the text"
            )

    def unembedding(self, dtype: jnp.dtype | None = None) -> Float[Array, "d v"]:
        """The output projection, scaled, in the compute type unless told otherwise; cut as its weight is."""
        dtype = jnp.dtype(dtype or self.config.dtype)
        if isinstance(self.head, PackedMatrix):
            w = self.head.whole(dtype).T
        else:
            w = self.embedding.unembedding(dtype) if self.head is None else self.head[...].astype(dtype)
        return w if self.config.logit_scale == 1.0 else w * jnp.asarray(self.config.logit_scale, dtype)

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Float32 logits of final hidden states."""
        if isinstance(self.head, PackedMatrix):
            y, factor = self.head(x, jnp.dtype(jnp.float32)), self.config.logit_scale
            return soft_cap(y if factor == 1.0 else y * factor, self.config.logit_softcap)
        out = sharding.activation_spec("batch", "sequence", "vocab")
        w = sharding.gather(self.unembedding(), ("embed", "vocab"), x.dtype)
        logits = jnp.einsum("btd,dv->btv", x, w, preferred_element_type=jnp.float32, out_sharding=out)
        return soft_cap(logits, self.config.logit_softcap)


def rope_tables(
    config: TransformerConfig, positions_bt: Int[Array, "b t"], lengths_bt: Int[Array, "b #t"]
) -> RopeTables:  # fmt: skip
    """One table for each distinct rotary config and head size, so that layers share them."""
    wanted = [
        key for stack in config.stacks for block in stack.pattern for key in block.attention.rope_tables()
    ]
    return {(rope, size): rope.table(positions_bt, size, lengths_bt) for rope, size in dict.fromkeys(wanted)}


def run_stack(
    layers: Layers, x: Float[Array, "b t d"], tables: RopeTables, context: Context, remat: Remat
) -> tuple[Float[Array, "b t d"], list[dict[str, Array]]]:
    """Scan over the repeats of a pattern; what the layers report comes back stacked."""

    def layer(block: nnx.Module, x: Array) -> tuple[Array, dict[str, Array]]:
        x = checkpoint_name(x, "layer_input")
        x, _, aux = block(x, tables, context)
        return x, aux

    def period(x: Array, blocks: Layers) -> tuple[Array, list[dict[str, Array]]]:
        reports = []
        for block in blocks:
            x, aux = rematerialised(layer, remat)(block, x)
            reports.append(aux)
        return x, reports

    return jax.lax.scan(period, x, layers)
