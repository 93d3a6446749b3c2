"""What every kind of weights file offers: names, shapes, and rows of a tensor in memory of their own."""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol, Self, runtime_checkable

import ml_dtypes  # gives numpy the names bfloat16, float8_e4m3fn, …
import numpy as np

from maxstack.config import UserError

# XLA on a CPU takes an array without a copy when it begins on such a boundary.
ALIGNMENT = 64


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: str
    """Its name in numpy or ml_dtypes: "float32", "bfloat16", "float16", "int8", …"""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor in memory."""
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize


# A tensor to be written: its array is asked for when its turn comes, and let go before the next.
LazyTensor = tuple[str, TensorInfo, Callable[[], np.ndarray]]


@runtime_checkable
class TensorSource(Protocol):
    """Tensors by name. Reading is safe from several threads; `close` ends it."""

    where: str
    """The file or folder, for messages."""

    def names(self) -> tuple[str, ...]:
        """All tensors, in the order in which they lie in the files."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype. Raises UserError when there is no such tensor."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of the first axis, in memory of their own (a scalar is read whole).

        Raises UserError when there is no such tensor or the file ends before it, ValueError for rows it has not.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def dtype_of(name: str) -> np.dtype:
    """numpy's dtype of a name, those of ml_dtypes included. ValueError for another word."""
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError as error:
        raise ValueError(f"{name!r} names no dtype of numpy or ml_dtypes") from error


def row_range(name: str, shape: tuple[int, ...], start: int, stop: int | None) -> tuple[int, int]:
    """The rows asked for, with the end filled in; a scalar counts as one row. ValueError when it has not so many."""
    rows = shape[0] if shape else 1
    stop = rows if stop is None else stop
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"{name} has {rows} rows; [{start}, {stop}) are not among them")
    return start, stop


def check_array(name: str, info: TensorInfo, array: np.ndarray) -> None:
    """ValueError when the array is not what was announced."""
    if array.shape != info.shape or array.dtype != dtype_of(info.dtype):
        raise ValueError(
            f"{name} was announced as {list(info.shape)} {info.dtype}; the array is {list(array.shape)} {array.dtype}"
        )


def aligned(nbytes: int) -> np.ndarray:
    """Uninitialised bytes that begin on a boundary of 64."""
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    first = -buffer.ctypes.data % ALIGNMENT
    return buffer[first : first + nbytes]


def no_tensor(where: str, name: str, names: Collection[str]) -> UserError:
    """The error for a name that is not there."""
    return UserError(
        f"{where} has no tensor {shown(name)}; it has {len(names)}: {some(names)}. "
        "It is of another model, or of another exporter, than the name was made for"
    )


def some(names: Collection[str], most: int = 3) -> str:
    """The first few names, for a message."""
    first = [shown(name) for name, _ in zip(names, range(most), strict=False)]
    return ", ".join(first) + (f" and {len(names) - most} more" if len(names) > most else "")


def shown(text: object, most: int = 120) -> str:
    """A word from a file for a message: printable whatever it holds, and short."""
    plain = ascii(text) if isinstance(text, str) else repr(text)
    return plain if len(plain) <= most else f"{plain[:most]}…"
