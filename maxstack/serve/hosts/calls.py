"""Calls of compiled programs as bytes: the program's number, and the host's arrays one behind the other.

Both sides know from their own programs what the arrays are; a digest tells whether they know the same.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from maxstack.serve.hosts.frames import LinkLost


class Calls:
    """The programs that may be called, and what of the host's each one takes."""

    def __init__(self, table: Mapping[Any, Any]):
        """`table`: by program a tree of the shapes that the host gives it."""
        self._keys = sorted(table, key=repr)
        self._numbers = {key: number for number, key in enumerate(self._keys)}
        flat = [jax.tree.flatten(table[key]) for key in self._keys]
        self._trees = [tree for _, tree in flat]
        self._leaves = [[(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves] for leaves, _ in flat]
        self._sizes = [sum(size_of(*leaf) for leaf in leaves) for leaves in self._leaves]
        told = repr([(key, leaves) for key, leaves in zip(self._keys, self._leaves, strict=True)])
        self.digest = hashlib.sha256(told.encode()).digest()
        """The same where all programs take the same."""

    def encoded(self, key: Any, given: Any) -> tuple[int, bytes]:
        """Raises ValueError, before anybody has heard of it, for arrays that the program does not take."""
        number = self._numbers[key]
        leaves, tree = jax.tree.flatten(given)
        if tree != self._trees[number]:
            raise ValueError(f"program {key}: the host gives {tree}, it takes {self._trees[number]}")
        arrays = [np.asarray(leaf) for leaf in leaves]
        for array, (shape, dtype) in zip(arrays, self._leaves[number], strict=True):
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"program {key}: the host gives {array.dtype} {list(array.shape)}, it takes {dtype} {list(shape)}"
                )
        return number, b"".join(array.tobytes() for array in arrays)

    def decoded(self, number: int, data: bytes) -> tuple[Any, Any]:
        """Program and arrays. Raises LinkLost for what no leader with the same programs says."""
        if number >= len(self._keys):
            raise LinkLost(f"program {number} was called; there are {len(self._keys)}")
        if len(data) != self._sizes[number]:
            raise LinkLost(
                f"program {self._keys[number]} was called with {len(data)} bytes; it takes {self._sizes[number]}"
            )
        arrays, at = [], 0
        for shape, dtype in self._leaves[number]:
            end = at + size_of(shape, dtype)
            arrays.append(np.frombuffer(data[at:end], dtype).reshape(shape))
            at = end
        return self._keys[number], jax.tree.unflatten(self._trees[number], arrays)


def size_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of an array."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
