"""Mistral (arXiv:2310.06825): Llama with a window."""

from typing import Any

from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.families.family import Family, first_blocks, read_rope
from maxstack.models.families.keys import Keys
from maxstack.models.families.llama import INV_FREQ, TABLE, common_keys, model, sizes
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.layers import RMSNormConfig
from maxstack.models.transformer import TransformerConfig

# Of a config.json that does not have the key; a window of null is none.
DEFAULTS = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131_072}


def config(keys: Keys) -> TransformerConfig:
    keys = keys.with_defaults(DEFAULTS, over_null=False)
    keys.expect("hidden_act", "silu")
    norm = RMSNormConfig(eps=float(keys.number("rms_norm_eps", 1e-6)))
    attention = AttentionConfig(
        **sizes(keys), rope=read_rope(keys), window=keys.whole("sliding_window", None)
    )
    feed_forward = FeedForwardConfig(size=keys.whole("intermediate_size"))
    return model(keys, BlockConfig(attention=attention, feed_forward=feed_forward, norm=norm))


def keys(config: TransformerConfig) -> dict[str, Any]:
    block = first_blocks(config)[0]
    return common_keys(config) | {
        "hidden_act": "silu", "intermediate_size": block.feed_forward.size, "sliding_window": block.attention.window,
    }  # fmt: skip


MISTRAL = Family(
    name="Mistral", model_types=("mistral",), architecture="MistralForCausalLM", config=config, keys=keys,
    table=lambda _: TABLE, unused=(INV_FREQ,),
)  # fmt: skip
