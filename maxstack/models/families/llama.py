"""Llama 1 to 3.3 and what is built alike (arXiv:2302.13971, 2307.09288, 2407.21783)."""

from typing import Any

from maxstack.models.attention import AttentionConfig
from maxstack.models.block import BlockConfig
from maxstack.models.families.family import Family, first_blocks, read_rope, rope_settings
from maxstack.models.families.keys import Keys
from maxstack.models.families.weights import Table
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.layers import RMSNormConfig
from maxstack.models.transformer import StackConfig, TransformerConfig

LAYER = "model.layers.{layer}."
TABLE: Table = {
    "embedding.table": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm.scale": LAYER + "input_layernorm.weight",
    "feed_forward_norm.scale": LAYER + "post_attention_layernorm.weight",
    **{f"attention.{p}.w": f"{LAYER}self_attn.{p}_proj.weight" for p in "qkvo"},
    **{f"attention.{p}.b": f"{LAYER}self_attn.{p}_proj.bias" for p in "qkvo"},
    **{f"feed_forward.{p}.w": f"{LAYER}mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
    **{f"feed_forward.{p}.b": f"{LAYER}mlp.{p}_proj.bias" for p in ("gate", "up", "down")},
}
INV_FREQ = r".*\.(rotary_emb|rope)\.inv_freq"


def sizes(keys: Keys, head_size: int | None = None) -> dict[str, Any]:
    """Heads of a config.json, the size of each by default `head_size` or width / heads."""
    width, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    return {
        "heads": heads,
        "kv_heads": keys.whole("num_key_value_heads", heads),
        "head_size": keys.whole("head_dim", head_size or max(width // heads, 1)),
    }


def model(keys: Keys, block: BlockConfig, **fields: Any) -> TransformerConfig:
    """A model of `num_hidden_layers` equal blocks; more fields replace the usual ones."""
    stacks = (StackConfig(pattern=(block,), repeats=keys.whole("num_hidden_layers")),)
    usual: dict[str, Any] = {
        "vocab_size": keys.whole("vocab_size"),
        "width": keys.whole("hidden_size"),
        "stacks": stacks,
        "final_norm": block.norm,
        "tie_embeddings": keys.flag("tie_word_embeddings", False),
        "max_length": keys.whole("max_position_embeddings", 2048),
    }
    return TransformerConfig(**usual | fields)


def config(keys: Keys) -> TransformerConfig:
    keys.expect("hidden_act", "silu")
    keys.expect("rope_interleaved", False)
    bias = keys.flag("attention_bias", False)
    norm = RMSNormConfig(eps=float(keys.number("rms_norm_eps", 1e-6)))
    attention = AttentionConfig(**sizes(keys), rope=read_rope(keys), qkv_bias=bias, output_bias=bias)
    feed_forward = FeedForwardConfig(size=keys.whole("intermediate_size"), bias=keys.flag("mlp_bias", False))
    return model(keys, BlockConfig(attention=attention, feed_forward=feed_forward, norm=norm))


def common_keys(config: TransformerConfig, *, head_key: bool = True) -> dict[str, Any]:
    """Keys that most families write alike, of a model whose layers have the same sizes.

    `head_key`: the size of a head is a key of the family's own; else it is only written where it has to be.
    """
    block = first_blocks(config)[0]
    a, rope = block.attention, block.attention.rope
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.width, "num_hidden_layers": config.depth,
        "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads,
        **({"head_dim": a.head_size} if head_key or a.head_size * a.heads != config.width else {}),
        "rms_norm_eps": block.norm.eps, "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings, **(rope_settings(rope) if rope else {}),
        # Some classes of transformers have one of their own, which may lie outside of the vocabulary.
        "pad_token_id": None,
    }  # fmt: skip


def keys(config: TransformerConfig) -> dict[str, Any]:
    block = first_blocks(config)[0]
    return common_keys(config) | {
        "hidden_act": "silu", "intermediate_size": block.feed_forward.size,
        "attention_bias": block.attention.qkv_bias, "mlp_bias": block.feed_forward.bias,
    }  # fmt: skip


LLAMA = Family(
    name="Llama", model_types=("llama",), architecture="LlamaForCausalLM", config=config, keys=keys,
    table=lambda _: TABLE, unused=(INV_FREQ,), harmless=frozenset({"is_llama_config", "max_sequence_length"}),
)  # fmt: skip
