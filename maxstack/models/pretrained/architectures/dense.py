"""Llama and what is built alike: InternLM2 and 3, Qwen2 and 3, SmolLM3, Granite, OLMo 2, Phi-3, GLM-4-0414."""

from collections.abc import Mapping
from typing import Any

from maxstack.config import UserError
from maxstack.models.families.family import first_blocks
from maxstack.models.families.keys import Keys
from maxstack.models.pretrained.architectures.architecture import Architecture, Facts
from maxstack.models.pretrained.architectures.names import (
    BASE,
    BIASES,
    GATED,
    GATED_BIASES,
    NEIGHBOURS,
    OUTPUT_BIAS,
    POST_NORMS,
    QK_NORMS,
    fused_gate,
    fused_qkv,
)
from maxstack.models.pretrained.architectures.rotary import (
    FACTORS,
    LONG,
    SHORT,
    longrope_keys,
    near,
    read_longrope,
    read_scaling,
    with_llama3,
)
from maxstack.models.pretrained.architectures.sizes import (
    read_sizes,
    read_usual,
    size_keys,
    usual_keys,
)
from maxstack.models.transformer import TransformerConfig

LLAMA_TABLE = {**BASE, **BIASES, **OUTPUT_BIAS, **GATED, **GATED_BIASES, **NEIGHBOURS}
QUERY_BIAS, OUTPUT, FEED_FORWARD_BIAS = "attn_q.bias", "attn_output.bias", "ffn_up.bias"


def usual(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    return usual_keys(keys)


def square(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    return usual_keys(keys, square=True)


def llama(keys: Keys, facts: Facts) -> dict[str, Any]:
    biases = {"attention_bias": facts.has(QUERY_BIAS), "mlp_bias": facts.has(FEED_FORWARD_BIAS)}
    return with_llama3(read_usual(keys), facts, keys.where) | biases


def internlm3(keys: Keys, facts: Facts) -> dict[str, Any]:
    return read_usual(keys) | {"qkv_bias": facts.has(QUERY_BIAS), "bias": facts.has(OUTPUT)}


def other_biases(keys: Keys, facts: Facts) -> bool:
    """Biases of query, key and value without those of everything else, or the other way round."""
    return facts.has(QUERY_BIAS) != facts.has(OUTPUT)


def internlm2(keys: Keys, facts: Facts) -> dict[str, Any]:
    return read_usual(keys, square=True) | {"bias": facts.has(QUERY_BIAS)}


def qwen2(keys: Keys, facts: Facts) -> dict[str, Any]:
    return read_usual(keys, square=True)


def biased(keys: Keys, facts: Facts) -> dict[str, Any]:
    return read_usual(keys) | {"attention_bias": facts.has(QUERY_BIAS)}


def olmo2(keys: Keys, facts: Facts) -> dict[str, Any]:
    return read_usual(keys, square=True) | {"attention_bias": facts.has(QUERY_BIAS)}


def granite(keys: Keys, facts: Facts) -> dict[str, Any]:
    """Four factors; 0 is none. For this architecture llama.cpp takes the key "finetuned" to mean rotation at all."""
    keys.expect("rope.scaling.finetuned", True)
    found = llama(keys, facts)
    scales = {
        "residual_multiplier": keys.number("residual_scale", 0.0) or 1.0,
        "embedding_multiplier": keys.number("embedding_scale", 0.0) or 1.0,
        "logits_scaling": keys.number("logit_scale"),
    }
    if not scales["logits_scaling"]:
        raise UserError(f"{keys.where}: {keys.path}logit_scale is 0, by which logits would be divided")
    usual_scale = found["head_dim"] ** -0.5
    scale = keys.number("attention.scale", 0.0) or usual_scale
    return found | scales | {"attention_multiplier": usual_scale if near(scale, usual_scale) else scale}


def granite_keys(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    names = {
        "residual_multiplier": "residual_scale", "embedding_multiplier": "embedding_scale",
        "logits_scaling": "logit_scale", "attention_multiplier": "attention.scale",
    }  # fmt: skip
    return usual_keys(keys) | {theirs: float(keys[ours]) for ours, theirs in names.items()}


def phi3(keys: Keys, facts: Facts) -> dict[str, Any]:
    """The window is the model's own, which llama.cpp does not apply."""
    found = read_sizes(keys, square=True, rotated=False)
    return found | read_longrope(keys, facts, found["max_position_embeddings"]) | {
        "partial_rotary_factor": share(keys, found["head_dim"]),
        "sliding_window": keys.whole("attention.sliding_window", 0, least=0) or None,
    }  # fmt: skip


def share(keys: Keys, head_size: int) -> float:
    """Of each head, what is rotated. Raises UserError for more than all of it."""
    rotated = keys.whole("rope.dimension_count", head_size)
    if rotated > head_size:
        raise UserError(f"{keys.where}: {keys.path}rope.dimension_count is {rotated} of heads of {head_size}")
    return rotated / head_size


def phi3_keys(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    """Without a window that llama.cpp would have to apply: it has none here."""
    a, window = first_blocks(config)[0].attention, keys["sliding_window"]
    unseen = {"attention.sliding_window": window} if window and window >= config.max_length else {}
    rotated = {"rope.dimension_count": a.rope.rotated(a.head_size)}
    return size_keys(keys, square=True) | longrope_keys(keys, a.rope) | rotated | unseen


def phi3_table(config: TransformerConfig):
    return {**BASE, **fused_qkv(config), **fused_gate(config)}


def glm4(keys: Keys, facts: Facts) -> dict[str, Any]:
    keys.expect("nextn_predict_layers", 0)
    found = read_sizes(keys, rotated=False) | read_scaling(keys)
    return found | {
        "attention_bias": facts.has(QUERY_BIAS), "partial_rotary_factor": share(keys, found["head_dim"]),
    }  # fmt: skip


def glm4_keys(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    a = first_blocks(config)[0].attention
    return usual_keys(keys) | {"rope.dimension_count": a.rope.rotated(a.head_size)}


def glm4_table(config: TransformerConfig):
    return {**BASE, **BIASES, **NEIGHBOURS, **POST_NORMS, **fused_gate(config)}


OLMO2_TABLE = {
    **{name: where for name, where in BASE.items() if name not in ("attention_norm.scale", "feed_forward_norm.scale")},
    **BIASES, **GATED, **POST_NORMS,
    **{f"attention.{p}_norm.norm.scale": f"blk.{{layer}}.attn_{p}_norm.weight" for p in "qk"},
}  # fmt: skip
LLAMA = Architecture(
    name="llama", model_types=("llama", "mistral", "internlm3", "internlm"), table=lambda _: LLAMA_TABLE, read=llama,
    keys=usual, factors=(FACTORS,),
    when=lambda keys, facts: "expert_count" not in keys and not other_biases(keys, facts),
)  # fmt: skip
INTERNLM3 = Architecture(
    name="llama", model_types=("internlm3",), table=lambda _: LLAMA_TABLE, read=internlm3, keys=usual,
    when=lambda keys, facts: "expert_count" not in keys and other_biases(keys, facts),
)  # fmt: skip
INTERNLM2 = Architecture(
    name="internlm2", model_types=("internlm2",), table=lambda _: {**BASE, **BIASES, **GATED, **NEIGHBOURS},
    read=internlm2, keys=square, tied=False,
)  # fmt: skip
QWEN2 = Architecture(
    name="qwen2", model_types=("qwen2",), table=lambda _: {**BASE, **BIASES, **GATED}, read=qwen2, keys=square
)
QWEN3 = Architecture(
    name="qwen3", model_types=("qwen3",), table=lambda _: {**BASE, **BIASES, **GATED, **QK_NORMS}, read=biased,
    keys=usual,
)  # fmt: skip
SMOLLM3 = Architecture(
    name="smollm3", model_types=("smollm3",), table=lambda _: {**BASE, **BIASES, **GATED, **NEIGHBOURS},
    # Every fourth layer is not rotated: family and llama.cpp agree on that where no key says otherwise.
    read=biased, keys=usual,
)  # fmt: skip
GRANITE = Architecture(
    name="granite", model_types=("granite",), table=lambda _: LLAMA_TABLE, read=granite, keys=granite_keys,
    factors=(FACTORS,),
)  # fmt: skip
OLMO2 = Architecture(
    name="olmo2", model_types=("olmo2",), table=lambda _: OLMO2_TABLE, read=olmo2, keys=square, tied=False
)
PHI3 = Architecture(
    name="phi3", model_types=("phi3",), table=phi3_table, read=phi3, keys=phi3_keys, factors=(LONG, SHORT)
)
GLM4 = Architecture(name="glm4", model_types=("glm4",), table=glm4_table, read=glm4, keys=glm4_keys)
