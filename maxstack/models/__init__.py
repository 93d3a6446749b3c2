"""The model: composed of small modules, extended functionally."""

from maxstack.models.attention import Attention, AttentionConfig
from maxstack.models.block import Block, BlockConfig
from maxstack.models.feed_forward import FeedForward, FeedForwardConfig
from maxstack.models.layers import LayerNormConfig, RMSNormConfig
from maxstack.models.mla import LatentAttention, MLAConfig
from maxstack.models.moe import MoE, MoEConfig
from maxstack.models.presets import llama
from maxstack.models.rope import RopeConfig
from maxstack.models.transformer import StackConfig, Transformer, TransformerConfig

__all__ = [
    "Attention", "AttentionConfig", "Block", "BlockConfig", "FeedForward", "FeedForwardConfig", "LatentAttention",
    "LayerNormConfig", "MLAConfig", "MoE", "MoEConfig", "RMSNormConfig", "RopeConfig", "StackConfig",
    "Transformer", "TransformerConfig", "llama",
]  # fmt: skip
