"""Held-out rows: every held-out token once, in order, with the bytes of text they stand for.

Bits per byte of a source = Σ weight · nll / ln 2 / `bytes`. It counts the tokens that end documents too.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from maxstack.config import UserError
from maxstack.data.batch import Batch
from maxstack.data.packing import Piece, empty_batch, fill_row
from maxstack.data.prepare import PreparedData
from maxstack.data.shuffle import Permutation, derive_key
from maxstack.data.store import PreparedSource


class _Row(NamedTuple):
    start: int
    stop: int
    context: int
    """Tokens at the start of the row that were counted in the row before."""


class HeldOut:
    """The held-out rows of one source, in batches; iterating starts from the first each time."""

    def __init__(
        self,
        source: PreparedSource,
        *,
        seq_len: int,
        batch_rows: int,
        rows: slice | None = None,
        overlap: int = 0,
        max_bytes: int | None = None,
    ):
        """`overlap` tokens of a row repeat the end of the row before, as context that is not counted.

        `max_bytes` takes a fixed choice of whole documents, as many as fit (at least one); `rows` is this process's
        part of each batch.
        """
        if not 0 <= overlap < seq_len:
            raise UserError(f"overlap {overlap} must be in [0, seq_len {seq_len})")
        self._split = source.held_out
        if self._split.tokens == 0:
            raise UserError(f"source {source.name!r} holds nothing out; set held_out_fraction above 0")
        self._documents = self._choose(max_bytes)
        offsets, text_offsets = self._split.offsets, self._split.text_offsets
        self._begins = offsets[self._documents].astype(np.int64)
        lengths = offsets[self._documents + 1].astype(np.int64) - self._begins
        self._stream = np.concatenate([[0], np.cumsum(lengths)])
        self.documents = len(self._documents)
        self.bytes = int((text_offsets[self._documents + 1] - text_offsets[self._documents]).sum())
        """Bytes of text the rows stand for, over all processes."""
        self.tokens = int(self._stream[-1])
        """Tokens of these documents, over all processes."""
        self.seq_len, self.batch_rows = seq_len, batch_rows
        self._mine = range(batch_rows)[rows or slice(None)]
        stride = seq_len - overlap
        count = max(1, math.ceil((self.tokens - overlap) / stride))
        self._rows = [
            _Row(r * stride, min(r * stride + seq_len, self.tokens), overlap if r else 0)
            for r in range(count)
        ]

    def _choose(self, max_bytes: int | None) -> np.ndarray:
        n = self._split.documents
        if max_bytes is None or max_bytes >= self._split.bytes:
            return np.arange(n)
        # Not the first ones: they would all be from the first file.
        order = Permutation(n, derive_key("held out"))(np.arange(n))
        sizes = np.diff(self._split.text_offsets.astype(np.int64))[order]
        return np.sort(order[: max(1, int(np.searchsorted(np.cumsum(sizes), max_bytes, side="right")))])

    def text(self) -> bytes:
        """The text the rows stand for, UTF-8: what a compressor is given for comparison."""
        return "".join(self._split.text(int(document)) for document in self._documents).encode("utf-8")

    def __len__(self) -> int:
        """Batches in one pass; the last is filled up with padding."""
        return math.ceil(len(self._rows) / self.batch_rows)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self._rows), self.batch_rows):
            batch = empty_batch(len(self._mine), self.seq_len)
            for at, index in enumerate(self._mine):
                if first + index < len(self._rows):
                    self._fill(batch, at, self._rows[first + index])
            yield batch

    def _fill(self, batch: Batch, at: int, row: _Row) -> None:
        first = int(np.searchsorted(self._stream, row.start, side="right")) - 1
        last = int(np.searchsorted(self._stream, row.stop, side="left"))
        pieces = []
        for index in range(first, last):
            # From a place in the stream to one in the split.
            shift = int(self._begins[index] - self._stream[index])
            begin, end = int(self._stream[index]), int(self._stream[index + 1])
            start, stop = max(begin, row.start), min(end, row.stop)
            if stop > start:
                pieces.append(Piece(start + shift, stop + shift, end + shift))
        fill_row(batch, at, self._split, pieces)
        # The labels of these were counted in the row before.
        batch.weights[at, : row.context] = 0


def held_out(prepared: PreparedData, **settings: Any) -> dict[str, HeldOut]:
    """The held-out rows of every source that holds some out."""
    return {
        name: HeldOut(source, **settings)
        for name, source in prepared.sources.items()
        if source.held_out.documents
    }
