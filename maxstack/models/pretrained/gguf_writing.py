"""A model as a GGUF file for llama.cpp: written beside its place, read again and compared, then put there."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import maxstack
from maxstack.config import RunError, UserError
from maxstack.data.tokenizer import Tokenizer, gguf_tokenizer
from maxstack.models import tree
from maxstack.models.families import families
from maxstack.models.families.weights import entries
from maxstack.models.files import Export, TensorInfo, write_gguf
from maxstack.models.pretrained.gguf import (
    ARCHITECTURES,
    FACTORS,
    Architecture,
    described,
    llama3_factors,
    load_gguf,
)
from maxstack.models.pretrained.writing import (
    HostLeaves,
    beside,
    by_tensor,
    check_target,
    file_hash,
    fingerprint,
    joined,
    natural,
    probe,
    run,
    write_json,
)
from maxstack.models.rope import RopeConfig
from maxstack.models.transformer import Transformer, TransformerConfig

KINDS: Mapping[str, str] = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0",
}  # fmt: skip
FILE_TYPES: Mapping[str, int] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""llama.cpp's number for a file whose matrices are mostly of a type (general.file_type)."""
BLOCK = 32
"""Values that share a scale in the quantized types; a row that is no multiple of it stays float16."""
TABLES = ("token_embd.weight", "output.weight")
EXACT = 1e-4
"""Largest difference of logits, of the largest logit, between what was meant and what was read again."""


def save_gguf(
    model: Transformer,
    tokenizer: Tokenizer | None,
    file: Path,
    *,
    dtype: str | None = None,
    family: str | None = None,
) -> dict[str, Any]:
    """Write a GGUF file and, beside it, its manifest (`FILE.json`), which is returned.

    Matrices are written in `dtype` (default: the model's own), what has one dimension in float32, as llama.cpp expects.
    Raises UserError for a model that no GGUF architecture holds or without a tokenizer, RunError when what was written
    is not what was meant; nothing is left behind then.
    """
    check_target(file)
    if tokenizer is None:
        raise UserError(
            "a GGUF file carries its tokenizer, and this model has none: give one, or write a folder"
        )
    if (dtype or "float32") not in KINDS:
        raise UserError(f"dtype {dtype!r} is not written; these are: {', '.join(KINDS)}")
    name, own = architecture_for(model.config, family)
    kind = KINDS[dtype or natural(model)]
    file.parent.mkdir(parents=True, exist_ok=True)
    with beside(file) as work:
        made = work / file.name
        words = gguf_tokenizer(tokenizer, vocab_size=model.config.vocab_size)
        metadata = {**general(name, kind), **own, **words}
        write_gguf(made, metadata, [*exports(ARCHITECTURES[name], model, kind), *factors(model.config)])
        manifest = compared(model, made, name, kind)
        write_json(work / "manifest", manifest)
        os.replace(work / "manifest", file.with_name(file.name + ".json"))
        os.replace(made, file)
    return manifest


def architecture_for(config: TransformerConfig, prefer: str | None) -> tuple[str, dict[str, Any]]:
    """The GGUF architecture that can hold a model, by its name, and its keys. Raises UserError when none can."""
    for name, row in ARCHITECTURES.items():
        for family in families():
            asked = prefer in (None, name, family.name, *family.model_types)
            if asked and row.model_type in family.model_types and family.expresses(config):
                keys = architecture_keys(name, family.keys(config))
                if holds(config, row, {"general.architecture": name, **keys}):
                    return name, keys
    raise UserError(
        f"no GGUF architecture that is written here holds this model{f' as {prefer}' if prefer else ''}; "
        f"these are: {', '.join(ARCHITECTURES)}. Write a model folder and convert it with llama.cpp's own script"
    )


def holds(config: TransformerConfig, row: Architecture, metadata: Mapping[str, Any]) -> bool:
    """Whether the architecture has a name for every weight, and its keys say all of the config: they give it back."""
    try:
        names = [entry.source for entry in entries(config, row.table)]
        factors_ = [export.array() for export in factors(config)]
        _, again = described(metadata, names, factors_[0] if factors_ else None, "the GGUF file")
    except UserError:
        return False
    return again == dataclasses.replace(config, remat=again.remat, dtype=again.dtype)


def general(name: str, kind: str) -> dict[str, Any]:
    """Keys of every file."""
    return {
        "general.architecture": name, "general.type": "model", "general.name": f"maxstack {name}",
        "general.file_type": FILE_TYPES[kind], "general.quantization_version": 2,
    }  # fmt: skip


def architecture_keys(name: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `gguf.config_keys`, as far as there is one: `holds` finds what has no place in a file."""
    head = keys.get("head_dim", keys["hidden_size"] // keys["num_attention_heads"])
    found = {
        "vocab_size": keys["vocab_size"],
        "context_length": keys["max_position_embeddings"], "embedding_length": keys["hidden_size"],
        "block_count": keys["num_hidden_layers"], "feed_forward_length": keys["intermediate_size"],
        "attention.head_count": keys["num_attention_heads"], "attention.head_count_kv": keys["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(keys["rms_norm_eps"]), "attention.key_length": head,
        "attention.value_length": head, "rope.freq_base": float(keys["rope_theta"]), "rope.dimension_count": head,
    }  # fmt: skip
    scaling = keys.get("rope_scaling", {})
    if scaling.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": float(scaling["factor"])}
    if scaling.get("rope_type") == "yarn":
        found["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    return {f"{name}.{key}": value for key, value in found.items()}


def factors(config: TransformerConfig) -> list[Export]:
    """llama3's scaling as llama.cpp keeps it: one factor for each frequency."""
    attention: Any = config.stacks[0].pattern[0].attention
    if not isinstance(attention.rope, RopeConfig) or attention.rope.scaling != "llama3":
        return []
    values = llama3_factors(attention.rope, attention.rope.rotated(attention.head_size))
    return [Export(FACTORS, TensorInfo(values.shape, "float32"), "F32", lambda: values)]


def exports(row: Architecture, model: Transformer, kind: str) -> Iterator[Export]:
    """The file's tensors in the order of the model."""
    host = HostLeaves(tree.leaves(model))
    for source, parts in by_tensor(entries(model.config, row.table)):
        shape = parts[0].form.shape
        yield Export(
            source,
            TensorInfo(shape, "float32"),
            kind_of(source, shape, kind),
            partial(joined, parts, host, "float32"),
        )


def kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type of one tensor in a file of a type. The tables of tokens are kept at 8 bits: 4 cost too much there."""
    if len(shape) < 2:
        return "F32"
    if kind == "Q4_0" and name in TABLES:
        kind = "Q8_0"
    return "F16" if kind in ("Q8_0", "Q4_0") and shape[-1] % BLOCK else kind


def compared(model: Transformer, file: Path, name: str, kind: str) -> dict[str, Any]:
    """The manifest. Raises RunError when the weights read again are not those meant, or the logits are not theirs."""
    again, _ = load_gguf(file, dtype=model.config.dtype, kept=natural(model))
    tokens = probe(model)
    given, exact = np.asarray(run(again, tokens)), np.asarray(run(model, tokens))
    worst = {leaf: relative(a, b) for leaf, (a, b) in paired(model, again).items()}
    bound = {"F32": 1e-7, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.02, "Q4_0": 0.2}[kind]
    largest, difference = float(np.abs(exact).max()), float(np.abs(given - exact).max())
    leaf = max(worst, key=lambda one: worst[one])
    if (
        worst[leaf] > bound
        or not np.isfinite(given).all()
        or (kind == "F32" and difference > EXACT * largest)
    ):
        raise RunError(
            f"{file.name}: read again, {leaf} differs by {worst[leaf]:.3g} of its size and logits by {difference:.3g} "
            f"of {largest:.3g}, more than {kind} explains; nothing was kept. This is a fault of maxstack"
        )
    return {
        "maxstack": maxstack.__version__, "family": name, "dtype": kind, "model_sha256": fingerprint(model),
        "files_sha256": {file.name: file_hash(file)}, "largest_logit_difference": difference, "largest_logit": largest,
        "largest_weight_difference": {"leaf": leaf, "of_its_size": worst[leaf]},
    }  # fmt: skip


def paired(model: Transformer, again: Transformer) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Both models' weights by name."""
    others = tree.leaves(again)
    return {leaf: (array, others[leaf]) for leaf, array in tree.leaves(model).items()}


def relative(a: jax.Array, b: jax.Array) -> float:
    """Norm of the difference over the norm."""
    wide = np.asarray(a, np.float32)
    return float(np.linalg.norm(np.asarray(b, np.float32) - wide) / max(float(np.linalg.norm(wide)), 1e-30))
