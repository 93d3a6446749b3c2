"""Which source each row of a step comes from: shares as exact as whole rows allow, for any step by itself.

Picture a clock `t` that counts rows. Source j has seen `W_j(t)`, the integral of its weight, and its k-th row is due
when `W_j` passes `k + offset_j`. So after time t it has given `ceil(W_j(t) - offset_j)` rows: never more than one away
from its share. All rows of all sources in order of their due time are the order of the run; the rows before step s are
found by bisection for the time at which `s * batch_rows` are due. Nothing is counted up from the start.
"""

import bisect
import math
from collections.abc import Mapping, Sequence

import numpy as np

from maxstack.config import UserError
from maxstack.data.config import DataConfig
from maxstack.data.shuffle import derive_key, mix

_RAMP_PIECES = 64  # a linear ramp is walked in this many level pieces, each with the ramp's mean over it


class Mixture:
    """The order of the sources."""

    def __init__(
        self,
        names: Sequence[str],
        pieces: Sequence[tuple[float, Mapping[str, float]]],
        *,
        batch_rows: int,
        seed: int,
    ):
        """`pieces`: from which step on which weights hold; the first from step 0. They need not add up to 1."""
        self.names = tuple(names)
        self.batch_rows = batch_rows
        self._seed = seed
        self._starts = [step * batch_rows for step, _ in pieces]
        self._weights: list[tuple[float, ...]] = []
        for step, weights in pieces:
            total = math.fsum(weights.values())
            if total <= 0:
                raise UserError(f"the weights of all sources are 0 from step {step:g} on: {dict(weights)}")
            self._weights.append(tuple(weights.get(name, 0.0) / total for name in self.names))
        self._done = [(0.0,) * len(self.names)]  # W_j at the start of each piece
        for i in range(1, len(pieces)):
            self._done.append(self._integrals(self._starts[i], i - 1))
        # Different offsets keep sources of equal weight from always being due together.
        self._offsets = [((derive_key(seed, "offset", name) >> 11) + 0.5) / 2**53 for name in self.names]

    def _integrals(self, t: float, piece: int) -> tuple[float, ...]:
        elapsed = t - self._starts[piece]
        return tuple(d + w * elapsed for d, w in zip(self._done[piece], self._weights[piece], strict=True))

    def _due(self, t: float) -> list[int]:
        """Rows of each source that are due before time t."""
        piece = bisect.bisect_right(self._starts, t) - 1
        integrals = self._integrals(t, piece)
        return [max(0, math.ceil(w - u)) for w, u in zip(integrals, self._offsets, strict=True)]

    def rows_before(self, step: int) -> list[int]:
        """How many rows of each source the steps before this one have used."""
        wanted = step * self.batch_rows
        if wanted == 0 or len(self.names) == 1:
            return [wanted] * len(self.names)
        low, high = 0.0, float(wanted + len(self.names) + 1)
        while True:  # until low and high are neighbours: about 60 halvings
            middle = (low + high) / 2
            if middle in (low, high):
                break
            low, high = (low, middle) if sum(self._due(middle)) >= wanted else (middle, high)
        counts, later = self._due(low), self._due(high)
        for j, extra in enumerate(later):  # rows due at the very same moment: the earlier source first
            counts[j] += min(extra - counts[j], wanted - sum(counts))
        return counts

    def step_rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Source number and row within that source of each row of a step, int64 `[batch_rows]` each."""
        before, after = self.rows_before(step), self.rows_before(step + 1)
        sources = np.repeat(np.arange(len(self.names)), np.subtract(after, before))
        rows = np.concatenate([np.arange(b, a) for b, a in zip(before, after, strict=True)])
        # Spread the sources over the batch, so that each process gets some of each.
        key = np.uint64(derive_key(self._seed, "step", step))
        order = np.argsort(mix(np.arange(self.batch_rows, dtype=np.uint64) + key), kind="stable")
        return sources[order], rows[order]

    def weights(self, step: int) -> dict[str, float]:
        """The weights that hold at a step, adding up to 1."""
        piece = bisect.bisect_right(self._starts, step * self.batch_rows) - 1
        return dict(zip(self.names, self._weights[piece], strict=True))


def mixture(config: DataConfig, batch_rows: int) -> Mixture:
    """The mixture a configuration describes."""
    names = [source.name for source in config.sources]
    current: dict[str, float] = {source.name: source.weight for source in config.sources}
    pieces: list[tuple[float, dict[str, float]]] = [(0.0, current)]
    busy_until = 0.0
    for stage in config.stages:
        unknown = set(stage.weights) - set(names)
        if unknown:
            raise UserError(
                f"mixture stage at step {stage.step} names {sorted(unknown)}; sources are {names}"
            )
        if stage.step < busy_until:
            raise UserError(
                f"mixture stage at step {stage.step} begins before the one before it ends ({busy_until:g})"
            )
        if min(stage.weights.values(), default=0) < 0 or stage.ramp_steps < 0:
            raise UserError(
                f"mixture stage at step {stage.step}: weights and ramp_steps must not be negative"
            )
        before = _normalised(current)
        current = {name: stage.weights.get(name, 0.0) for name in names}
        after = _normalised(current) if any(current.values()) else current
        count = min(stage.ramp_steps, _RAMP_PIECES)
        for i in range(count):
            part = (i + 0.5) / count
            blend = {name: (1 - part) * before[name] + part * after[name] for name in names}
            pieces.append((stage.step + i * stage.ramp_steps / count, blend))
        busy_until = float(stage.step + stage.ramp_steps)
        pieces.append((busy_until, current))
    return Mixture(
        names,
        [p for i, p in enumerate(pieces) if i + 1 == len(pieces) or pieces[i + 1][0] > p[0]],
        batch_rows=batch_rows,
        seed=config.seed,
    )


def _normalised(weights: dict[str, float]) -> dict[str, float]:
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()} if total > 0 else weights
