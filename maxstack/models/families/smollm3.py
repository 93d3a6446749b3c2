"""SmolLM3 (huggingface.co/blog/smollm3): Llama without rotation in every fourth layer."""

import dataclasses
from typing import Any

from maxstack.config import UserError
from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.families.family import Family, first_blocks, read_rope, rope_settings, stacks_of
from maxstack.models.families.keys import Keys
from maxstack.models.families.llama import INV_FREQ, TABLE, common_keys, model, sizes
from maxstack.models.families.windows import read_windows, window_keys
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.layers import RMSNormConfig
from maxstack.models.transformer import TransformerConfig

THETA = 2_000_000.0
# Of a config.json that does not have the key.
DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32_768, "tie_word_embeddings": True}


def config(keys: Keys) -> TransformerConfig:
    keys = keys.with_defaults(DEFAULTS, over_null=False)
    keys.expect("hidden_act", "silu")
    layers, every = keys.whole("num_hidden_layers"), keys.whole("no_rope_layer_interval", 4)
    rotated = keys.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(layers)])
    if not isinstance(rotated, list) or len(rotated) < layers or any(one not in (0, 1) for one in rotated):
        raise UserError(
            f"{keys.where}: {keys.path}no_rope_layers is {rotated!r}: {layers} of 0 (no rotation) or 1 are needed"
        )
    rotated = [bool(one) for one in rotated[:layers]]
    bias = keys.flag("attention_bias", False)
    norm = RMSNormConfig(eps=float(keys.number("rms_norm_eps", 1e-6)))
    attention = AttentionConfig(
        **sizes(keys), rope=read_rope(keys, theta=THETA), qkv_bias=bias, output_bias=bias
    )
    feed_forward = FeedForwardConfig(size=keys.whole("intermediate_size"), bias=keys.flag("mlp_bias", False))
    windows = read_windows(keys, [not turns for turns in rotated])
    blocks = [
        BlockConfig(
            attention=dataclasses.replace(attention, window=window, rope=attention.rope if turns else None),
            feed_forward=feed_forward, norm=norm,
        )
        for turns, window in zip(rotated, windows, strict=True)
    ]  # fmt: skip
    return model(keys, blocks[0], stacks=stacks_of(blocks))


def keys(config: TransformerConfig) -> dict[str, Any]:
    blocks = first_blocks(config)
    rope = next((b.attention.rope for b in blocks if b.attention.rope is not None), None)
    return common_keys(config) | window_keys([b.attention.window for b in blocks]) | {
        "hidden_act": "silu", "intermediate_size": blocks[0].feed_forward.size,
        "attention_bias": blocks[0].attention.qkv_bias, "mlp_bias": blocks[0].feed_forward.bias,
        "no_rope_layers": [int(b.attention.rope is not None) for b in blocks], **(rope_settings(rope) if rope else {}),
    }  # fmt: skip


SMOLLM3 = Family(
    name="SmolLM3", model_types=("smollm3",), architecture="SmolLM3ForCausalLM", config=config, keys=keys,
    table=lambda _: TABLE, unused=(INV_FREQ,),
)  # fmt: skip
