"""InternLM 1, InternLM2 and 2.5 (arXiv:2403.17297), InternLM3.

Their repositories carry code of their own, which is not run: the mathematics is Llama's, with biases (1), query, key
and value of each group in one tensor (2), biases on query, key and value (3).
"""

from typing import Any

import numpy as np

from maxstack.config import UserError
from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.families.family import Family, first_blocks, read_rope
from maxstack.models.families.keys import Keys
from maxstack.models.families.llama import INV_FREQ, LAYER, TABLE, common_keys, model, sizes
from maxstack.models.families.weights import Form, Place, Special, Table
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.layers import RMSNormConfig
from maxstack.models.rope import RopeConfig
from maxstack.models.transformer import TransformerConfig

# How attention is computed, not what.
HARMLESS = frozenset({"_flash_attn_2_enabled"})


# Of an InternLM3's config.json that does not have the key.
DEFAULTS_3 = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32_768,
}


def grouped(part: str):
    """One of query, key and value in a tensor that holds, group after group, its queries, its key and its value."""

    def form(place: Place) -> Form:
        *ins, _, h = place.shape
        attention: Any = place.block.attention if place.block is not None else None
        k, per = attention.kv_heads, attention.heads // attention.kv_heads
        shape = ((attention.heads + 2 * k) * h, *ins)

        def groups(a: np.ndarray) -> np.ndarray:
            return a.reshape(k, per + 2, h, *ins)

        if part == "q":
            order = (3, 0, 1, 2) if ins else (0, 1, 2)
            return Form(shape, lambda a: groups(a)[:, :per].transpose(order), (*ins, k, per, h))
        at = per if part == "k" else per + 1
        return Form(shape, lambda a: groups(a)[:, at].transpose(2, 0, 1) if ins else groups(a)[:, at])

    return form


INTERNLM2_TABLE: Table = {
    "embedding.table": "model.tok_embeddings.weight",
    "final_norm.scale": "model.norm.weight",
    "head": "output.weight",
    "attention_norm.scale": LAYER + "attention_norm.weight",
    "feed_forward_norm.scale": LAYER + "ffn_norm.weight",
    **{f"attention.{p}.w": Special(LAYER + "attention.wqkv.weight", grouped(p)) for p in "qkv"},
    **{f"attention.{p}.b": Special(LAYER + "attention.wqkv.bias", grouped(p)) for p in "qkv"},
    "attention.o.w": LAYER + "attention.wo.weight",
    "attention.o.b": LAYER + "attention.wo.bias",
    "feed_forward.gate.w": LAYER + "feed_forward.w1.weight",
    "feed_forward.up.w": LAYER + "feed_forward.w3.weight",
    "feed_forward.down.w": LAYER + "feed_forward.w2.weight",
}


def one_rope(keys: Keys) -> RopeConfig:
    """InternLM 1's settings: `rotary` with a base and a type; of itself, dynamic with a factor of 1."""
    inner = keys.nested("rotary")
    base, kind = float(inner.number("base", 10_000)), inner.expect("type", "dynamic", "origin")
    inner.skip("scaling_factor")
    longest = keys.whole("max_position_embeddings", 2048)
    if kind == "origin":
        return RopeConfig(theta=base)
    factor = float(inner.number("scaling_factor", 1.0))
    return RopeConfig(theta=base, scaling="dynamic", factor=factor, original_length=longest)


def gated(keys: Keys, attention: AttentionConfig, *, bias: bool = False) -> TransformerConfig:
    """A model of these layers."""
    keys.expect("hidden_act", "silu")
    norm = RMSNormConfig(eps=float(keys.number("rms_norm_eps", 1e-6)))
    feed_forward = FeedForwardConfig(size=keys.whole("intermediate_size"), bias=bias)
    return model(keys, BlockConfig(attention=attention, feed_forward=feed_forward, norm=norm))


def whole_heads(keys: Keys) -> dict[str, Any]:
    """Heads that together are as wide as the model: the code of the first two generations knows no others."""
    width, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    if width % heads:
        raise UserError(
            f"{keys.where}: hidden_size {width} must be a multiple of num_attention_heads {heads}"
        )
    keys.expect("head_dim", width // heads)
    return sizes(keys)


def one(keys: Keys) -> TransformerConfig:
    bias, heads = keys.flag("bias", True), whole_heads(keys)
    keys.expect("num_key_value_heads", heads["heads"])
    return gated(keys, AttentionConfig(**heads, rope=one_rope(keys), qkv_bias=bias, output_bias=bias))


def two(keys: Keys) -> TransformerConfig:
    bias, rope = keys.flag("bias", True), read_rope(keys)
    if rope.scaling not in ("none", "linear", "dynamic"):
        raise UserError(
            f"{keys.where}: InternLM2 models have linear or dynamic rotary scaling or none, not {rope.scaling}"
        )
    return gated(keys, AttentionConfig(**whole_heads(keys), rope=rope, qkv_bias=bias, output_bias=bias))


def three(keys: Keys) -> TransformerConfig:
    """`qkv_bias` and `bias` (of all other maps) as published, or `attention_bias` and `mlp_bias` of transformers."""
    keys = keys.with_defaults(DEFAULTS_3, over_null=False)
    qkv, bias = keys.flag("qkv_bias", False), keys.flag("bias", False)
    if "attention_bias" in keys or "mlp_bias" in keys:
        qkv, bias = keys.flag("attention_bias", qkv), keys.flag("mlp_bias", bias)
        keys.expect("qkv_bias", qkv)
        keys.expect("bias", bias)
    attention = AttentionConfig(**sizes(keys), rope=read_rope(keys), qkv_bias=qkv, output_bias=bias)
    return gated(keys, attention, bias=bias)


def written(config: TransformerConfig, *, head_key: bool = True) -> dict[str, Any]:
    """Keys of all three."""
    block = first_blocks(config)[0]
    return common_keys(config, head_key=head_key) | {
        "hidden_act": "silu",
        "intermediate_size": block.feed_forward.size,
    }


def one_keys(config: TransformerConfig) -> dict[str, Any]:
    keys, rope = two_keys(config), first_blocks(config)[0].attention.rope
    for name in ("rope_theta", "rope_scaling"):
        del keys[name]
    rotary = {"base": rope.theta, "type": "origin"}
    if rope.scaling == "dynamic":
        rotary |= {"type": "dynamic", "scaling_factor": rope.factor}
    return keys | {"rotary": rotary}


def two_keys(config: TransformerConfig) -> dict[str, Any]:
    keys, a = written(config, head_key=False), first_blocks(config)[0].attention
    scaling = keys.pop("rope_scaling", None)
    if scaling is not None:  # the older word is the one that its code knows
        scaling = {"type": scaling.pop("rope_type"), **scaling}
    return keys | {"bias": a.qkv_bias, "rope_scaling": scaling}


def three_keys(config: TransformerConfig) -> dict[str, Any]:
    block = first_blocks(config)[0]
    return written(config) | {"qkv_bias": block.attention.qkv_bias, "bias": block.feed_forward.bias}


INTERNLM = Family(
    name="InternLM", model_types=("internlm",), architecture="InternLMForCausalLM", config=one, keys=one_keys,
    table=lambda _: TABLE, unused=(INV_FREQ,), harmless=HARMLESS,
)  # fmt: skip
INTERNLM2 = Family(
    name="InternLM2", model_types=("internlm2",), architecture="InternLM2ForCausalLM", config=two, keys=two_keys,
    table=lambda _: INTERNLM2_TABLE, unused=(INV_FREQ,), harmless=HARMLESS,
)  # fmt: skip
INTERNLM3 = Family(
    name="InternLM3", model_types=("internlm3",), architecture="InternLM3ForCausalLM", config=three, keys=three_keys,
    table=lambda _: TABLE, unused=(INV_FREQ,), harmless=HARMLESS,
)  # fmt: skip
