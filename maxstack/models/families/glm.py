"""GLM-4 (arXiv:2406.12793) and GLM-4-0414: neighbouring pairs of the start of each head are rotated."""

from typing import Any

from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.families.family import Family, first_blocks, read_rope
from maxstack.models.families.keys import Keys
from maxstack.models.families.llama import INV_FREQ, LAYER, TABLE, common_keys, model, sizes
from maxstack.models.families.phi import fused_gate_up
from maxstack.models.families.weights import Special, Table, interleaved
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.layers import RMSNormConfig
from maxstack.models.transformer import TransformerConfig

SANDWICH: Table = {
    "attention_post_norm.scale": LAYER + "post_self_attn_layernorm.weight",
    "feed_forward_post_norm.scale": LAYER + "post_mlp_layernorm.weight",
}
NEIGHBOURS: Table = {
    f"attention.{part}.{leaf}": Special(f"{LAYER}self_attn.{part}_proj.{name}", interleaved)
    for part in "qk"
    for leaf, name in (("w", "weight"), ("b", "bias"))
}


def reader(post_norm: bool):
    """The config of one of the two generations: the later one has norms on both sides of each part."""

    def config(keys: Keys) -> TransformerConfig:
        keys.expect("hidden_act", "silu")
        rope = read_rope(keys, fraction=float(keys.number("partial_rotary_factor", 0.5)))
        block = BlockConfig(
            attention=AttentionConfig(
                **sizes(keys, head_size=128), rope=rope, qkv_bias=keys.flag("attention_bias", True)
            ),
            feed_forward=FeedForwardConfig(size=keys.whole("intermediate_size")),
            norm=RMSNormConfig(eps=float(keys.number("rms_norm_eps", 1.5625e-7))),
            post_norm=post_norm,
        )
        return model(keys, block)

    return config


def keys(config: TransformerConfig) -> dict[str, Any]:
    block = first_blocks(config)[0]
    return common_keys(config) | {
        "hidden_act": "silu", "intermediate_size": block.feed_forward.size,
        "attention_bias": block.attention.qkv_bias, "partial_rotary_factor": block.attention.rope.fraction,
    }  # fmt: skip


def table(config: TransformerConfig) -> Table:
    return {**TABLE, **SANDWICH, **NEIGHBOURS, **fused_gate_up(config)}


GLM = Family(
    name="GLM-4", model_types=("glm",), architecture="GlmForCausalLM", config=reader(False), keys=keys, table=table,
    unused=(INV_FREQ,),
)  # fmt: skip
GLM4 = Family(
    name="GLM-4-0414", model_types=("glm4",), architecture="Glm4ForCausalLM", config=reader(True), keys=keys,
    table=table, unused=(INV_FREQ,),
)  # fmt: skip
