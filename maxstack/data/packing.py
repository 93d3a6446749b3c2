"""Documents to rows of `seq_len` tokens: which piece of which document lies where, computed for any row by itself.

A `Piece` is a run of tokens of one document in one row. Two ways to cut, both with the same face:

- `Concat`: the documents of an epoch, in an order of (seed, epoch), end to end, cut every `seq_len` tokens. Every token
  but the last incomplete row of the epoch is used and no row is padded; documents are cut at row borders.
- `best_fit.BestFit`: documents stay whole where they fit; rows are padded.

Rows of an epoch are shuffled too, so that a batch does not consist of neighbouring pieces of one long document.
"""

from typing import NamedTuple, Protocol

import numpy as np

from maxstack.config import UserError
from maxstack.data.batch import Batch
from maxstack.data.shuffle import Permutation, derive_key
from maxstack.data.store import Split

_INDEX_ENTRIES = 2**20  # where every so many-th document starts: 8 MB however many documents there are
_CHUNK = 2**20  # documents handled at once while the index is made


class Piece(NamedTuple):
    """Tokens `[start, stop)` of the split, from a document that ends at `end`."""

    start: int
    stop: int
    end: int


class Rows(Protocol):
    """Rows of one source, counted from 0, epoch after epoch."""

    rows_per_epoch: int

    def rows(self, numbers: np.ndarray) -> list[list[Piece]]:
        """The pieces of each of these rows, in order."""
        ...


class Concat:
    """Documents end to end, cut into rows."""

    def __init__(self, split: Split, seq_len: int, *, seed: int, name: str):
        self.rows_per_epoch = split.tokens // seq_len
        if self.rows_per_epoch == 0:
            raise UserError(
                f"source {name!r} has {split.tokens} {split.name} tokens in {split.documents} documents, fewer than "
                f"one row of seq_len {seq_len}: give it more text or a shorter seq_len"
            )
        self._split, self._seq_len, self._seed, self._name = split, seq_len, seed, name
        self._stride = -(-split.documents // _INDEX_ENTRIES)
        self._epochs: dict[int, _Epoch] = {}

    def rows(self, numbers: np.ndarray) -> list[list[Piece]]:
        """The pieces of each of these rows, in order."""
        epochs, indices = np.divmod(numbers, self.rows_per_epoch)
        pieces: list[list[Piece]] = [[] for _ in numbers]
        for number in np.unique(epochs).tolist():
            epoch = self._epoch(number)
            places = np.flatnonzero(epochs == number)
            for place, row in zip(places.tolist(), epoch.rows(indices[places]).tolist(), strict=True):
                pieces[place] = self._pieces(epoch, row * self._seq_len, (row + 1) * self._seq_len)
        return pieces

    def _epoch(self, number: int) -> "_Epoch":
        epoch = self._epochs.get(number)
        if epoch is None:
            epoch = self._make_epoch(number)
            # Two threads may both make it: they make the same. A new dictionary instead of a change in this one, so
            # that no thread sees it half changed; the last two epochs are kept.
            self._epochs = dict([*[*self._epochs.items()][-1:], (number, epoch)])
        return epoch

    def _make_epoch(self, number: int) -> "_Epoch":
        n = self._split.documents
        documents = Permutation(n, derive_key(self._seed, self._name, "documents", number))
        rows = Permutation(self.rows_per_epoch, derive_key(self._seed, self._name, "rows", number))
        starts = [np.zeros(1, np.int64)]
        order = np.zeros(0, np.int64)
        chunk = self._stride * max(1, _CHUNK // self._stride)
        for first in range(0, n, chunk):
            order = documents(np.arange(first, min(first + chunk, n)))
            groups = np.add.reduceat(self._lengths(order), np.arange(0, len(order), self._stride))
            starts.append(starts[-1][-1] + np.cumsum(groups))
        return _Epoch(documents, rows, np.concatenate(starts), order if self._stride == 1 else None)

    def _lengths(self, documents: np.ndarray) -> np.ndarray:
        offsets = self._split.offsets
        return (offsets[documents + 1] - offsets[documents]).astype(np.int64)

    def _pieces(self, epoch: "_Epoch", start: int, stop: int) -> list[Piece]:
        """Pieces of the stream `[start, stop)` of the epoch's documents."""
        first, last = np.searchsorted(epoch.starts, [start, stop - 1], side="right") - 1
        low, high = int(first) * self._stride, min((int(last) + 1) * self._stride, self._split.documents)
        order = epoch.documents(np.arange(low, high)) if epoch.order is None else epoch.order[low:high]
        lengths = self._lengths(order)
        ends = epoch.starts[first] + np.cumsum(lengths)
        begins = ends - lengths
        pieces = []
        for at in np.flatnonzero(np.minimum(ends, stop) > np.maximum(begins, start)):
            offset = int(self._split.offsets[order[at]])
            begin, end = int(begins[at]), int(ends[at])
            piece_start, piece_stop = max(start, begin) - begin, min(stop, end) - begin
            pieces.append(Piece(offset + piece_start, offset + piece_stop, offset + end - begin))
        return pieces


class _Epoch(NamedTuple):
    documents: Permutation
    rows: Permutation
    starts: np.ndarray
    """Where in the epoch's stream every stride-th document starts; the stream's length at the end."""
    order: np.ndarray | None
    """The documents in order, where there are few enough to keep it."""


def empty_batch(rows: int, seq_len: int) -> Batch:
    """A batch of padding, to be filled row by row."""
    tokens, labels, segments, positions = (np.zeros((rows, seq_len), np.int32) for _ in range(4))
    return Batch(tokens, labels, segments, positions, np.zeros((rows, seq_len), np.float32))


def fill_row(batch: Batch, row: int, split: Split, pieces: list[Piece]) -> None:
    """Write the pieces into a row of padding."""
    at = 0
    for segment, (start, stop, end) in enumerate(pieces, 1):
        n = stop - start
        labels = min(n, end - start - 1)  # all but the last token of the document have a next one
        tokens = split.read(start, start + labels + 1 if labels == n else stop)
        batch.tokens[row, at : at + n] = tokens[:n]
        batch.labels[row, at : at + labels] = tokens[1 : labels + 1]
        batch.segment_ids[row, at : at + n] = segment
        batch.positions[row, at : at + n] = np.arange(n)
        batch.weights[row, at : at + labels] = 1
        at += n
