"""Shorthands for common shapes of TransformerConfig. Everything they set can be replaced."""

from typing import Any

from maxstack.config import UserError
from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.rope import RopeConfig
from maxstack.models.transformer import StackConfig, TransformerConfig


def llama(
    *, vocab_size: int, width: int, depth: int, heads: int, kv_heads: int, feed_forward: int,
    head_size: int | None = None, rope: RopeConfig | None = None, **model: Any,
) -> TransformerConfig:  # fmt: skip
    """A Llama-shaped model: RMSNorm, rotary grouped-query attention, SwiGLU, equal layers."""
    if head_size is None and width % heads:
        raise UserError(
            f"width {width} does not divide by heads {heads}: change one of them, or set head_size"
        )
    block = BlockConfig(
        attention=AttentionConfig(
            heads=heads, kv_heads=kv_heads, head_size=head_size or width // heads, rope=rope or RopeConfig()
        ),
        feed_forward=FeedForwardConfig(size=feed_forward),
    )
    stacks = (StackConfig(pattern=(block,), repeats=depth),)
    return TransformerConfig(vocab_size=vocab_size, width=width, stacks=stacks, **model)
