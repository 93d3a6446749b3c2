"""OLMo 2 (arXiv:2501.00656): norms after attention and feed-forward, and over all heads of query and key."""

from typing import Any

from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.families.family import Family, first_blocks, read_rope
from maxstack.models.families.keys import Keys
from maxstack.models.families.llama import INV_FREQ, LAYER, TABLE, common_keys, model, sizes
from maxstack.models.families.weights import Table
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.layers import RMSNormConfig
from maxstack.models.transformer import TransformerConfig

OLMO2_TABLE: Table = {
    **{
        name: source
        for name, source in TABLE.items()
        if name not in ("attention_norm.scale", "feed_forward_norm.scale")
    },
    "attention_post_norm.scale": LAYER + "post_attention_layernorm.weight",
    "feed_forward_post_norm.scale": LAYER + "post_feedforward_layernorm.weight",
    **{f"attention.{p}_norm.norm.scale": f"{LAYER}self_attn.{p}_norm.weight" for p in "qk"},
}


def config(keys: Keys) -> TransformerConfig:
    keys.expect("hidden_act", "silu")
    bias = keys.flag("attention_bias", False)
    norm = RMSNormConfig(eps=float(keys.number("rms_norm_eps", 1e-5)))
    attention = AttentionConfig(
        **sizes(keys),
        rope=read_rope(keys),
        qk_norm=norm,
        qk_norm_over_heads=True,
        qkv_bias=bias,
        output_bias=bias,
    )
    feed_forward = FeedForwardConfig(size=keys.whole("intermediate_size"))
    block = BlockConfig(
        attention=attention, feed_forward=feed_forward, norm=norm, pre_norm=False, post_norm=True
    )
    return model(keys, block)


def keys(config: TransformerConfig) -> dict[str, Any]:
    block = first_blocks(config)[0]
    return common_keys(config, head_key=False) | {
        "hidden_act": "silu", "intermediate_size": block.feed_forward.size, "attention_bias": block.attention.qkv_bias,
    }  # fmt: skip


OLMO2 = Family(
    name="OLMo 2", model_types=("olmo2",), architecture="Olmo2ForCausalLM", config=config, keys=keys,
    table=lambda _: OLMO2_TABLE, unused=(INV_FREQ,),
)  # fmt: skip
