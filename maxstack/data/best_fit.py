"""Rows in which documents stay whole: best-fit decreasing, planned once for all epochs.

Documents longer than a row are cut every `seq_len` tokens; these and all shorter documents are the pieces. Pieces go,
longest first, each into the fullest row it still fits. Pieces of one length are exchanged by seed, and the rows of an
epoch are shuffled by (seed, epoch); which pieces share a row does not change between epochs.
"""

from collections import defaultdict

import numpy as np

from maxstack.config import UserError
from maxstack.data.packing import Piece
from maxstack.data.shuffle import Permutation, derive_key
from maxstack.data.store import Split


class BestFit:
    """Rows of whole documents, padded at the end."""

    def __init__(self, split: Split, seq_len: int, *, seed: int, name: str):
        offsets = np.asarray(split.offsets).astype(np.int64)
        self._starts, self._ends = _cut(offsets, seq_len)
        if len(self._starts) == 0:
            raise UserError(f"source {name!r} has no {split.name} tokens to pack")
        self._document_ends = offsets[np.searchsorted(offsets, self._starts, side="right")]
        shuffled = Permutation(len(self._starts), derive_key(seed, name, "pieces"))(
            np.arange(len(self._starts))
        )
        lengths = (self._ends - self._starts)[shuffled]
        rows = plan(lengths, seq_len)
        order = np.argsort(rows, kind="stable")
        self._pieces = shuffled[order]
        self._row_starts = np.searchsorted(rows[order], np.arange(rows.max() + 2))
        self.rows_per_epoch = int(rows.max()) + 1
        self._seed, self._name, self._seq_len = seed, name, seq_len

    @property
    def fill(self) -> float:
        """Share of row positions that hold tokens."""
        return float((self._ends - self._starts).sum() / (self.rows_per_epoch * self._seq_len))

    def rows(self, numbers: np.ndarray) -> list[list[Piece]]:
        """The pieces of each of these rows, in order."""
        return [self._row(*divmod(number, self.rows_per_epoch)) for number in numbers.tolist()]

    def _row(self, epoch: int, index: int) -> list[Piece]:
        key = derive_key(self._seed, self._name, "rows", epoch)
        row = int(Permutation(self.rows_per_epoch, key)(np.array([index]))[0])
        pieces = self._pieces[self._row_starts[row] : self._row_starts[row + 1]]
        return [Piece(int(self._starts[p]), int(self._ends[p]), int(self._document_ends[p])) for p in pieces]


def plan(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece by best-fit decreasing, rows counted from 0; every length in `[1, capacity]`.

    Equal lengths are handled together, so that it takes time in lengths times room left, not in pieces.
    """
    rows = np.empty(len(lengths), np.int64)
    # As a 16-bit number, where it is one, it is sorted by radix: five times as fast.
    shorter = (capacity - lengths).astype(np.uint16 if capacity < 2**16 else np.int64)
    order = np.argsort(shorter, kind="stable")
    counted = np.bincount(lengths)
    values = np.flatnonzero(counted)[::-1]
    open_rows: dict[int, list[np.ndarray]] = defaultdict(list)  # room left → rows that have it
    used = at = 0
    for length, count in zip(values.tolist(), counted[values].tolist(), strict=True):
        while count:
            room = min((room for room in open_rows if room >= length), default=capacity)
            each = room // length  # best fit goes on filling a row while the next piece of this length fits
            if room in open_rows:
                available = open_rows.pop(room)
                candidates = np.concatenate(available)
            else:
                candidates = np.arange(used, used + -(-count // each))
                used += len(candidates)
            full, rest = divmod(count, each)
            taken = candidates[: full + (rest > 0)]
            number = np.full(len(taken), each)
            if len(taken) > full:
                number[full] = rest
            rows[order[at : at + number.sum()]] = np.repeat(taken, number)
            at += int(number.sum())
            count -= int(number.sum())
            for left, group in _by_room(room - number * length, taken):
                if left:
                    open_rows[left].append(group)
            if len(candidates) > len(taken):
                open_rows[room].append(candidates[len(taken) :])
    return rows


def _by_room(room: np.ndarray, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
    return [(int(left), rows[room == left]) for left in np.unique(room)]


def _cut(offsets: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of each piece: documents, the long ones cut every `seq_len` tokens."""
    lengths = np.diff(offsets)
    pieces = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), pieces)
    first = np.cumsum(pieces) - pieces
    starts = offsets[document] + (np.arange(len(document)) - first[document]) * seq_len
    return starts, np.minimum(starts + seq_len, offsets[document + 1])
