"""A model folder as transformers writes it: config.json, safetensors, tokenizer files."""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from maxstack import sharding
from maxstack.config import UserError
from maxstack.kernels.quantized_matmul import Kind
from maxstack.models import tree
from maxstack.models.families import Family, read_config
from maxstack.models.files import TensorSource, open_weights
from maxstack.models.packing import Packing
from maxstack.models.pretrained.reading import read_leaves
from maxstack.models.pretrained.spelling import respelled
from maxstack.models.transformer import Transformer, TransformerConfig

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
CONFIG_BYTES = 16 * 2**20
"""Longest config.json that is read (bytes): published ones have a few thousand."""
Dtype = Literal["bfloat16", "float32"]
FILED = "filed"
"""Weights are kept in the file's own type."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for a file that is absent, too long, or anything else."""
    if not file.is_file():
        raise UserError(f"{file.parent} has no {file.name}")
    if file.stat().st_size > CONFIG_BYTES:
        raise UserError(f"{file} has {file.stat().st_size} bytes; at most {CONFIG_BYTES} are read")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}, not an object with keys")
    return values


def load_folder(
    folder: Path, *, dtype: Dtype | None = None, mesh: Mesh | None = None, kept: str | None = None,
    packed: Kind | None = None,
) -> Transformer:  # fmt: skip
    """The model of a folder. Raises UserError for whatever is wrong with the folder.

    `dtype` is the compute type, `kept` that of the weights (default: the compute type; FILED: bfloat16 where all of the
    file is); `packed` holds those of linear layers in few bits.
    """
    values = read_json(folder / CONFIG_FILE)
    family, config = read_config(values, str(folder / CONFIG_FILE))
    if "auto_map" in values:
        log.warning(
            "%s brings code of its own (auto_map), which is not run: the %s family reads it",
            folder,
            family.name,
        )
    source = open_weights(folder)
    try:
        return load_tensors(family, config, source, dtype=dtype, mesh=mesh, kept=kept, packed=packed)
    finally:
        source.close()


def load_tensors(
    family: Family, config: TransformerConfig, source: TensorSource, *, dtype: Dtype | None = None,
    mesh: Mesh | None = None, kept: str | None = None, packed: Kind | None = None,
) -> Transformer:  # fmt: skip
    """A model of `config` with the tensors of `source`, on one device or sharded over `mesh`."""
    config = dataclasses.replace(config, dtype=dtype or natural_dtype(source), remat="none")
    abstract = tree.abstract_model(config)
    table, places = family.table(config), family.entries(config)
    head = table.get("head")  # some files hold it although it is the token table
    unused = [*family.not_needed(config), *([re.escape(head)] if isinstance(head, str) else [])]
    in_file = {entry.leaf for entry in places}
    if kept == FILED:
        kept = "bfloat16" if {source.info(name).dtype for name in source.names()} == {"bfloat16"} else None
    weights = jnp.dtype(kept or config.dtype)
    buffers = tree.buffer_names(abstract)
    shapes = {
        leaf: jax.ShapeDtypeStruct(a.shape, a.dtype if leaf in buffers else weights)
        for leaf, a in tree.leaves(abstract).items()
    }
    homes = homes_of(abstract, mesh)
    tensors = respelled(source, family.spellings)
    packing = None if packed is None else Packing(abstract, packed, mesh)
    if packing is not None and mesh is not None:
        homes = {**homes, **packing.read_on}
    arrays = read_leaves(places, {leaf: shapes[leaf] for leaf in in_file}, tensors, homes, unused, packing)
    for leaf in shapes.keys() - in_file:  # such as a router's bias of a family that has none
        arrays[leaf] = jax.device_put(jnp.zeros(shapes[leaf].shape, shapes[leaf].dtype), homes[leaf])
    return tree.rebuild(abstract if packing is None else packing.abstract, arrays)


def homes_of(abstract: Transformer, mesh: Mesh | None) -> Mapping[str, jax.sharding.Sharding]:
    """Where each leaf goes: whole on the first device, or cut as parameters are. UserError if it cannot be cut."""
    leaves = tree.leaves(abstract)
    if mesh is None:
        return dict.fromkeys(leaves, SingleDeviceSharding(jax.devices()[0]))
    homes = sharding.weight_shardings(mesh, tree.axes(abstract), "parameters", 3)
    sharding.check_divides({leaf: a.shape for leaf, a in leaves.items()}, homes)
    return homes


def natural_dtype(source: TensorSource) -> Dtype:
    """The compute type when none is asked for: float32 on a CPU, slow at anything else, and for float32 files."""
    if jax.default_backend() == "cpu":
        return "float32"
    kinds = {source.info(name).dtype for name in source.names()[:64]}
    return "float32" if "float32" in kinds and "bfloat16" not in kinds else "bfloat16"
