"""DeepSeek-V2 and V3: latent attention, whose maps from the latent to keys and values llama.cpp keeps apart.

In a file keys and values are one head, the latent; the sizes of the heads that they expand to have keys of their own.
Files from before that keep one map to both, and are read too.
"""

from collections.abc import Mapping
from typing import Any

from maxstack.config import UserError
from maxstack.models.families.deepseek import LATENT_EPS, one_head, part_of_heads, query_heads
from maxstack.models.families.experts import first_experts
from maxstack.models.families.family import first_blocks
from maxstack.models.families.keys import Keys
from maxstack.models.families.weights import Form, Place, Special, Table, matrix, rows
from maxstack.models.mla import MLAConfig
from maxstack.models.pretrained.architectures.architecture import Architecture, Facts
from maxstack.models.pretrained.architectures.names import BASE, BLOCK, EXPERTS, GATED, SHARED
from maxstack.models.pretrained.architectures.rotary import read_scaling, scaling_keys
from maxstack.models.transformer import TransformerConfig

SOFTMAX, SIGMOID = 1, 2
LAYERS_WITHOUT_Q_RANK = (26, 27)
"""Of the models whose queries have no latent: llama.cpp goes by the number of layers."""
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
KEY_SIZE, VALUE_SIZE = "attention.key_length_mla", "attention.value_length_mla"


def read_attention(keys: Keys) -> dict[str, Any]:
    """Sizes and rotary settings."""
    rank, rope = keys.whole("attention.kv_lora_rank"), keys.whole("rope.dimension_count")
    split = KEY_SIZE in keys
    heads = keys.whole("attention.head_count")
    if split:
        keys.expect("attention.head_count_kv", 1)
        keys.expect("attention.key_length", rank + rope)
        keys.expect("attention.value_length", rank)
    else:
        keys.expect("attention.head_count_kv", heads)
    size = keys.whole(KEY_SIZE if split else "attention.key_length")
    if size <= rope:
        raise UserError(f"{keys.where}: {keys.path}rope.dimension_count is {rope} of heads of {size}")
    found = {
        "num_attention_heads": heads, "num_key_value_heads": heads, "kv_lora_rank": rank, "qk_rope_head_dim": rope,
        "qk_nope_head_dim": size - rope, "v_head_dim": keys.whole(VALUE_SIZE if split else "attention.value_length"),
        **read_scaling(keys, "none", "yarn"),
    }  # fmt: skip
    if keys.whole("block_count") not in LAYERS_WITHOUT_Q_RANK:
        found["q_lora_rank"] = keys.whole("attention.q_lora_rank")
    if "rope_scaling" in found:
        # A tenth of it, as the conversion has it; the other of DeepSeek's two numbers is taken to be the same.
        number = float(f"{10 * keys.number(LOG_MULTIPLIER):.6g}")
        found["rope_scaling"] |= {"mscale": number, "mscale_all_dim": number}
    return found


def attention_keys(keys: Mapping[str, Any], a: MLAConfig) -> dict[str, Any]:
    """The inverse of read_attention."""
    found = {
        "attention.head_count": a.heads, "attention.head_count_kv": 1, "attention.kv_lora_rank": a.kv_rank,
        "attention.key_length": a.kv_rank + a.rope_size, "attention.value_length": a.kv_rank,
        KEY_SIZE: a.nope_size + a.rope_size, VALUE_SIZE: a.v_size, "rope.dimension_count": a.rope_size,
        **scaling_keys(keys),
    }  # fmt: skip
    if a.q_rank is not None:
        found["attention.q_lora_rank"] = a.q_rank
    scale = (keys.get("rope_scaling") or {}).get("mscale_all_dim")
    return found if scale is None else found | {LOG_MULTIPLIER: 0.1 * scale}


def read(keys: Keys, facts: Facts) -> dict[str, Any]:
    """What both generations say alike."""
    # The latents' norms have an epsilon of their own in the reference, and the model's in llama.cpp.
    eps = keys.number("attention.layer_norm_rms_epsilon")
    if eps != LATENT_EPS:
        raise UserError(
            f"{keys.where}: {keys.path}attention.layer_norm_rms_epsilon is {eps}, not {LATENT_EPS}"
        )
    return read_attention(keys) | {
        "rms_norm_eps": eps, "hidden_size": keys.whole("embedding_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "max_position_embeddings": keys.whole("context_length"), "intermediate_size": keys.whole("feed_forward_length"),
        "first_k_dense_replace": keys.whole("leading_dense_block_count", 0, least=0),
        "moe_intermediate_size": keys.whole("expert_feed_forward_length"),
        "n_routed_experts": keys.whole("expert_count"), "num_experts_per_tok": keys.whole("expert_used_count"),
        "n_shared_experts": keys.whole("expert_shared_count"),
        "routed_scaling_factor": keys.number("expert_weights_scale", 0.0) or 1.0,
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
    }  # fmt: skip


def v2(keys: Keys, facts: Facts) -> dict[str, Any]:
    """A group's score is that of its best expert in V2, of its two best in llama.cpp: groups are refused."""
    keys.expect("expert_gating_func", SOFTMAX)
    keys.expect("expert_group_count", 1)
    keys.expect("expert_group_used_count", 1)
    return read(keys, facts)


def v3(keys: Keys, facts: Facts) -> dict[str, Any]:
    keys.expect("expert_gating_func", SIGMOID)
    return read(keys, facts) | {
        "n_group": keys.whole("expert_group_count", 1), "topk_group": keys.whole("expert_group_used_count", 1),
    }  # fmt: skip


def written(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    moe, a = first_experts(config), first_blocks(config)[0].attention
    groups = {"expert_group_count": moe.groups, "expert_group_used_count": moe.groups_per_token}
    return attention_keys(keys, a) | {
        "vocab_size": config.vocab_size, "embedding_length": config.width, "block_count": config.depth,
        "context_length": config.max_length, "feed_forward_length": keys["intermediate_size"],
        "attention.layer_norm_rms_epsilon": float(keys["rms_norm_eps"]),
        "leading_dense_block_count": keys["first_k_dense_replace"], "expert_feed_forward_length": moe.size,
        "expert_count": moe.experts, "expert_used_count": moe.experts_per_token,
        "expert_shared_count": keys["n_shared_experts"], "expert_weights_scale": float(moe.routed_scale),
        "expert_weights_norm": moe.normalize,
        "expert_gating_func": SIGMOID if moe.scoring == "sigmoid" else SOFTMAX,
        **(groups if moe.groups > 1 else {}),
    }  # fmt: skip


def transposed_heads(place: Place) -> Form:
    """[inputs, heads, size] as a matrix [inputs, size] for each head."""
    i, n, h = place.shape
    return Form((n, i, h), lambda a: a.transpose(1, 0, 2))


def matrices(place: Place) -> Form:
    """[inputs, heads, size] as a matrix [size, inputs] for each head."""
    i, n, h = place.shape
    return Form((n, h, i), lambda a: a.transpose(2, 0, 1))


def table(config: TransformerConfig) -> Table:
    a = first_blocks(config)[0].attention
    total, source = a.kv_rank + a.rope_size, BLOCK + "attn_kv_a_mqa.weight"
    query = BLOCK + ("attn_q_b.weight" if a.q_rank else "attn_q.weight")
    without = {name: where for name, where in BASE.items() if name not in ("attention.k.w", "attention.v.w")}
    return {
        **without, **GATED, **EXPERTS, **SHARED,
        "attention.q_down.w": BLOCK + "attn_q_a.weight", "attention.q_norm.scale": BLOCK + "attn_q_a_norm.weight",
        "attention.q_up.w": Special(query, query_heads(a.nope_size, a.rope_size)),
        "attention.kv_down.w": Special(source, rows(0, a.kv_rank, total, matrix)),
        "attention.k_rope.w": Special(source, rows(a.kv_rank, a.rope_size, total, one_head)),
        "attention.kv_norm.scale": BLOCK + "attn_kv_a_norm.weight",
        "attention.k_up.w": Special(BLOCK + "attn_k_b.weight", transposed_heads),
        "attention.v_up.w": Special(BLOCK + "attn_v_b.weight", matrices),
    }  # fmt: skip


def older_table(config: TransformerConfig) -> Table:
    a = first_blocks(config)[0].attention
    source, both = BLOCK + "attn_kv_b.weight", a.nope_size + a.v_size
    return {
        **table(config),
        "attention.k_up.w": Special(source, part_of_heads(0, a.nope_size, both)),
        "attention.v_up.w": Special(source, part_of_heads(a.nope_size, a.v_size, both)),
    }


def v3_table(config: TransformerConfig) -> Table:
    return {**table(config), "feed_forward.balance": BLOCK + "exp_probs_b.bias"}


def third(keys: Keys, facts: Facts) -> bool:
    return keys.values.get("expert_gating_func") == SIGMOID


DEEPSEEK_V2 = Architecture(
    name="deepseek2", model_types=("deepseek_v2",), table=table, read=v2, keys=written,
    when=lambda keys, facts: not third(keys, facts) and KEY_SIZE in keys,
)  # fmt: skip
DEEPSEEK_V2_OLDER = Architecture(
    name="deepseek2", model_types=("deepseek_v2",), table=older_table, read=v2, keys=written,
    when=lambda keys, facts: not third(keys, facts) and KEY_SIZE not in keys,
)  # fmt: skip
DEEPSEEK_V3 = Architecture(
    name="deepseek2", model_types=("deepseek_v3",), table=v3_table, read=v3, keys=written, when=third,
)  # fmt: skip
