"""Safetensors as `transformers` writes them: one file, or shards of a chosen size with an index."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np

from maxstack.config import UserError
from maxstack.models.files.header import CODES, METADATA, make_header
from maxstack.models.files.index import INDEX, SUFFIX, WHOLE
from maxstack.models.files.source import LazyTensor, TensorInfo, check_array, dtype_of
from maxstack.models.files.whole import pieces, written_whole

SHARD_BYTES = 5_000_000_000


def write_safetensors(
    folder: Path, tensors: Iterable[LazyTensor], *, shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> list[Path]:  # fmt: skip
    """Write `model.safetensors`, or `model-00001-of-0000N.safetensors` … and their index; returns the files.

    One tensor is in memory at a time: its array is made when its turn comes, by shard in the order given (wider
    dtypes first within a shard, so that each begins on a multiple of its size). A shard holds at most `shard_bytes`
    of tensors, or one that is larger. The folder is made; all files appear in it together at the end.

    Raises UserError when there are weights already, RunError when the disk is full, ValueError for arrays other than
    announced and for names that come twice.
    """
    shards = _dealt(_checked(tensors), shard_bytes)
    _refuse_existing(folder)
    names = shard_names(len(shards))
    with written_whole(folder) as partial:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(partial / name, shard, metadata)
        if len(shards) > 1:
            (partial / INDEX).write_text(_index(dict(zip(names, shards, strict=True))))
            names.append(INDEX)
    return [folder / name for name in names]


def shard_names(count: int) -> list[str]:
    """What the shards of a checkpoint are called."""
    if count == 1:
        return [WHOLE]
    stem = WHOLE.removesuffix(SUFFIX)
    return [f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]


def _checked(tensors: Iterable[LazyTensor]) -> list[LazyTensor]:
    found: dict[str, LazyTensor] = {}
    for name, info, array in tensors:
        if name in found or name == METADATA:
            raise ValueError(
                f"two tensors are called {name}" if name in found else f"no tensor may be called {name}"
            )
        if info.dtype not in CODES:
            raise ValueError(f"{name} is {info.dtype}; safetensors hold {', '.join(CODES)}")
        found[name] = (name, info, array)
    return list(found.values())


def _dealt(tensors: Sequence[LazyTensor], shard_bytes: int) -> list[list[LazyTensor]]:
    """In order, a new shard when the next tensor would not fit."""
    shards: list[list[LazyTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        nbytes = tensor[1].nbytes
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += nbytes
    return shards


def _write_shard(path: Path, tensors: Sequence[LazyTensor], metadata: Mapping[str, str]) -> None:
    # Sorting is stable: of one dtype, as nearly always, the order given stays.
    tensors = sorted(tensors, key=lambda tensor: -dtype_of(tensor[1].dtype).itemsize)
    with path.open("wb") as file:
        file.write(make_header([(name, info) for name, info, _ in tensors], metadata))
        for name, info, array in tensors:
            _write_array(file, name, info, np.asarray(array()))


def _write_array(file: BinaryIO, name: str, info: TensorInfo, array: np.ndarray) -> None:
    # A function of its own, so that no name keeps the array while the next one is made.
    check_array(name, info, array)
    file.writelines(piece.view(np.uint8) for piece in pieces(array))


def _index(shards: Mapping[str, Sequence[LazyTensor]]) -> str:
    total = sum(info.nbytes for tensors in shards.values() for _, info, _ in tensors)
    where = {name: shard for shard, tensors in shards.items() for name, _, _ in tensors}
    fields = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return json.dumps(fields, indent=2) + "\n"


def _refuse_existing(folder: Path) -> None:
    if folder.is_dir():
        found = sorted(
            path.name for path in folder.iterdir()
            if path.name == INDEX or (path.name.startswith("model") and path.suffix == SUFFIX)
        )  # fmt: skip
        if found:
            raise UserError(
                f"{folder} holds weights already ({found[0]}); remove them or choose another folder: files of two "
                "exports must not mix"
            )
