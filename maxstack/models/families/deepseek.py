"""DeepSeek-V2 (arXiv:2405.04434), V3 and R1 (2412.19437): latent attention, dense layers before those with experts.

Their rotated pairs are neighbours in the file; here they are half the rotated part apart.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from maxstack.models.block import BlockConfig
from maxstack.models.families.experts import NO_BALANCE, experts_table, first_experts, layers_of, norm_of
from maxstack.models.families.family import (
    Family,
    first_blocks,
    rope_from,
    rope_keys,
    rope_settings,
    stacks_of,
)
from maxstack.models.families.keys import Keys
from maxstack.models.families.llama import INV_FREQ, LAYER, model
from maxstack.models.families.weights import Form, Place, Special, Table, interleaved, matrix, rows, whole
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.layers import RMSNormConfig
from maxstack.models.mla import MLAConfig
from maxstack.models.moe import MoEConfig
from maxstack.models.transformer import TransformerConfig

log = logging.getLogger(__name__)

TRAINING = frozenset({"seq_aux", "ep_size"})
LATENT_EPS = 1e-6
"""Of the latents' norms, whatever rms_norm_eps is."""


# Attention.


def read_attention(keys: Keys) -> MLAConfig:
    """Latent attention, with the rotary scaling's factor on its logits."""
    heads, nope, rope_size = (
        keys.whole(n) for n in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
    )
    keys.expect("num_key_value_heads", heads)
    keys.expect("rope_interleave", True)
    keys.expect("head_dim", rope_size)  # what transformers keeps there
    keys.expect("qk_head_dim", nope + rope_size)
    inner = rope_keys(keys)
    rope = rope_from(
        inner, theta=float(keys.number("rope_theta", 10_000.0)), longest=keys.whole("max_position_embeddings", 2048)
    )  # fmt: skip
    mscale = inner.number("mscale_all_dim", None) if rope.scaling == "yarn" else None
    return MLAConfig(
        heads=heads, kv_rank=keys.whole("kv_lora_rank"), q_rank=keys.whole("q_lora_rank", None), nope_size=nope,
        rope_size=rope_size, v_size=keys.whole("v_head_dim"), rope=rope, norm=RMSNormConfig(eps=LATENT_EPS),
        bias=keys.flag("attention_bias", False),
        scale=scale_of(nope + rope_size, rope.factor, float(mscale)) if mscale else None,
    )  # fmt: skip


def logarithmic(factor: float, mscale: float) -> float:
    """YaRN's factor for a context `factor` times longer, weighted by `mscale`."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def scale_of(head_size: int, factor: float, mscale: float) -> float:
    """Factor on attention's logits."""
    return head_size**-0.5 * logarithmic(factor, mscale) ** 2


def shortest(guess: float, gives: Callable[[float], float], target: float) -> float:
    """The number with the fewest digits near `guess` of which `gives` makes the target; `guess` when none does."""
    rounded = (float(f"{guess:.{digits}g}") for digits in range(1, 18))
    return next((number for number in rounded if gives(number) == target), guess)


def rotary_keys(a: MLAConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`: the inverse of what read_attention does with them."""
    keys = rope_settings(a.rope)
    if a.scale is None or a.rope.factor <= 1.0:
        return keys
    size, factor = a.nope_size + a.rope_size, a.rope.factor
    unit = 0.1 * math.log(factor)
    of_all = shortest(
        ((a.scale * size**0.5) ** 0.5 - 1.0) / unit, lambda mscale: scale_of(size, factor, mscale), a.scale
    )
    keys["rope_scaling"]["mscale_all_dim"] = of_all
    gain = keys["rope_scaling"].pop("attention_factor", None)
    if gain is not None:
        below = logarithmic(factor, of_all)
        of_part = shortest(
            (gain * below - 1.0) / unit, lambda mscale: logarithmic(factor, mscale) / below, gain
        )
        keys["rope_scaling"]["mscale"] = of_part
    return keys


def part_of_heads(start: int, size: int, total: int) -> Callable[[Place], Form]:
    """Outputs [start, start + size) of each head of `total`, of a leaf [inputs, heads, size]."""

    def form(place: Place) -> Form:
        inputs, heads, _ = place.shape
        return Form(
            (heads * total, inputs),
            lambda a: a.reshape(heads, total, inputs)[:, start : start + size].transpose(2, 0, 1),
        )

    return form


def query_heads(nope: int, rope: int) -> Callable[[Place], Form]:
    """Query heads [inputs, heads, nope + rope]: the rotated pairs, at the end of each, are neighbours in the file."""
    total = nope + rope

    def form(place: Place) -> Form:
        inputs, heads, _ = place.shape
        split = (inputs, heads, 2, rope // 2)

        def pairs(a: np.ndarray) -> np.ndarray:
            rotated = a.reshape(heads, total, inputs)[:, nope:]
            return rotated.reshape(heads, rope // 2, 2, inputs).transpose(3, 0, 2, 1)

        plain, shape = part_of_heads(0, nope, total)(place), (heads * total, inputs)
        parts = ((np.s_[..., :nope], plain), (np.s_[..., nope:], Form(shape, pairs, split)))
        return Form(shape, plain.view, parts=parts)

    return form


def one_head(place: Place) -> Form:
    """A rotated key that all heads share."""
    *inputs, size = place.shape
    return interleaved(Place(None, place.model, (*inputs, 1, size)))


def attention_table(a: MLAConfig) -> Table:
    """The tensors of latent attention, three of which hold two leaves each."""
    own, query = LAYER + "self_attn.", "q_b_proj" if a.q_rank else "q_proj"
    total, both = a.kv_rank + a.rope_size, a.nope_size + a.v_size
    down: dict[str, Special] = {}
    for leaf, name in (("w", "weight"), ("b", "bias")):
        source = f"{own}kv_a_proj_with_mqa.{name}"
        latent = matrix if leaf == "w" else whole
        down[f"attention.kv_down.{leaf}"] = Special(source, rows(0, a.kv_rank, total, latent))
        down[f"attention.k_rope.{leaf}"] = Special(source, rows(a.kv_rank, a.rope_size, total, one_head))
    return {
        **down,
        "attention.q_down.w": own + "q_a_proj.weight",
        "attention.q_down.b": own + "q_a_proj.bias",
        "attention.q_norm.scale": own + "q_a_layernorm.weight",
        "attention.q_up.w": Special(f"{own}{query}.weight", query_heads(a.nope_size, a.rope_size)),
        "attention.kv_norm.scale": own + "kv_a_layernorm.weight",
        "attention.k_up.w": Special(own + "kv_b_proj.weight", part_of_heads(0, a.nope_size, both)),
        "attention.v_up.w": Special(own + "kv_b_proj.weight", part_of_heads(a.nope_size, a.v_size, both)),
    }


# Experts.


def read_experts(keys: Keys, **fields: Any) -> MoEConfig:
    """Routed and shared experts; `fields` are those of routing."""
    keys.expect("moe_layer_freq", 1)
    size = keys.whole("moe_intermediate_size")
    return MoEConfig(
        size=size, experts=keys.whole("n_routed_experts"), experts_per_token=keys.whole("num_experts_per_tok"),
        shared_size=size * keys.whole("n_shared_experts", 0, least=0),
        auxiliary_loss=float(keys.number("aux_loss_alpha", 0.001)), **fields,
    )  # fmt: skip


def read_groups(keys: Keys, best: int) -> dict[str, int]:
    """Groups of experts, each scored by its `best` ones."""
    groups = keys.whole("n_group", 1)
    chosen = {"groups": groups, "groups_per_token": keys.whole("topk_group", 1)}
    return {**chosen, "group_best": best} if groups > 1 else chosen


def read(keys: Keys, experts: MoEConfig) -> TransformerConfig:
    """What both generations share: dense layers first, then those with experts."""
    keys.expect("hidden_act", "silu")
    keys.expect("mlp_bias", False)
    layers = keys.whole("num_hidden_layers")
    first = min(keys.whole("first_k_dense_replace", 0, least=0), layers)
    attention, norm = read_attention(keys), norm_of(keys, 1e-6)
    keys.skip("intermediate_size")  # when no layer is dense
    dense = FeedForwardConfig(size=keys.whole("intermediate_size")) if first else experts
    blocks = [
        BlockConfig(attention=attention, feed_forward=dense if layer < first else experts, norm=norm)
        for layer in range(layers)
    ]
    return model(keys, blocks[0], stacks=stacks_of(blocks))


def v2(keys: Keys) -> TransformerConfig:
    keys.expect("scoring_func", "softmax")
    keys.expect("norm_topk_prob", False)
    method = keys.expect("topk_method", "greedy", "group_limited_greedy")
    groups = read_groups(keys, best=1)
    scale = float(keys.number("routed_scaling_factor", 1.0))
    routing = {"normalize": False, "routed_scale": scale, **(groups if method != "greedy" else {})}
    return read(keys, read_experts(keys, **routing))


def v3(keys: Keys) -> TransformerConfig:
    keys.expect("scoring_func", "sigmoid")
    keys.expect("topk_method", "noaux_tc")
    if further := keys.whole("num_nextn_predict_layers", 0, least=0):
        log.warning("%s: layers that predict further tokens (%d) are not read", keys.where, further)
    routing = {
        "scoring": "sigmoid", "normalize": keys.flag("norm_topk_prob", True),
        "routed_scale": float(keys.number("routed_scaling_factor", 2.5)), **read_groups(keys, best=2),
    }  # fmt: skip
    return read(keys, read_experts(keys, **routing))


def shared_keys(config: TransformerConfig) -> dict[str, Any]:
    """What both generations write alike."""
    blocks = first_blocks(config)
    block, a = blocks[0], blocks[0].attention
    moe, dense = first_experts(config), layers_of(config, FeedForwardConfig)
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.width, "num_hidden_layers": config.depth,
        "num_attention_heads": a.heads, "num_key_value_heads": a.heads, "kv_lora_rank": a.kv_rank,
        "q_lora_rank": a.q_rank, "qk_nope_head_dim": a.nope_size, "qk_rope_head_dim": a.rope_size,
        "v_head_dim": a.v_size, "attention_bias": a.bias, "rms_norm_eps": block.norm.eps,
        "max_position_embeddings": config.max_length, "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu", "first_k_dense_replace": len(dense),
        "intermediate_size": dense[0].size if dense else moe.size, "moe_intermediate_size": moe.size,
        "n_routed_experts": moe.experts, "num_experts_per_tok": moe.experts_per_token,
        "n_shared_experts": moe.shared_size // moe.size, "routed_scaling_factor": moe.routed_scale,
        "norm_topk_prob": moe.normalize, "n_group": moe.groups, "topk_group": moe.groups_per_token,
        "aux_loss_alpha": moe.auxiliary_loss, "scoring_func": moe.scoring, "moe_layer_freq": 1, **rotary_keys(a),
        "pad_token_id": None,
    }  # fmt: skip


def v2_keys(config: TransformerConfig) -> dict[str, Any]:
    keys = shared_keys(config)
    return keys | {"topk_method": "group_limited_greedy" if keys["n_group"] > 1 else "greedy"}


def v3_keys(config: TransformerConfig) -> dict[str, Any]:
    return shared_keys(config) | {
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
    }


def table(config: TransformerConfig) -> Table:
    return {**experts_table("shared_experts"), **attention_table(first_blocks(config)[0].attention)}


def v3_table(config: TransformerConfig) -> Table:
    return {**table(config), "feed_forward.balance": LAYER + "mlp.gate.e_score_correction_bias"}


DEEPSEEK_V2 = Family(
    name="DeepSeek-V2", model_types=("deepseek_v2",), architecture="DeepseekV2ForCausalLM", config=v2, keys=v2_keys,
    table=table, absent=NO_BALANCE, harmless=TRAINING, unused=(INV_FREQ,),
)  # fmt: skip
DEEPSEEK_V3 = Family(
    name="DeepSeek-V3", model_types=("deepseek_v3",), architecture="DeepseekV3ForCausalLM", config=v3, keys=v3_keys,
    table=v3_table, harmless=TRAINING, unused=(INV_FREQ,), beyond=(r"model\.layers\.{layer}\..*",),
)  # fmt: skip
