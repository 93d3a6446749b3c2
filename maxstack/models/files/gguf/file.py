"""Tensors and metadata of a GGUF file."""

import math
from pathlib import Path
from typing import Any, Self

import numpy as np

from maxstack.models.files.gguf.header import Tensor, read_header
from maxstack.models.files.opened import OpenedFile
from maxstack.models.files.source import TensorInfo, aligned, no_tensor, row_range

# Blocks are decoded so many bytes at a time: the intermediate arrays stay in the processor's cache.
_AT_A_TIME = 1 << 17


class GGUF:
    """A TensorSource. Raises UserError for a damaged file and for types that are not read.

    Shapes are numpy's (llama.cpp lists sizes the other way round). F32, F16, BF16 and integers are read as they are,
    everything else as float32.
    """

    where: str
    metadata: dict[str, Any]
    """By key, in plain Python; arrays are lists."""
    types: dict[str, str]
    """Of the metadata: "uint32", "string", "array[int32]", …"""

    def __init__(self, path: Path | str):
        self.where = str(path)
        self._file = OpenedFile(Path(path))
        try:
            self._tensors, self.metadata, self.types = read_header(self._file)
        except BaseException:
            self._file.close()
            raise

    def names(self) -> tuple[str, ...]:
        """All tensors, in the order of the file."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of what `read` gives. Raises UserError when there is no such tensor."""
        return self._tensor(name).info

    def kind(self, name: str) -> str:
        """The tensor's type in the file: "F32", "Q4_1", … Raises UserError when there is no such tensor."""
        return self._tensor(name).kind.name

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of the first axis, decoded; see TensorSource."""
        info, kind, offset = self._tensor(name)
        start, stop = row_range(name, info.shape, start, stop)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        row = math.prod(info.shape[1:])
        if kind.decode is None:
            return self._file.array(offset + start * row * kind.nbytes, shape, kind.dtype)
        first, last = start * row // kind.elements, -(-stop * row // kind.elements)
        out = aligned((last - first) * kind.elements * 4).view(np.float32).reshape(-1, kind.elements)
        count = max(_AT_A_TIME // kind.nbytes, 1)
        buffer = np.empty(min(count, len(out)) * kind.nbytes, np.uint8)
        for block in range(0, len(out), count):
            part = out[block : block + count]
            blocks = buffer[: len(part) * kind.nbytes]
            self._file.fill(offset + (first + block) * kind.nbytes, blocks)
            with np.errstate(invalid="ignore", over="ignore"):  # a scale that is no number makes such values
                kind.decode(blocks.reshape(len(part), kind.nbytes), part)
        # Only the rows of a vector, its elements, can begin inside a block.
        begin = start * row - first * kind.elements
        return out.reshape(-1)[begin : begin + (stop - start) * row].reshape(shape)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The same rows undecoded: uint8 [rows, …, blocks of a row, bytes of a block].

        Raises ValueError when a vector is cut inside a block.
        """
        info, kind, offset = self._tensor(name)
        start, stop = row_range(name, info.shape, start, stop)
        lengths = (stop - start, *info.shape[1:]) if info.shape else (1,)
        if len(info.shape) == 1 and (start % kind.elements or stop % kind.elements):
            raise ValueError(f"{name} is in blocks of {kind.elements}; [{start}, {stop}) cuts one")
        shape = (*lengths[:-1], lengths[-1] // kind.elements, kind.nbytes)
        first = start * math.prod(info.shape[1:]) // kind.elements
        return self._file.array(offset + first * kind.nbytes, shape, "uint8")

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise no_tensor(self.where, name, self._tensors)
        return self._tensors[name]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
