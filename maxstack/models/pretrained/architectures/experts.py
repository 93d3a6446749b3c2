"""Models with experts: Mixtral (Llama's architecture), Qwen2-MoE, Qwen3-MoE, GPT-OSS."""

from collections.abc import Mapping
from typing import Any

from maxstack.config import UserError
from maxstack.models.families.experts import first_experts
from maxstack.models.families.keys import Keys
from maxstack.models.families.weights import Special, whole
from maxstack.models.pretrained.architectures.architecture import Architecture, Facts
from maxstack.models.pretrained.architectures.dense import LLAMA_TABLE, QUERY_BIAS
from maxstack.models.pretrained.architectures.names import (
    BASE,
    BIASES,
    BLOCK,
    EXPERTS,
    OUTPUT_BIAS,
    QK_NORMS,
    SHARED,
)
from maxstack.models.pretrained.architectures.rotary import FACTORS, with_llama3
from maxstack.models.pretrained.architectures.sizes import read_usual, usual_keys
from maxstack.models.pretrained.architectures.windows import layer_type_keys, read_layer_types
from maxstack.models.transformer import TransformerConfig

SIZE, SHARED_SIZE = "expert_feed_forward_length", "expert_shared_feed_forward_length"
WINDOW = "attention.sliding_window"


def counts(keys: Keys) -> dict[str, int]:
    """Experts, and how many of them a token uses."""
    return {"experts": keys.whole("expert_count"), "used": keys.whole("expert_used_count")}


def count_keys(config: TransformerConfig) -> dict[str, int]:
    """The inverse of counts."""
    moe = first_experts(config)
    return {"expert_count": moe.experts, "expert_used_count": moe.experts_per_token}


def mixtral(keys: Keys, facts: Facts) -> dict[str, Any]:
    count = counts(keys)
    return with_llama3(read_usual(keys), facts, keys.where) | {
        "num_local_experts": count["experts"], "num_experts_per_tok": count["used"],
    }  # fmt: skip


def mixtral_keys(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    return usual_keys(keys) | count_keys(config)


def qwen(keys: Keys, *, square: bool) -> dict[str, Any]:
    """Both Qwens, every layer of which has experts."""
    count, found = counts(keys), read_usual(keys, square=square)
    return found | {
        "num_experts": count["experts"], "num_experts_per_tok": count["used"],
        "moe_intermediate_size": keys.whole(SIZE, max(found["intermediate_size"] // count["used"], 1)),
    }  # fmt: skip


def qwen2_moe(keys: Keys, facts: Facts) -> dict[str, Any]:
    """The weights of a token's experts are left as they are."""
    found = qwen(keys, square=True)
    return found | {
        "norm_topk_prob": False, "qkv_bias": facts.has(QUERY_BIAS),
        "shared_expert_intermediate_size": keys.whole(SHARED_SIZE, found["intermediate_size"]),
    }  # fmt: skip


def qwen2_moe_keys(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    moe = first_experts(config)
    return usual_keys(keys, square=True) | count_keys(config) | {SIZE: moe.size, SHARED_SIZE: moe.shared_size}


def qwen3_moe(keys: Keys, facts: Facts) -> dict[str, Any]:
    """The weights of a token's experts are made to sum to one."""
    return qwen(keys, square=False) | {"norm_topk_prob": True, "attention_bias": facts.has(QUERY_BIAS)}


def qwen3_moe_keys(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    return usual_keys(keys) | count_keys(config) | {SIZE: first_experts(config).size}


def gpt_oss(keys: Keys, facts: Facts) -> dict[str, Any]:
    """YaRN's ramp begins and ends at fractions of a dimension, as the published models' does; llama.cpp rounds that."""
    count, found = counts(keys), read_usual(keys)
    scaling = found.get("rope_scaling")
    if not facts.has("attn_output.bias"):
        raise UserError(
            f"{keys.where}: a GPT-OSS model without biases in attention is none that llama.cpp reads"
        )
    return found | {
        "rope_scaling": {**scaling, "truncate": False} if scaling else {"rope_type": "default"},
        "attention_bias": True, "intermediate_size": keys.whole(SIZE), "sliding_window": keys.whole(WINDOW),
        "layer_types": read_layer_types(keys, 2), "num_local_experts": count["experts"],
        "num_experts_per_tok": count["used"],
    }  # fmt: skip


def gpt_oss_keys(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    """Without YaRN, which llama.cpp would not compute as the published models do."""
    keys = {**keys, "rope_scaling": None} if keys["rope_scaling"].get("truncate") is False else keys
    own = {SIZE: first_experts(config).size, WINDOW: keys["sliding_window"]}
    return usual_keys(keys) | count_keys(config) | layer_type_keys(keys["layer_types"], 2) | own


QWEN2_TABLE = {
    **BASE, **BIASES, **EXPERTS, **SHARED, "feed_forward.shared_gate": BLOCK + "ffn_gate_inp_shexp.weight",
}  # fmt: skip
GPT_OSS_TABLE = {
    **BASE, **BIASES, **OUTPUT_BIAS, **EXPERTS,
    "feed_forward_norm.scale": BLOCK + "post_attention_norm.weight", "attention.sinks": BLOCK + "attn_sinks.weight",
    "feed_forward.router_b": BLOCK + "ffn_gate_inp.bias",
    **{f"feed_forward.{p}_b": Special(f"{BLOCK}ffn_{p}_exps.bias", whole) for p in ("gate", "up", "down")},
}  # fmt: skip
MIXTRAL = Architecture(
    name="llama", model_types=("mixtral",), table=lambda _: {**LLAMA_TABLE, **EXPERTS}, read=mixtral,
    keys=mixtral_keys, when=lambda keys, facts: "expert_count" in keys, factors=(FACTORS,),
)  # fmt: skip
QWEN2_MOE = Architecture(
    name="qwen2moe", model_types=("qwen2_moe",), table=lambda _: QWEN2_TABLE, read=qwen2_moe, keys=qwen2_moe_keys,
    tied=False,
)  # fmt: skip
QWEN3_MOE = Architecture(
    name="qwen3moe", model_types=("qwen3_moe",), table=lambda _: {**BASE, **BIASES, **EXPERTS, **QK_NORMS},
    read=qwen3_moe, keys=qwen3_moe_keys,
)  # fmt: skip
GPT_OSS = Architecture(
    name="gpt-oss",
    model_types=("gpt_oss",),
    table=lambda _: GPT_OSS_TABLE,
    read=gpt_oss,
    keys=gpt_oss_keys,
    tied=False,
)
