"""Tensors of a safetensors file, or of a folder of shards with their index."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from maxstack.config import UserError
from maxstack.models.files.header import Tensor, read_header
from maxstack.models.files.index import INDEX, WHOLE, inside, read_index
from maxstack.models.files.opened import OpenedFile
from maxstack.models.files.source import TensorInfo, no_tensor, row_range, shown, some


class _Place(NamedTuple):
    file: OpenedFile
    tensor: Tensor


class Safetensors:
    """A TensorSource. `path` is a file, an index, or a folder with `model.safetensors` or an index and its shards.

    All headers are read and checked at once: Raises UserError for a damaged or missing file, a tensor that lies in
    two shards, and shards that hold more or less than the index says.
    """

    where: str
    metadata: dict[str, str]
    """The texts of the headers' `__metadata__`."""

    def __init__(self, path: Path | str):
        path = Path(path)
        self.where, self.metadata = str(path), {}
        self._places: dict[str, _Place] = {}
        with ExitStack() as stack:
            self._open(path, stack)
            self._files = stack.pop_all()

    def _open(self, path: Path, stack: ExitStack) -> None:
        if not path.is_dir() and not path.name.endswith(".json"):
            self._add(path, stack)
            return
        folder = path if path.is_dir() else path.parent
        if path.is_dir() and (path / WHOLE).exists():
            self._add(inside(path, WHOLE), stack)
            return
        index = folder / INDEX if path.is_dir() else path
        if not index.exists():
            raise UserError(f"{folder} has neither {WHOLE} nor {INDEX}; give the folder of a model that has")
        shards = read_index(index)
        for shard in sorted(set(shards.values())):
            self._add(inside(folder, shard), stack)
        self._compare(index, shards)

    def _add(self, path: Path, stack: ExitStack) -> None:
        file = OpenedFile(path)
        stack.callback(file.close)
        header = read_header(file)
        for name, tensor in header.tensors.items():
            if name in self._places:
                raise UserError(
                    f"tensor {shown(name)} lies in {self._places[name].file.path} and in {path}; it must be in one. "
                    "Shards of two exports are mixed in the folder: fetch or export the model again"
                )
            self._places[name] = _Place(file, tensor)
        self.metadata |= header.metadata

    def _compare(self, index: Path, shards: Mapping[str, str]) -> None:
        """The shards hold what the index says and nothing else."""
        again = "The index is of another export than the shards: fetch or export the model again"
        if extra := [name for name in self._places if name not in shards]:
            raise UserError(f"{index} does not name {some(extra)}, which its shards hold. {again}")
        if missing := [name for name in shards if name not in self._places]:
            raise UserError(f"{index} names {some(missing)}, which its shards do not hold. {again}")
        for name, shard in shards.items():
            there = self._places[name].file.path.name
            if there != shard:
                raise UserError(
                    f"{index} puts tensor {shown(name)} into {shard}; it lies in {there}. {again}"
                )

    def names(self) -> tuple[str, ...]:
        """All tensors, by shard and in the order of their bytes."""
        return tuple(self._places)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype. Raises UserError when there is no such tensor."""
        return self._place(name).tensor.info

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of the first axis; see TensorSource."""
        file, (info, offset) = self._place(name)
        start, stop = row_range(name, info.shape, start, stop)
        row = TensorInfo(info.shape[1:], info.dtype).nbytes
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        return file.array(offset + start * row, shape, info.dtype)

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise no_tensor(self.where, name, self._places)
        return self._places[name]

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
