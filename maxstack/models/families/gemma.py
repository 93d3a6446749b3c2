"""Gemma 1 to 3 (arXiv:2403.08295, 2408.00118, 2503.19786): the text models, also out of those with images."""

import dataclasses
import logging
import math
from typing import Any

from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.families.family import (
    Family,
    first_blocks,
    read_rope,
    rope_from,
    rope_settings,
    stacks_of,
)
from maxstack.models.families.keys import Keys
from maxstack.models.families.llama import LAYER, TABLE, common_keys, sizes
from maxstack.models.families.weights import Table
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.layers import RMSNormConfig
from maxstack.models.rope import RopeConfig
from maxstack.models.transformer import TransformerConfig

log = logging.getLogger(__name__)

SANDWICH: Table = {
    **TABLE,
    "attention_post_norm.scale": LAYER + "post_attention_layernorm.weight",
    "feed_forward_norm.scale": LAYER + "pre_feedforward_layernorm.weight",
    "feed_forward_post_norm.scale": LAYER + "post_feedforward_layernorm.weight",
}
GEMMA3_TABLE: Table = {
    **SANDWICH,
    "attention.q_norm.scale": LAYER + "self_attn.q_norm.weight",
    "attention.k_norm.scale": LAYER + "self_attn.k_norm.weight",
}
# The sizes that a Gemma 3's config.json may leave out, as those of the published models with images do.
DEFAULTS_3 = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6,
}  # fmt: skip
IMAGE_KEYS = (
    "mm_tokens_per_image",
    *(f"{one}_token_{end}" for one in ("image", "boi", "eoi") for end in ("id", "index")),
)
THETA_GLOBAL, THETA_LOCAL = 1_000_000.0, 10_000.0


def block(keys: Keys, **fields: Any) -> BlockConfig:
    """What the layers of all three have in common."""
    # "gelu" is what the first release wrote; its models were trained with the approximation by tanh.
    keys.expect("hidden_act", "gelu_pytorch_tanh", "gelu")
    keys.expect("hidden_activation", "gelu_pytorch_tanh")
    keys.expect("use_bidirectional_attention", False)
    bias = keys.flag("attention_bias", False)
    attention: dict[str, Any] = {"qkv_bias": bias, "output_bias": bias, **sizes(keys, head_size=256)}
    return BlockConfig(
        attention=AttentionConfig(**attention | fields),
        feed_forward=FeedForwardConfig(size=keys.whole("intermediate_size"), activation="gelu_tanh"),
        norm=RMSNormConfig(eps=float(keys.number("rms_norm_eps", 1e-6)), unit_offset=True),
    )


def model(keys: Keys, blocks: list[BlockConfig], **fields: Any) -> TransformerConfig:
    width = keys.whole("hidden_size")
    return TransformerConfig(
        vocab_size=keys.whole("vocab_size"), width=width, stacks=stacks_of(blocks), final_norm=blocks[0].norm,
        tie_embeddings=keys.flag("tie_word_embeddings", True), embedding_scale=math.sqrt(width),
        max_length=keys.whole("max_position_embeddings", 8192), **fields,
    )  # fmt: skip


def gemma(keys: Keys) -> TransformerConfig:
    return model(keys, [block(keys, rope=read_rope(keys))] * keys.whole("num_hidden_layers"))


def scale(keys: Keys) -> float | None:
    """The factor on attention's logits; None when it is the usual one."""
    scalar = float(keys.number("query_pre_attn_scalar", 256))
    head_size = keys.whole("head_dim", 256)
    return None if scalar == head_size else scalar**-0.5


def softcap(keys: Keys, name: str, default: float | None) -> float | None:
    """A bound on logits, which null switches off; absent, it is `default`."""
    value = keys.number(name, default if name not in keys.values else None)
    return None if value is None else float(value)


def gemma2(keys: Keys) -> TransformerConfig:
    cap = softcap(keys, "attn_logit_softcapping", 50.0)
    keys.expect("sliding_window_size", window(keys))  # both names are in some
    full = block(keys, rope=read_rope(keys), softcap=cap, scale=scale(keys))
    kinds = {"full_attention": sandwiched(full), "sliding_attention": sandwiched(full, window=window(keys))}
    blocks = [kinds[kind] for kind in layer_types(keys, pattern=2)]
    return model(keys, blocks, logit_softcap=softcap(keys, "final_logit_softcapping", 30.0))


def sandwiched(block: BlockConfig, **attention: Any) -> BlockConfig:
    """With norms on both sides of each part."""
    changed = dataclasses.replace(block.attention, **attention)  # type: ignore[type-var]
    return dataclasses.replace(block, attention=changed, post_norm=True)


def window(keys: Keys) -> int:
    return keys.whole("sliding_window", 4096)


def layer_types(keys: Keys, pattern: int) -> list[str]:
    """Each layer's kind; by default every `pattern`-th is a full one."""
    layers = keys.whole("num_hidden_layers")
    usual = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    return keys.choices("layer_types", usual, "sliding_attention", "full_attention")


def gemma3(keys: Keys) -> TransformerConfig:
    keys = keys.with_defaults(DEFAULTS_3)
    keys.skip("_sliding_window_pattern")  # a copy of the one without the underscore
    keys.expect("attn_logit_softcapping", None)
    rotation = ropes(keys)
    norm = RMSNormConfig(eps=float(keys.number("rms_norm_eps", 1e-6)), unit_offset=True)
    full = block(keys, rope=rotation["full_attention"], qk_norm=norm, scale=scale(keys))
    local = {"window": window(keys), "rope": rotation["sliding_attention"]}
    kinds = {"full_attention": sandwiched(full), "sliding_attention": sandwiched(full, **local)}
    blocks = [kinds[kind] for kind in layer_types(keys, pattern=keys.whole("sliding_window_pattern"))]
    return model(keys, blocks, logit_softcap=softcap(keys, "final_logit_softcapping", None))


def ropes(keys: Keys) -> dict[str, RopeConfig]:
    """The rotary embedding of each kind of layer, in either spelling. A scaling in the older one is for full layers."""
    longest = keys.whole("max_position_embeddings")
    thetas = {
        "full_attention": float(keys.number("rope_theta", THETA_GLOBAL)),
        "sliding_attention": float(keys.number("rope_local_base_freq", THETA_LOCAL)),
    }
    if "rope_parameters" in keys:
        keys.skip("rope_scaling")
        outer = keys.nested("rope_parameters")
        inner = {kind: outer.nested(kind) for kind in thetas}
    else:
        inner = {"full_attention": keys.nested("rope_scaling"), "sliding_attention": Keys({}, keys.where)}
    return {kind: rope_from(inner[kind], theta=thetas[kind], longest=longest) for kind in thetas}


def gemma3_any(keys: Keys) -> TransformerConfig:
    """The text model alone, or out of a model that sees images too; what sees is left aside."""
    if "text_config" not in keys:
        return gemma3(keys)
    log.warning("%s is of a model that sees images: only its text model is read", keys.where)
    keys.skip("vision_config", *IMAGE_KEYS)
    text = keys.nested("text_config")
    tied = {"tie_word_embeddings": keys.flag("tie_word_embeddings", True)}
    text.skip("model_type")
    return gemma3(text.with_defaults(tied))


def gemma_keys(config: TransformerConfig) -> dict[str, Any]:
    block = first_blocks(config)[0]
    return common_keys(config) | {
        "hidden_act": "gelu_pytorch_tanh", "intermediate_size": block.feed_forward.size,
        "attention_bias": block.attention.qkv_bias,
    }  # fmt: skip


def gemma2_keys(config: TransformerConfig) -> dict[str, Any]:
    blocks = first_blocks(config)
    a = blocks[0].attention
    windows = [block.attention.window for block in blocks]
    keys = gemma_keys(config) | {
        "query_pre_attn_scalar": a.head_size if a.scale is None else whole_if_close(a.scale**-2),
        "sliding_window": next((w for w in windows if w is not None), 4096),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
        "attn_logit_softcapping": a.softcap, "final_logit_softcapping": config.logit_softcap,
        "hidden_activation": "gelu_pytorch_tanh",
    }  # fmt: skip
    del keys["hidden_act"]
    return keys


def whole_if_close(value: float) -> int | float:
    """The whole number that a value is but for rounding."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def gemma3_keys(config: TransformerConfig) -> dict[str, Any]:
    blocks = first_blocks(config)
    local = next((b.attention.rope for b in blocks if b.attention.window is not None), None)
    full = next((b.attention.rope for b in blocks if b.attention.window is None), None)
    keys = gemma2_keys(config)
    for name in ("rope_theta", "rope_scaling"):
        keys.pop(name, None)
    return keys | {
        **rope_settings(full or RopeConfig(theta=THETA_GLOBAL)), "rope_local_base_freq": (local or RopeConfig()).theta,
    }  # fmt: skip


GEMMA = Family(
    name="Gemma", model_types=("gemma",), architecture="GemmaForCausalLM", config=gemma, keys=gemma_keys,
    table=lambda _: TABLE,
)  # fmt: skip
GEMMA2 = Family(
    name="Gemma 2", model_types=("gemma2",), architecture="Gemma2ForCausalLM", config=gemma2, keys=gemma2_keys,
    table=lambda _: SANDWICH,
)  # fmt: skip
GEMMA3 = Family(
    name="Gemma 3", model_types=("gemma3_text", "gemma3"), architecture="Gemma3ForCausalLM", config=gemma3_any,
    keys=gemma3_keys, table=lambda _: GEMMA3_TABLE,
    spellings=((r"language_model\.(.*)", r"\1"), (r"model\.language_model\.(.*)", r"model.\1")),
    unused=(r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*"),
)  # fmt: skip
