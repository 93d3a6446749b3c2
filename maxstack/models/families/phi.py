"""Phi-3, 3.5, 4 and 4-mini (arXiv:2404.14219, 2412.08905, 2503.01743): Llama with fused maps and LongRoPE."""

from typing import Any

from maxstack.config import UserError
from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.families.family import Family, first_blocks, read_rope
from maxstack.models.families.keys import Keys
from maxstack.models.families.llama import INV_FREQ, LAYER, TABLE, common_keys, model, sizes
from maxstack.models.families.weights import Special, Table, matrix, rows
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.layers import RMSNormConfig
from maxstack.models.transformer import TransformerConfig

# Features that some published config.json name and none has switched on.
OFF = {
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "interpolate_factor": 1,
    "full_attn_mod": 1,
}


def config(keys: Keys) -> TransformerConfig:
    keys.expect("hidden_act", "silu")
    for name, value in OFF.items():
        keys.expect(name, value)
    fraction = float(keys.number("partial_rotary_factor", 1.0))
    rope = read_rope(keys, fraction=fraction, original=keys.whole("original_max_position_embeddings", 4096))
    if rope.scaling not in ("none", "longrope"):
        raise UserError(f"{keys.where}: Phi models have longrope scaling or none, not {rope.scaling}")
    attention = AttentionConfig(**sizes(keys), rope=rope, window=keys.whole("sliding_window", None))
    norm = RMSNormConfig(eps=float(keys.number("rms_norm_eps", 1e-5)))
    feed_forward = FeedForwardConfig(size=keys.whole("intermediate_size"))
    return model(keys, BlockConfig(attention=attention, feed_forward=feed_forward, norm=norm))


def keys(config: TransformerConfig) -> dict[str, Any]:
    block = first_blocks(config)[0]
    a = block.attention
    original = a.rope.original_length if a.rope.scaling == "longrope" else config.max_length
    return common_keys(config, head_key=False) | {
        "hidden_act": "silu", "intermediate_size": block.feed_forward.size, "sliding_window": a.window,
        "partial_rotary_factor": a.rope.fraction, "original_max_position_embeddings": original,
    }  # fmt: skip


def fused_gate_up(config: TransformerConfig) -> Table:
    """Gate and up in one tensor, one below the other."""
    size = first_blocks(config)[0].feed_forward.size
    return {
        f"feed_forward.{part}.w": Special(
            LAYER + "mlp.gate_up_proj.weight", rows(i * size, size, 2 * size, matrix)
        )
        for i, part in enumerate(("gate", "up"))
    }


def table(config: TransformerConfig) -> Table:
    a = first_blocks(config)[0].attention
    n, k = a.heads * a.head_size, a.kv_heads * a.head_size
    below = {"q": (0, n), "k": (n, k), "v": (n + k, k)}
    fused = {
        f"attention.{part}.w": Special(
            LAYER + "self_attn.qkv_proj.weight", rows(start, size, n + 2 * k, matrix)
        )
        for part, (start, size) in below.items()
    }
    return {**TABLE, **fused, **fused_gate_up(config)}


PHI3 = Family(
    name="Phi-3", model_types=("phi3",), architecture="Phi3ForCausalLM", config=config, keys=keys, table=table,
    unused=(INV_FREQ,),
)  # fmt: skip
