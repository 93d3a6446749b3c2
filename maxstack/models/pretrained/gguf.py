"""GGUF files, llama.cpp's format: their metadata as a config.json's keys, their tensors' names as a table.

A row for each architecture that llama.cpp names; the family of the same models then reads the keys.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from maxstack.config import UserError
from maxstack.kernels.quantized_matmul import Kind
from maxstack.models.families import read_config
from maxstack.models.families.family import Family
from maxstack.models.families.keys import Keys
from maxstack.models.families.weights import Special, Table, interleaved
from maxstack.models.files.gguf import GGUF
from maxstack.models.pretrained.folder import Dtype, load_tensors
from maxstack.models.rope import RopeConfig, llama3_frequencies, plain_frequencies
from maxstack.models.transformer import Transformer, TransformerConfig

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
    says_bias: bool = False
    """config.json has a key for biases in attention; here their tensors are there or not."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(model_type="llama", table={**NAMES, **NEIGHBOURS}, says_bias=True),
    "qwen2": Architecture(model_type="qwen2", table=NAMES),
    "qwen3": Architecture(model_type="qwen3", table=NAMES, says_bias=True),
}
FACTORS = "rope_freqs.weight"
# Keys of an architecture that say nothing of the mathematics.
HARMLESS = frozenset({"vocab_size", "rope.scaling.finetuned"})


def described(
    metadata: Mapping[str, Any], names: Collection[str], factors: np.ndarray | None, where: str
) -> tuple[Family, TransformerConfig]:
    """The family, with the names of GGUF's tensors, and our config of a file's metadata.

    `names` are the file's tensors, of which some say what no key says, `factors` the values of FACTORS where it has it.
    Raises UserError for an architecture that is not supported and for a key that is not understood.
    """
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{where}: GGUF architecture {name!r} is not supported; these are: {', '.join(ARCHITECTURES)}"
        )
    row, prefix = ARCHITECTURES[name], f"{name}."
    own = {
        key.removeprefix(prefix): plain(value) for key, value in metadata.items() if key.startswith(prefix)
    }
    keys = Keys(own, where, prefix)
    found = config_keys(keys) | {
        "model_type": row.model_type,
        "vocab_size": keys.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())) or None),
        "tie_word_embeddings": "output.weight" not in names,
    }
    if row.says_bias:
        found["attention_bias"] = "blk.0.attn_q.bias" in names
    if factors is not None:
        found["rope_scaling"] = llama3_scaling(factors, found, where)
    if unknown := keys.unread(HARMLESS):
        raise UserError(
            f"{where}: unknown {', '.join(unknown)}. A key that is not understood might change the model, so it is not "
            "ignored; take the model's folder instead of the GGUF file"
        )
    family, config = read_config({key: value for key, value in found.items() if value is not None}, where)
    return dataclasses.replace(family, table=lambda _: row.table, unused=(re.escape(FACTORS),)), config


def plain(value: Any) -> Any:
    """A value of the metadata; a float is kept in float32, and its shortest decimal is what was meant."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def config_keys(keys: Keys) -> dict[str, Any]:
    """config.json's keys for what all architectures say alike."""
    width, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    head = keys.whole("attention.key_length", max(width // heads, 1))
    keys.expect("attention.value_length", head)
    keys.expect("rope.dimension_count", head)
    found = {
        "hidden_size": width, "num_hidden_layers": keys.whole("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads), "head_dim": head,
        "intermediate_size": keys.whole("feed_forward_length"), "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
    }  # fmt: skip
    scaling = keys.expect("rope.scaling.type", "none", "linear", "yarn")
    original = keys.whole("rope.scaling.original_context_length", None)
    factor = keys.number("rope.scaling.factor", None)
    if scaling == "none":
        return found
    found["rope_scaling"] = {"rope_type": scaling, "factor": factor or 1.0}
    if scaling == "yarn" and original:
        found["rope_scaling"]["original_max_position_embeddings"] = original
    return found


def llama3_scaling(factors: np.ndarray, keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The scaling whose result llama.cpp keeps as one factor for each frequency. Raises UserError for another one."""
    factor = round(float(factors.max()), 3)
    rope = RopeConfig(theta=keys["rope_theta"], scaling="llama3", factor=factor)
    if not np.allclose(factors, llama3_factors(rope, 2 * factors.size), rtol=1e-4):
        raise UserError(f"{where}: its rotary factors ({FACTORS}) are not those of Llama 3.1 to 3.3")
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": rope.low_frequency_factor,
        "high_freq_factor": rope.high_frequency_factor, "original_max_position_embeddings": rope.original_length,
    }  # fmt: skip


def llama3_factors(rope: RopeConfig, size: int) -> np.ndarray:
    """By what each frequency of a head of `size` is divided."""
    return (plain_frequencies(rope, size) / llama3_frequencies(rope, size)).astype(np.float32)


def load_gguf(
    file: Path, *, dtype: Dtype | None = None, mesh: Mesh | None = None, kept: str | None = None,
    packed: Kind | None = None,
) -> tuple[Transformer, Mapping[str, Any]]:  # fmt: skip
    """The model of a GGUF file and the file's metadata. Weights are decoded to `kept`, by default the compute type, and
    those of linear layers then packed in few bits if asked for."""
    source = GGUF(file)
    try:
        names = frozenset(source.names())
        factors = source.read(FACTORS) if FACTORS in names else None
        family, config = described(source.metadata, names, factors, str(file))
        return load_tensors(
            family, config, source, dtype=dtype, mesh=mesh, kept=kept, packed=packed
        ), source.metadata
    finally:
        source.close()
