"""GPT-2: learned positions, layer norms with offsets, query, key and value in one tensor."""

from collections.abc import Mapping
from typing import Any

from maxstack.models.families.keys import Keys
from maxstack.models.families.weights import Special, Table, as_it_is, matrix, rows
from maxstack.models.pretrained.architectures.architecture import Architecture, Facts
from maxstack.models.pretrained.architectures.names import BASE, BLOCK, OUTPUT_BIAS
from maxstack.models.transformer import TransformerConfig

# GGUF's key to config.json's.
NAMES = {
    "embedding_length": "n_embd", "block_count": "n_layer", "attention.head_count": "n_head",
    "feed_forward_length": "n_inner", "context_length": "n_positions",
}  # fmt: skip
EPS = "attention.layer_norm_epsilon"


def read(keys: Keys, facts: Facts) -> dict[str, Any]:
    found = {ours: keys.whole(theirs) for theirs, ours in NAMES.items()}
    keys.expect("attention.head_count_kv", found["n_head"])
    return found | {"layer_norm_epsilon": keys.number(EPS), "activation_function": "gelu_new"}


def written(keys: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    found = {theirs: keys[ours] for theirs, ours in NAMES.items()}
    return found | {EPS: float(keys["layer_norm_epsilon"]), "vocab_size": keys["vocab_size"]}


def table(config: TransformerConfig) -> Table:
    width = config.width
    fused: Table = {
        f"attention.{part}.{leaf}": Special(
            f"{BLOCK}attn_qkv.{name}", rows(i * width, width, 3 * width, form)
        )
        for i, part in enumerate("qkv")
        for leaf, name, form in (("w", "weight", matrix), ("b", "bias", as_it_is))
    }
    return {
        **BASE, **fused, **OUTPUT_BIAS,
        "positions.table": "position_embd.weight", "final_norm.bias": "output_norm.bias",
        "attention_norm.bias": BLOCK + "attn_norm.bias", "feed_forward_norm.bias": BLOCK + "ffn_norm.bias",
        **{
            f"feed_forward.{part}.{leaf}": f"{BLOCK}ffn_{part}.{name}"
            for part in ("up", "down")
            for leaf, name in (("w", "weight"), ("b", "bias"))
        },
    }  # fmt: skip


GPT2 = Architecture(name="gpt2", model_types=("gpt2",), table=table, read=read, keys=written)
