"""GGUF files, llama.cpp's format: their metadata as a config.json's keys, their tensors' names as a table.

A row for each architecture that llama.cpp names; the family of the same models then reads the keys.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from maxstack.config import UserError
from maxstack.models.families import read_config
from maxstack.models.families.family import Family
from maxstack.models.families.weights import Special, Table, interleaved
from maxstack.models.files.gguf import GGUF
from maxstack.models.pretrained.folder import Dtype, load_tensors
from maxstack.models.rope import RopeConfig, llama3_frequencies, plain_frequencies
from maxstack.models.transformer import Transformer

BLOCK = "blk.{layer}."
NAMES: Table = {
    "embedding.table": "token_embd.weight",
    "final_norm.scale": "output_norm.weight",
    "head": "output.weight",
    "attention_norm.scale": BLOCK + "attn_norm.weight",
    "feed_forward_norm.scale": BLOCK + "ffn_norm.weight",
    **{f"attention.{p}.w": f"{BLOCK}attn_{p}.weight" for p in "qkv"},
    **{f"attention.{p}.b": f"{BLOCK}attn_{p}.bias" for p in "qkv"},
    "attention.o.w": BLOCK + "attn_output.weight",
    "attention.o.b": BLOCK + "attn_output.bias",
    "attention.q_norm.scale": BLOCK + "attn_q_norm.weight",
    "attention.k_norm.scale": BLOCK + "attn_k_norm.weight",
    **{f"feed_forward.{p}.w": f"{BLOCK}ffn_{p}.weight" for p in ("gate", "up", "down")},
    **{f"feed_forward.{p}.b": f"{BLOCK}ffn_{p}.bias" for p in ("gate", "up", "down")},
}
# llama.cpp rotates neighbouring pairs in these architectures, and stores query and key rows accordingly.
NEIGHBOURS: Table = {
    f"attention.{p}.{kind}": Special(f"{BLOCK}attn_{p}.{name}", interleaved)
    for p in "qk"
    for kind, name in (("w", "weight"), ("b", "bias"))
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp keeps the models of a family."""

    model_type: str
    """`model_type` of the config.json that says the same."""
    table: Table
    """Leaf to tensor."""
    keys: Callable[[Mapping[str, Any], str], dict[str, Any]] = lambda _metadata, _name: {}
    """Keys of config.json beside the common ones."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(model_type="llama", table={**NAMES, **NEIGHBOURS}),
    "qwen2": Architecture(model_type="qwen2", table=NAMES),
    "qwen3": Architecture(model_type="qwen3", table=NAMES),
}
FACTORS = "rope_freqs.weight"
ROPE_KINDS = {"none": None, "linear": "linear", "yarn": "yarn"}


def architecture_of(metadata: Mapping[str, Any], where: str) -> tuple[str, Architecture]:
    """The architecture that a file names. Raises UserError, with those that are supported, for any other."""
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{where}: GGUF architecture {name!r} is not supported; these are: {', '.join(ARCHITECTURES)}"
        )
    return str(name), ARCHITECTURES[name]


def common_keys(metadata: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """config.json's keys for what all architectures say alike."""

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{name}.{key}", default)
        if isinstance(value, float):  # kept in float32: the shortest decimal is what was meant
            return float(str(np.float32(value)))
        if isinstance(value, list | tuple):
            raise UserError(f"{where}: {name}.{key} differs from layer to layer, which is not supported")
        return value

    width, heads = get("embedding_length"), get("attention.head_count")
    keys = {
        "model_type": ARCHITECTURES[name].model_type,
        "vocab_size": get("vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ())) or None,
        "hidden_size": width, "num_hidden_layers": get("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads), "head_dim": get("attention.key_length"),
        "intermediate_size": get("feed_forward_length"), "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"), "rope_theta": get("rope.freq_base"),
    }  # fmt: skip
    scaling = get("rope.scaling.type", "none")
    if scaling not in ROPE_KINDS:
        raise UserError(
            f"{where}: rope scaling {scaling!r} is not supported; these are: {', '.join(ROPE_KINDS)}"
        )
    if ROPE_KINDS[scaling] is not None:
        keys["rope_scaling"] = {"rope_type": ROPE_KINDS[scaling], "factor": get("rope.scaling.factor", 1.0)}
        original = get("rope.scaling.original_context_length")
        if scaling == "yarn" and original:
            keys["rope_scaling"]["original_max_position_embeddings"] = original
    return {key: value for key, value in keys.items() if value is not None}


def llama3_scaling(factors: np.ndarray, keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The scaling whose result llama.cpp keeps as one factor for each frequency. Raises UserError for another one."""
    theta, width = keys.get("rope_theta", 10_000.0), keys["hidden_size"] // keys["num_attention_heads"]
    size = keys.get("head_dim", width)
    factor = round(float(factors.max()), 3)
    rope = RopeConfig(theta=theta, scaling="llama3", factor=factor)
    wanted = plain_frequencies(rope, size) / llama3_frequencies(rope, size)
    if factors.shape != wanted.shape or not np.allclose(factors, wanted, rtol=1e-4):
        raise UserError(f"{where}: its rotary factors ({FACTORS}) are not those of Llama 3.1 to 3.3")
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": rope.low_frequency_factor,
        "high_freq_factor": rope.high_frequency_factor, "original_max_position_embeddings": rope.original_length,
    }  # fmt: skip


def load_gguf(
    file: Path, *, dtype: Dtype | None = None, mesh: Mesh | None = None
) -> tuple[Transformer, Mapping[str, Any]]:
    """The model of a GGUF file, its weights decoded to the compute type, and the file's metadata."""
    source = GGUF(file)
    try:
        metadata, where = source.metadata, str(file)
        name, row = architecture_of(metadata, where)
        present = set(source.names())
        keys = common_keys(metadata, name, where) | row.keys(metadata, name)
        if FACTORS in present:
            keys["rope_scaling"] = llama3_scaling(source.read(FACTORS), keys, where)
        keys["tie_word_embeddings"] = "output.weight" not in present
        if "blk.0.attn_q.bias" in present and row.model_type == "llama":
            keys["attention_bias"] = True
        family, config = read_config(keys, where)
        in_file: Family = dataclasses.replace(family, table=lambda _: row.table, unused=(re.escape(FACTORS),))
        return load_tensors(in_file, config, source, dtype=dtype, mesh=mesh), metadata
    finally:
        source.close()
