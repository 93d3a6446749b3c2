"""What a weight's logical axes say to an optimizer: which dims are a matrix, which leaves decay, which are exempt."""

import math
from collections.abc import Mapping
from typing import NamedTuple

BATCH_AXES = ("layers", "expert")
"""Stacked copies: one matrix each, never mixed by an optimizer."""

HEAD_AXES = ("heads", "kv_heads", "head_dim")
"""Together one feature dim, so a bias of axes (heads, head_dim) is a vector."""

Axes = tuple[str, ...]


class MatrixDims(NamedTuple):
    """Positions of a leaf's dims, seen as a batch of matrices that map `inputs` to `outputs`."""

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(matrices, fan in, fan out) of a leaf of this shape."""
        batch, inputs, outputs = (math.prod(shape[i] for i in dims) for dims in self)
        return batch, inputs, outputs


def matrix_dims(axes: Axes) -> MatrixDims | None:
    """The matrix in a leaf, or None for vectors: norms, biases, sinks, and a router (one vector an expert).

    Matrices are stored in → out: a last axis "embed" is the whole output, otherwise the first axis is the whole input.
    """
    core = tuple(i for i, name in enumerate(axes) if name not in BATCH_AXES)
    features = {"head" if axes[i] in HEAD_AXES else i for i in core}
    if len(features) < 2:
        return None
    batch = tuple(i for i, name in enumerate(axes) if name in BATCH_AXES)
    if axes[-1] == "embed":
        return MatrixDims(batch, core[:-1], core[-1:])
    return MatrixDims(batch, core[:1], core[1:])


def is_embedding(axes: Axes) -> bool:
    """A table that is read by token id or position: that in, model width out (also when tied to the output)."""
    return axes[:1] in (("vocab",), ("position",)) and len(axes) > 1


def decay_mask(axes: Mapping[str, Axes], *, embeddings: bool) -> dict[str, bool]:
    """True for the leaves that weight decay pulls to zero: matrices, and embeddings if told so."""
    return {
        name: matrix_dims(leaf) is not None and (embeddings or not is_embedding(leaf))
        for name, leaf in axes.items()
    }


def muon_dims(axes: Axes) -> MatrixDims | None:
    """The matrix that Muon orthogonalises, or None for its exempt leaves: vectors, router, (un)embedding."""
    return None if "vocab" in axes or is_embedding(axes) else matrix_dims(axes)
