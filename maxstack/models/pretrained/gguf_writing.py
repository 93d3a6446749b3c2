"""A model as a GGUF file for llama.cpp: written beside its place, read again and compared, then put there."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import maxstack
from maxstack.config import RunError, UserError
from maxstack.data.tokenizer import Tokenizer, gguf_tokenizer
from maxstack.models import tree
from maxstack.models.attention import AttentionConfig
from maxstack.models.families import Family, families, family_of
from maxstack.models.families.family import untrained
from maxstack.models.families.weights import Entry
from maxstack.models.files import Export, TensorInfo, write_gguf
from maxstack.models.files.gguf import GGUF
from maxstack.models.pretrained.architectures import ARCHITECTURES, Architecture, factor_tensors
from maxstack.models.pretrained.gguf import as_stored, described, holds_one_more, load_gguf
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
from maxstack.models.transformer import Transformer, TransformerConfig

KINDS: Mapping[str, str] = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0",
}  # fmt: skip
FILE_TYPES: Mapping[str, int] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""llama.cpp's number for a file whose matrices are mostly of a type (general.file_type)."""
BLOCK = 32
"""Values that share a scale in the quantized types; a row that is no multiple of it stays float16."""
TABLES = ("token_embd.weight", "output.weight")
WIDE = (".bias", "ffn_gate_inp.weight", "position_embd.weight")
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
    held = held_by(model.config, family)
    name = held.row.name
    kind = KINDS[dtype or natural(model)]
    file.parent.mkdir(parents=True, exist_ok=True)
    with beside(file) as work:
        made = work / file.name
        words = gguf_tokenizer(tokenizer, vocab_size=model.config.vocab_size)
        metadata = {**general(name, kind), **held.keys, **words}
        write_gguf(made, metadata, exports(held, model, kind))
        manifest = compared(model, made, held, kind)
        write_json(work / "manifest", manifest)
        os.replace(work / "manifest", file.with_name(file.name + ".json"))
        os.replace(made, file)
    return manifest


class Held(NamedTuple):
    """A model as an architecture holds it."""

    row: Architecture
    family: Family
    """With the names of GGUF's tensors."""
    keys: dict[str, Any]
    """Of the architecture, with its name before them."""
    factors: dict[str, np.ndarray]
    """Tensors of rotary factors."""


def held_by(config: TransformerConfig, prefer: str | None) -> Held:
    """The GGUF architecture that can hold a model. Raises UserError when none can."""
    for row in ARCHITECTURES:
        family = family_of({"model_type": row.model_types[0]}, row.name)
        if (prefer is None or prefer in also_called(row)) and family.expresses(config):
            found = row.keys(family.keys(config), config)
            keys = {f"{row.name}.{key}": value for key, value in found.items()}
            held = Held(row, as_stored(family, row), keys, factors(row, config))
            if holds(config, held):
                return held
    known = dict.fromkeys(row.name for row in ARCHITECTURES)
    raise UserError(
        f"no GGUF architecture that is written here holds this model{f' as {prefer}' if prefer else ''}; "
        f"these are: {', '.join(known)}. Write a model folder and convert it with llama.cpp's own script"
    )


def also_called(row: Architecture) -> set[str]:
    """The architecture's name, and those of the families whose models it holds."""
    held = [family for family in families() if set(family.model_types) & set(row.model_types)]
    return {row.name, *(name for family in held for name in (family.name, *family.model_types))}


def factors(row: Architecture, config: TransformerConfig) -> dict[str, np.ndarray]:
    """The tensors of rotary factors, as far as the architecture knows them."""
    found: dict[str, np.ndarray] = {}
    for attention in (block.attention for stack in config.stacks for block in stack.pattern):
        if row.factors and isinstance(attention, AttentionConfig):
            found |= factor_tensors(attention.rope, attention.head_size)
    return {name: values for name, values in found.items() if name in row.factors}


def holds(config: TransformerConfig, held: Held) -> bool:
    """Whether the architecture has a name for every weight, and its keys say all of the config: they give it back."""
    try:
        names = {entry.source for entry in held.family.entries(config)} | held.factors.keys()
        metadata = {"general.architecture": held.row.name, **held.keys}
        row, _, again = described(metadata, names, held.factors, "the GGUF file")
    except UserError:
        return False
    same = dataclasses.replace(config, remat=again.remat, dtype=again.dtype)
    return row is held.row and rounded(untrained(again)) == rounded(untrained(same))


def rounded(value: Any) -> Any:
    """A config (or a part of one) with every number as near as float32 is, in which GGUF keeps them."""
    if isinstance(value, float):
        return float(np.float32(value))
    if isinstance(value, tuple):
        return tuple(rounded(one) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: rounded(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def general(name: str, kind: str) -> dict[str, Any]:
    """Keys of every file. llama.cpp goes by the model's name where it cuts texts, so this one says nothing."""
    return {
        "general.architecture": name, "general.type": "model", "general.name": "maxstack model",
        "general.file_type": FILE_TYPES[kind], "general.quantization_version": 2,
    }  # fmt: skip


def exports(held: Held, model: Transformer, kind: str) -> Iterator[Export]:
    """The file's tensors in the order of the model, then the rotary factors."""
    host = HostLeaves(tree.leaves(model))
    for source, parts in by_tensor(held.family.entries(model.config)):
        shape = parts[0].form.shape
        more = 1.0 if holds_one_more(source, held.row.one_more) else 0.0
        array = partial(tensor, parts, host, more)
        yield Export(source, TensorInfo(shape, "float32"), kind_of(source, shape, kind), array)
    for name, values in held.factors.items():
        yield Export(name, TensorInfo(values.shape, "float32"), "F32", partial(np.asarray, values))


def tensor(parts: Sequence[Entry], host: HostLeaves, more: float) -> np.ndarray:
    """One tensor of the file from the leaves that it holds, with `more` added."""
    values = joined(parts, host, "float32")
    return values + np.float32(more) if more else values


def kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type of one tensor in a file of a type.

    What llama.cpp adds or looks up, and routers, are float32. The tables of tokens are kept at 8 bits: 4 cost too much.
    """
    if len(shape) < 2 or name.endswith(WIDE):
        return "F32"
    if kind == "Q4_0" and name in TABLES:
        kind = "Q8_0"
    return "F16" if kind in ("Q8_0", "Q4_0") and shape[-1] % BLOCK else kind


def compared(model: Transformer, file: Path, held: Held, kind: str) -> dict[str, Any]:
    """The manifest. Raises RunError when the weights read again are not those meant, or the logits are not theirs."""
    with GGUF(file) as source:
        again = load_gguf(source, dtype=model.config.dtype, kept=natural(model))
    tokens = probe(model)
    given, exact = np.asarray(run(again, tokens)), np.asarray(run(model, tokens))
    more = {e.leaf for e in held.family.entries(model.config) if holds_one_more(e.source, held.row.one_more)}
    worst = {
        leaf: relative(a, b, 1.0 if leaf in more else 0.0) for leaf, (a, b) in paired(model, again).items()
    }
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
        "maxstack": maxstack.__version__, "family": held.row.name, "dtype": kind, "model_sha256": fingerprint(model),
        "files_sha256": {file.name: file_hash(file)}, "largest_logit_difference": difference, "largest_logit": largest,
        "largest_weight_difference": {"leaf": leaf, "of_its_size": worst[leaf]},
    }  # fmt: skip


def paired(model: Transformer, again: Transformer) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Both models' weights by name."""
    others = tree.leaves(again)
    return {leaf: (array, others[leaf]) for leaf, array in tree.leaves(model).items()}


def relative(a: jax.Array, b: jax.Array, more: float) -> float:
    """Norm of the difference over the norm, of what the file keeps: with `more` added."""
    wide, other = (np.asarray(x, np.float32) + np.float32(more) for x in (a, b))
    return float(np.linalg.norm(other - wide) / max(float(np.linalg.norm(wide)), 1e-30))
