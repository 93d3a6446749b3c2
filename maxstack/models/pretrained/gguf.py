"""GGUF files, llama.cpp's format: their metadata as a config.json's keys, their tensors by a table of names.

`architectures/` has a row for each architecture; the family of the same models then reads the keys.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from jax.sharding import Mesh

from maxstack.config import UserError
from maxstack.kernels.quantized_matmul import Kind
from maxstack.models.families import read_config
from maxstack.models.families.family import Family
from maxstack.models.families.keys import Keys
from maxstack.models.files.gguf import GGUF
from maxstack.models.files.source import TensorInfo
from maxstack.models.pretrained.architectures import ARCHITECTURES, TENSORS, Architecture, Facts
from maxstack.models.pretrained.architectures.rotary import plain
from maxstack.models.pretrained.folder import Dtype, load_tensors
from maxstack.models.transformer import Transformer, TransformerConfig


class Described(NamedTuple):
    """What a file's metadata says."""

    row: Architecture
    family: Family
    """With the names of GGUF's tensors."""
    config: TransformerConfig


def described(
    metadata: Mapping[str, Any], names: Collection[str], factors: Mapping[str, np.ndarray], where: str
) -> Described:
    """Architecture, family and our config of a file's metadata.

    `names` are the file's tensors, of which some say what no key says, `factors` the values of those of TENSORS that it
    has. Raises UserError for an architecture that is not supported and for a key that is not understood.
    """
    name, facts = metadata.get("general.architecture"), Facts(names, factors)
    prefix = f"{name}."
    own = {
        key.removeprefix(prefix): plain(value) for key, value in metadata.items() if key.startswith(prefix)
    }
    keys = Keys(own, where, prefix)
    row = row_of(name, keys, facts)
    tied = "output.weight" not in names
    if row.tied not in (None, tied):
        raise UserError(
            f"{where}: output.weight is {'missing' if tied else 'there'}; {name} models "
            f"{'have their own' if tied else 'take the token table as'} output projection"
        )
    found = row.read(keys, facts) | {
        "model_type": row.model_types[0],
        "vocab_size": keys.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())) or None),
        "tie_word_embeddings": tied,
    }
    if unknown := keys.unread(row.harmless):
        raise UserError(
            f"{where}: unknown {', '.join(unknown)}. A key that is not understood might change the model, so it is not "
            "ignored; take the model's folder instead of the GGUF file"
        )
    family, config = read_config({key: value for key, value in found.items() if value is not None}, where)
    return Described(row, as_stored(family, row), config)


def row_of(name: Any, keys: Keys, facts: Facts) -> Architecture:
    """The row that reads a file. Raises UserError when there is none."""
    for row in ARCHITECTURES:
        if row.name == name and row.when(keys, facts):
            return row
    known = dict.fromkeys(row.name for row in ARCHITECTURES)
    raise UserError(
        f"{keys.where}: GGUF architecture {name!r} is not supported; these are: {', '.join(known)}"
    )


def as_stored(family: Family, row: Architecture) -> Family:
    """The family with the names of GGUF's tensors; the rotary factors are read beforehand."""
    unused = tuple(map(re.escape, row.factors))
    return dataclasses.replace(family, table=row.table, unused=unused, spellings=(), beyond=())


class Stored:
    """A GGUF file as a TensorSource of what our leaves hold.

    A vector that the file keeps as a matrix of one row is the vector, as it is for llama.cpp; tensors that match
    `one_more` are given less 1.
    """

    def __init__(self, source: GGUF, shapes: Mapping[str, tuple[int, ...]], one_more: str | None):
        self.source, self.where, self.shapes = source, source.where, shapes
        self.one_more = one_more

    def names(self) -> tuple[str, ...]:
        return self.source.names()

    def info(self, name: str) -> TensorInfo:
        shape, dtype = self.source.info(name)
        wanted = self.shapes.get(name, shape)
        return TensorInfo(wanted if (1, *wanted) == tuple(shape) else shape, dtype)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        shape, wanted = self.source.info(name).shape, self.info(name).shape
        if wanted != shape:
            return self.source.read(name)[0][start:stop]
        values = self.source.read(name, start, stop)
        return values.astype(np.float32) - np.float32(1.0) if holds_one_more(name, self.one_more) else values

    def close(self) -> None:
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def holds_one_more(name: str, pattern: str | None) -> bool:
    """Whether a tensor is one of those that an architecture keeps with 1 added."""
    return pattern is not None and re.fullmatch(pattern, name) is not None


def load_gguf(
    source: GGUF, *, dtype: Dtype | None = None, mesh: Mesh | None = None, kept: str | None = None,
    packed: Kind | None = None,
) -> Transformer:  # fmt: skip
    """The model of a GGUF file. Weights are decoded to `kept`, by default the compute type, and those of linear layers
    then packed in few bits if asked for."""
    names = frozenset(source.names())
    factors = {name: source.read(name) for name in TENSORS if name in names}
    row, family, config = described(source.metadata, names, factors, source.where)
    shapes = {entry.source: entry.form.shape for entry in family.entries(config)}
    stored = Stored(source, shapes, row.one_more)
    return load_tensors(family, config, stored, dtype=dtype, mesh=mesh, kept=kept, packed=packed)
