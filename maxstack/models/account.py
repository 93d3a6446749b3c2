"""What a model costs: parameters by part, FLOPs and bytes a token.

Model FLOPs count a multiply-add as two, three times the forward pass for training, embedding look-up as nothing.
Two conventions are in use for attention: "full" counts every key of the row, "causal" only the visible ones, taken
as half of the row. Published figures mix them; both are printed, always.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp

from maxstack.models import tree
from maxstack.models.block import BlockConfig
from maxstack.models.moe import MoEConfig
from maxstack.models.transformer import TransformerConfig

# Bits of one stored number; "int8" and "int4" without their scales.
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}

Shapes = Mapping[str, tuple[int, ...]]
Axes = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Account:
    """Costs of one model at one sequence length."""

    parameters: int
    """Trained scalars."""
    active_parameters: int
    """Of these, the ones one token uses (experts not chosen left out)."""
    matrix_parameters: int
    """Of the active ones, those that a token is multiplied with."""
    read_parameters: int
    """Those read to decode one token alone: the active ones, but one row of a table that is only looked up."""
    attention_flops_full: float
    """Attention scores and values, forward, FLOPs a token, every key of the row."""
    attention_flops_causal: float
    """The same over the visible keys."""
    by_part: Mapping[str, int]
    """Parameters by part of the model."""

    @property
    def training_flops_full(self) -> float:
        """Forward and backward FLOPs a token, full attention."""
        return 3 * self.forward_flops_full

    @property
    def training_flops_causal(self) -> float:
        """Forward and backward FLOPs a token, visible keys only."""
        return 3 * self.forward_flops_causal

    @property
    def forward_flops_full(self) -> float:
        """Forward FLOPs a token, every key of the row: also those of decoding a token after a row of this length."""
        return 2 * self.matrix_parameters + self.attention_flops_full

    @property
    def forward_flops_causal(self) -> float:
        """Forward FLOPs a token, visible keys only."""
        return 2 * self.matrix_parameters + self.attention_flops_causal

    def weight_bytes(self, dtype: str) -> float:
        """Bytes of weights read to decode one token alone, in a type of BITS."""
        return self.read_parameters * BITS[dtype] / 8


def account(config: TransformerConfig, shapes: Shapes, axes: Axes, seq_len: int) -> Account:
    """Count `config`, whose trained weights have these shapes and logical axes, at rows of `seq_len` tokens."""
    active = matrices = read = 0.0
    parts: dict[str, int] = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        part = part_of(name, axes[name])
        parts[part] = parts.get(part, 0) + size
        used = size * used_share(config, name, axes[name])
        looked_up_only = name == "positions.table" or (
            name == "embedding.table" and not config.tie_embeddings
        )
        active += used
        read += shape[-1] if looked_up_only else used
        if (
            len([axis for axis in axes[name] if axis != "layers"]) > 1
            and not looked_up_only
            and not is_bias(name)
        ):
            matrices += used
    full = causal = 0.0
    for repeats, block in layers(config):
        per_key = block.attention.flops_per_key()
        window = window_of(block)
        full += repeats * per_key * min(seq_len, window or seq_len)
        causal += repeats * per_key * visible_keys(seq_len, window)
    return Account(sum(parts.values()), round(active), round(matrices), round(read), full, causal, parts)


def account_of(config: TransformerConfig, seq_len: int) -> Account:
    """Count `config` alone: nothing is computed but shapes."""
    model = tree.abstract(lambda: config.build(jax.random.key(0)))
    buffers = tree.buffer_names(model)
    shapes = {name: leaf.shape for name, leaf in tree.leaves(model).items() if name not in buffers}
    return account(config, shapes, tree.axes(model), seq_len)


def layers(config: TransformerConfig) -> list[tuple[int, BlockConfig]]:
    """Each kind of layer with how often it occurs."""
    return [(stack.repeats, block) for stack in config.stacks for block in stack.pattern]


def cache_bytes(config: TransformerConfig, dtype: str) -> float:
    """Bytes that one more token of context takes in the decode cache, all layers, in a type of BITS."""
    return sum(repeats * cache_size(block) for repeats, block in layers(config)) * BITS[dtype] / 8


def cache_bytes_read(config: TransformerConfig, length: int, dtype: str) -> float:
    """Bytes of cache that decoding one token after `length` others has to read: windowed layers stop at the window."""
    numbers = sum(
        repeats * cache_size(block) * min(length, window_of(block) or length)
        for repeats, block in layers(config)
    )
    return numbers * BITS[dtype] / 8


def cache_size(block: BlockConfig) -> int:
    """Numbers one layer keeps of each token of context."""
    cache = jax.eval_shape(lambda: block.attention.init_cache(1, 1, jnp.dtype(jnp.bfloat16)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(cache))


def window_of(block: BlockConfig) -> int | None:
    """The attention window of a layer, None when it sees the whole row."""
    return getattr(block.attention, "window", None)


def visible_keys(seq_len: int, window: int | None) -> float:
    """Mean keys a query sees in a row: half of the row, as the convention has it, or what the window leaves."""
    if window is None or window >= seq_len:
        return seq_len / 2
    return window - window * window / (2 * seq_len)


def used_share(config: TransformerConfig, name: str, axes: tuple[str, ...]) -> float:
    """Share of a weight that one token uses: routed experts are used in part."""
    if "expert" not in axes[:-1]:
        return 1.0
    _, stack, _, layer, *_ = name.split(".")
    moe = cast(MoEConfig, config.stacks[int(stack)].pattern[int(layer)].feed_forward)
    return moe.experts_per_token / moe.experts


def is_bias(name: str) -> bool:
    """Whether a leaf is an offset."""
    return name.endswith((".b", "_b"))


def part_of(name: str, axes: tuple[str, ...]) -> str:
    """The part of the model a weight belongs to, for people."""
    if "expert" in axes:
        return "experts" if "expert" in axes[:-1] else "router"
    if name.startswith("stacks."):
        _, _, _, _, part, *_ = name.split(".")
        return "norms" if "norm" in part else part
    return "norms" if "norm" in name else name.split(".")[0]
