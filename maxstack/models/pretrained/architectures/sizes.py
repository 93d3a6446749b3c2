"""The keys that nearly all architectures have, both ways."""

from collections.abc import Mapping
from typing import Any

from maxstack.models.families.keys import Keys
from maxstack.models.pretrained.architectures.rotary import read_scaling, scaling_keys


def read_sizes(keys: Keys, *, square: bool = False, rotated: bool = True) -> dict[str, Any]:
    """Sizes and the norm's epsilon.

    `square`: llama.cpp takes heads that together are as wide as the model, and no others. `rotated`: heads are rotated
    as a whole.
    """
    width, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    head = max(width // heads, 1)
    if square:
        keys.expect("attention.key_length", head)
    else:
        head = keys.whole("attention.key_length", head)
    keys.expect("attention.value_length", head)
    if rotated:
        keys.expect("rope.dimension_count", head)
    return {
        "hidden_size": width, "num_hidden_layers": keys.whole("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads), "head_dim": head,
        "intermediate_size": keys.whole("feed_forward_length"), "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
    }  # fmt: skip


def size_keys(keys: Mapping[str, Any], *, square: bool = False) -> dict[str, Any]:
    """The inverse of read_sizes, with the size of the vocabulary."""
    head = keys.get("head_dim", keys["hidden_size"] // keys["num_attention_heads"])
    found = {
        "vocab_size": keys["vocab_size"],
        "context_length": keys["max_position_embeddings"], "embedding_length": keys["hidden_size"],
        "block_count": keys["num_hidden_layers"], "feed_forward_length": keys["intermediate_size"],
        "attention.head_count": keys["num_attention_heads"], "attention.head_count_kv": keys["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(keys["rms_norm_eps"]),
    }  # fmt: skip
    if square:
        return found
    return found | {
        "attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head,
    }  # fmt: skip


def read_usual(keys: Keys, *, square: bool = False) -> dict[str, Any]:
    """Sizes and rotary settings."""
    return read_sizes(keys, square=square) | read_scaling(keys)


def usual_keys(keys: Mapping[str, Any], *, square: bool = False) -> dict[str, Any]:
    """The inverse of read_usual."""
    return size_keys(keys, square=square) | scaling_keys(keys)
