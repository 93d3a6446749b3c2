"""Step to batch: a pure function of (data, seed, packing, mixture, step, global batch rows), no state and no order.

`Batches` is what `Loader` reads through Grain; it may be asked for any step, in any thread or process.
"""

import hashlib

import numpy as np

from maxstack.config import UserError
from maxstack.data.batch import Batch
from maxstack.data.best_fit import BestFit
from maxstack.data.config import DataConfig
from maxstack.data.mixture import mixture
from maxstack.data.packing import Concat, Rows, empty_batch, fill_row
from maxstack.data.prepare import PreparedData

PACKINGS: dict[str, type[Concat] | type[BestFit]] = {"concat": Concat, "best_fit": BestFit}


class Batches:
    """The global batch of every step, or this process's rows of it."""

    def __init__(
        self,
        config: DataConfig,
        prepared: PreparedData,
        *,
        batch_rows: int,
        seq_len: int | None = None,
        rows: slice | None = None,
    ):
        """`batch_rows` rows in a step over all processes, of which this one reads `rows` (all, by default)."""
        if batch_rows < 1:
            raise UserError(f"batch_rows {batch_rows} must be at least 1")
        self.seq_len = seq_len or config.seq_len
        self.batch_rows = batch_rows
        self.rows = range(batch_rows)[rows or slice(None)]
        if len(self.rows) == 0:
            raise UserError(
                f"the slice {rows} of {batch_rows} global rows is empty: use fewer processes or more rows"
            )
        self.mixture = mixture(config, batch_rows)
        self.sources = [prepared.sources[name] for name in self.mixture.names]
        packing = PACKINGS[config.packing]
        self._packed: list[Rows] = [
            packing(s.train, self.seq_len, seed=config.seed, name=name)
            for name, s in zip(self.mixture.names, self.sources, strict=True)
        ]
        self._rebuild = (config, prepared, batch_rows, seq_len, rows)

    def batch(self, step: int) -> Batch:
        """This process's rows of a step."""
        sources, rows = (part[self.rows] for part in self.mixture.step_rows(step))
        batch = empty_batch(len(self.rows), self.seq_len)
        for number in np.unique(sources).tolist():
            places = np.flatnonzero(sources == number)
            split = self.sources[number].train
            for place, pieces in zip(places.tolist(), self._packed[number].rows(rows[places]), strict=True):
                fill_row(batch, place, split, pieces)
        return batch

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source has been gone through before a step."""
        used = self.mixture.rows_before(step)
        names = self.mixture.names
        return {n: u / p.rows_per_epoch for n, u, p in zip(names, used, self._packed, strict=True)}

    def row_hashes(self, step: int) -> list[str]:
        """One hash for each of this process's rows, see `row_hashes`."""
        return row_hashes(self.batch(step))

    def __reduce__(self):
        return _rebuilt, self._rebuild  # a worker process opens its own memory maps


def _rebuilt(
    config: DataConfig, prepared: PreparedData, batch_rows: int, seq_len: int | None, rows: slice | None
):
    return Batches(config, prepared, batch_rows=batch_rows, seq_len=seq_len, rows=rows)


def row_hashes(batch: Batch) -> list[str]:
    """A hash of each row over tokens, labels, segments, positions and weights; the same on every machine."""
    parts = [np.asarray(part).astype(np.dtype(part.dtype).newbyteorder("<")) for part in batch]
    return [
        hashlib.blake2b(b"".join(part[row].tobytes() for part in parts), digest_size=16).hexdigest()
        for row in range(len(parts[0]))
    ]
