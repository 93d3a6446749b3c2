"""Qwen2, 2.5 (arXiv:2407.10671, 2412.15115) and Qwen3 (2505.09388): Llama with biases, or norms, on query and key."""

import dataclasses
from typing import Any

from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.families.family import Family, first_blocks, read_rope, stacks_of
from maxstack.models.families.keys import Keys
from maxstack.models.families.llama import INV_FREQ, LAYER, TABLE, common_keys, model, sizes
from maxstack.models.families.weights import Table
from maxstack.models.families.windows import read_windows, window_keys
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.layers import RMSNormConfig
from maxstack.models.transformer import TransformerConfig

# Of a config.json that does not have the key.
DEFAULTS = {
    "num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32_768,
}  # fmt: skip
QK_NORMS: Table = {f"attention.{p}_norm.scale": f"{LAYER}self_attn.{p}_norm.weight" for p in "qk"}


def windowed(keys: Keys, attention: AttentionConfig) -> TransformerConfig:
    """A model of gated layers that differ in their windows only."""
    keys.expect("hidden_act", "silu")
    norm = RMSNormConfig(eps=float(keys.number("rms_norm_eps", 1e-6)))
    feed_forward = FeedForwardConfig(size=keys.whole("intermediate_size"))
    blocks = [
        BlockConfig(
            attention=dataclasses.replace(attention, window=window), feed_forward=feed_forward, norm=norm
        )
        for window in read_windows(keys)
    ]
    return model(keys, blocks[0], stacks=stacks_of(blocks))


def qwen2(keys: Keys) -> TransformerConfig:
    keys = keys.with_defaults(DEFAULTS, over_null=False)
    keys.expect("use_mrope", False)
    return windowed(keys, AttentionConfig(**sizes(keys), rope=read_rope(keys), qkv_bias=True))


def qwen3(keys: Keys) -> TransformerConfig:
    keys = keys.with_defaults(DEFAULTS | {"head_dim": 128}, over_null=False)
    bias = keys.flag("attention_bias", False)
    norm = RMSNormConfig(eps=float(keys.number("rms_norm_eps", 1e-6)))
    attention = AttentionConfig(
        **sizes(keys), rope=read_rope(keys), qk_norm=norm, qkv_bias=bias, output_bias=bias
    )
    return windowed(keys, attention)


def common(config: TransformerConfig, *, head_key: bool) -> dict[str, Any]:
    blocks = first_blocks(config)
    return common_keys(config, head_key=head_key) | window_keys([block.attention.window for block in blocks]) | {
        "hidden_act": "silu", "intermediate_size": blocks[0].feed_forward.size,
    }  # fmt: skip


def qwen2_keys(config: TransformerConfig) -> dict[str, Any]:
    return common(config, head_key=False)


def qwen3_keys(config: TransformerConfig) -> dict[str, Any]:
    return common(config, head_key=True) | {"attention_bias": first_blocks(config)[0].attention.qkv_bias}


QWEN2 = Family(
    name="Qwen2", model_types=("qwen2",), architecture="Qwen2ForCausalLM", config=qwen2, keys=qwen2_keys,
    table=lambda _: TABLE, unused=(INV_FREQ,),
)  # fmt: skip
QWEN3 = Family(
    name="Qwen3", model_types=("qwen3",), architecture="Qwen3ForCausalLM", config=qwen3, keys=qwen3_keys,
    table=lambda _: {**TABLE, **QK_NORMS}, unused=(INV_FREQ,),
)  # fmt: skip
