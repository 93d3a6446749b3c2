"""Granite 3 (IBM, github.com/ibm-granite): Llama with a factor at each of four places."""

from typing import Any

from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.families.family import Family, first_blocks, read_rope
from maxstack.models.families.keys import Keys
from maxstack.models.families.llama import INV_FREQ, TABLE, common_keys, model, sizes
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.layers import RMSNormConfig
from maxstack.models.transformer import TransformerConfig


def config(keys: Keys) -> TransformerConfig:
    keys.expect("hidden_act", "silu")
    bias, heads = keys.flag("attention_bias", False), sizes(keys)
    scale = float(keys.number("attention_multiplier", 1.0))
    norm = RMSNormConfig(eps=float(keys.number("rms_norm_eps", 1e-6)))
    attention = AttentionConfig(
        **heads, rope=read_rope(keys), qkv_bias=bias, output_bias=bias,
        scale=None if scale == heads["head_size"] ** -0.5 else scale,
    )  # fmt: skip
    feed_forward = FeedForwardConfig(size=keys.whole("intermediate_size"), bias=keys.flag("mlp_bias", False))
    block = BlockConfig(
        attention=attention, feed_forward=feed_forward, norm=norm,
        residual_multiplier=float(keys.number("residual_multiplier", 1.0)),
    )  # fmt: skip
    return model(
        keys, block, embedding_scale=float(keys.number("embedding_multiplier", 1.0)),
        logit_scale=1.0 / float(keys.number("logits_scaling", 1.0)),
    )  # fmt: skip


def keys(config: TransformerConfig) -> dict[str, Any]:
    block = first_blocks(config)[0]
    a = block.attention
    return common_keys(config, head_key=False) | {
        "hidden_act": "silu", "intermediate_size": block.feed_forward.size,
        "attention_bias": block.attention.qkv_bias, "mlp_bias": block.feed_forward.bias,
        "attention_multiplier": a.head_size**-0.5 if a.scale is None else a.scale,
        "residual_multiplier": block.residual_multiplier, "embedding_multiplier": config.embedding_scale,
        "logits_scaling": 1.0 / config.logit_scale,
    }  # fmt: skip


GRANITE = Family(
    name="Granite", model_types=("granite",), architecture="GraniteForCausalLM", config=config, keys=keys,
    table=lambda _: TABLE, unused=(INV_FREQ,),
)  # fmt: skip
