"""What the files of a run's folder say, ready to be drawn."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from maxstack.config import UserError
from maxstack.telemetry import read_rows

Row = dict[str, Any]
RUN_FILES = ("run.py", "run.json")
MOST_POINTS = 1200
"""Points a drawn curve has at most; the page stays small for a run of a million steps."""


@dataclasses.dataclass(frozen=True)
class Records:
    """A run's folder, read."""

    name: str
    training: list[Row]
    """Rows of steps, in order; where a step was done twice, as it was done last."""
    evaluations: list[Row]
    """Rows with `held_out`."""
    samples: list[Row]
    """Rows with `step`, `prompt`, `text`."""
    goodput: dict[str, Any]
    comparison: list[Row]
    """Rows with `name` and `bits_per_byte`."""
    run_text: str
    """The resolved run as text."""

    @property
    def resumed_at(self) -> list[int]:
        """First steps after an interruption."""
        return [row["step"] for row in self.training if row.get("resumed")]

    @property
    def last(self) -> Row:
        """The last training row."""
        return self.training[-1]

    def series(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a number in the training rows; values that are absent are left out, NaN stays."""
        pairs = [(row["step"], row[field]) for row in self.training if _is_number(row.get(field))]
        return _columns(pairs)

    def held_out(self, field: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(steps, values) of each held-out source."""
        sources = dict.fromkeys(source for row in self.evaluations for source in row["held_out"])
        found = {}
        for source in sources:
            losses = [(row["step"], row["held_out"].get(source, {}).get(field)) for row in self.evaluations]
            found[source] = _columns([(step, value) for step, value in losses if _is_number(value)])
        return {source: columns for source, columns in found.items() if len(columns[0])}


def read(folder: Path) -> Records:
    """Read a run's folder. Raises UserError when it holds no training rows."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if isinstance(row.get("step"), int)]
    training = {row["step"]: row for row in rows if row.get("kind", "train") == "train"}
    if not training:
        raise UserError(
            f"no training rows in {folder / 'metrics.jsonl'}: train there first, or name another folder"
        )
    evaluations = {row["step"]: row for row in rows if isinstance(row.get("held_out"), dict)}
    samples = [
        r for r in read_rows(folder / "samples.jsonl") if isinstance(r.get("text"), str) and "step" in r
    ]
    run_file = next((folder / name for name in RUN_FILES if (folder / name).exists()), None)
    return Records(
        name=folder.resolve().name, training=[training[step] for step in sorted(training)],
        evaluations=[evaluations[step] for step in sorted(evaluations)], samples=samples,
        goodput=_json(folder / "goodput.json", {}), comparison=_json(folder / "comparison.json", []),
        run_text=run_file.read_text(errors="replace") if run_file else "",
    )  # fmt: skip


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """A curve as at most `most` points, each the mean of its neighbours."""
    if len(steps) <= most:
        return steps, values
    edges = np.linspace(0, len(steps), most + 1).astype(int)[:-1]
    counts = np.diff([*edges, len(steps)])
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def smoothed(values: np.ndarray, half: int) -> np.ndarray:
    """Mean of each value and up to `half` neighbours on both sides: near the start, where a loss is steep, as many on
    each, so that it does not lag.

    Values that are not finite are passed over; NaN where there are no others.
    """
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    index = np.arange(len(values))
    reach = np.minimum(half, index)
    first, last = index - reach, np.minimum(index + reach + 1, len(values))
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def spread(items: list[Row], count: int) -> list[Row]:
    """At most `count` of the items, evenly spaced, first and last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _columns(pairs: Iterable[tuple[int | float, int | float]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(list(pairs), np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json[T: (dict, list)](path: Path, absent: T) -> T:
    """The JSON value in a file; `absent` for no file. Raises UserError unless it is of the kind of `absent`."""
    if not path.exists():
        return absent
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, type(absent)):
        raise UserError(f"{path} must hold a JSON {'object' if isinstance(absent, dict) else 'array'}")
    return value
