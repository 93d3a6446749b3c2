"""Gemma 1 to 3. Their norms are kept with 1 added; attention's factor on logits goes by the number of layers."""

from collections.abc import Mapping
from typing import Any

from maxstack.models.families.keys import Keys
from maxstack.models.pretrained.architectures.architecture import Architecture, Facts
from maxstack.models.pretrained.architectures.names import BASE, GATED, POST_NORMS, QK_NORMS, TIED
from maxstack.models.pretrained.architectures.rotary import read_scaling
from maxstack.models.pretrained.architectures.sizes import read_sizes, read_usual, usual_keys
from maxstack.models.pretrained.architectures.windows import SLIDING, layer_type_keys, read_layer_types
from maxstack.models.transformer import TransformerConfig

NORMS = r".*norm\.weight"
WINDOW, SWA_THETA = "attention.sliding_window", "rope.freq_base_swa"
LAYERS_OF_27B = {2: 46, 3: 62}
"""Layers of the largest model of a generation, whose attention is scaled by width / heads, not by the head's size."""


def gemma(keys: Keys, facts: Facts) -> dict[str, Any]:
    return read_usual(keys)


def gemma_keys(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    return usual_keys(keys)


def scalar(found: Mapping[str, Any], generation: int) -> int:
    """`query_pre_attn_scalar`, as llama.cpp has it."""
    largest = found["num_hidden_layers"] == LAYERS_OF_27B[generation]
    return found["hidden_size"] // found["num_attention_heads"] if largest else found["head_dim"]


def gemma2(keys: Keys, facts: Facts) -> dict[str, Any]:
    found = read_usual(keys)
    keys.expect(SWA_THETA, found["rope_theta"])
    return found | {
        "query_pre_attn_scalar": scalar(found, 2), "sliding_window": keys.whole(WINDOW, 4096),
        "layer_types": read_layer_types(keys, 2),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }  # fmt: skip


def gemma2_keys(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return usual_keys(keys) | layer_type_keys(keys["layer_types"], 2) | {
        WINDOW: keys["sliding_window"], **{cap: float(keys[cap]) for cap in caps if keys[cap] is not None}
    }  # fmt: skip


def gemma3(keys: Keys, facts: Facts) -> dict[str, Any]:
    """A scaling is for the layers that see everything; those with a window rotate by a base of their own."""
    found = read_sizes(keys) | read_scaling(keys, "none", "linear")
    window, theta = keys.whole(WINDOW, 0, least=0), keys.number(SWA_THETA, 10_000.0)
    kinds = read_layer_types(keys, 6) if window else ["full_attention"] * found["num_hidden_layers"]
    return found | {
        "query_pre_attn_scalar": scalar(found, 3), "sliding_window": window or None, "layer_types": kinds,
        "rope_local_base_freq": theta if window else None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", None),
    }  # fmt: skip


def gemma3_keys(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    found = usual_keys(keys)
    if keys["final_logit_softcapping"] is not None:
        found["final_logit_softcapping"] = float(keys["final_logit_softcapping"])
    if SLIDING not in keys["layer_types"]:
        return found
    window = {WINDOW: keys["sliding_window"], SWA_THETA: float(keys["rope_local_base_freq"])}
    return found | window | layer_type_keys(keys["layer_types"], 6)


GEMMA = Architecture(
    name="gemma", model_types=("gemma",), table=lambda _: {**TIED, **GATED}, read=gemma, keys=gemma_keys, tied=True,
    one_more=NORMS,
)  # fmt: skip
GEMMA2 = Architecture(
    name="gemma2", model_types=("gemma2",), table=lambda _: {**TIED, **GATED, **POST_NORMS}, read=gemma2,
    keys=gemma2_keys, tied=True, one_more=NORMS,
)  # fmt: skip
GEMMA3 = Architecture(
    name="gemma3", model_types=("gemma3_text", "gemma3"), table=lambda _: {**BASE, **GATED, **POST_NORMS, **QK_NORMS},
    read=gemma3, keys=gemma3_keys, one_more=NORMS,
)  # fmt: skip
