"""Where the wall time of a run went, over all its restarts."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maxstack.config import write_atomically

ACTIVITIES = ("compile", "data", "step", "save", "evaluate", "sample", "lost", "idle")
"""In the order of a report. `lost` are steps done again after a crash, `idle` is what no timer covers."""


class Goodput:
    """Timers by activity, kept in a JSON file so that a resumed run adds to the sums of the run before.

    Timers nest: while an inner one runs the outer one stands still, so the parts add up to the wall time. One thread
    uses it, the one that trains.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        before = _read(self.path)
        self.starts: int = before.get("starts", 0) + 1
        """How often the run was started."""
        self._seconds = {name: float(s) for name, s in before.get("seconds", {}).items() if name != "idle"}
        self._wall_before = float(before.get("wall_seconds", 0.0))
        self._began = self._mark = time.perf_counter()
        self._running: list[str] = []

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Count the time inside as `activity`."""
        self._lap()
        self._running.append(_known(activity))
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def add(self, activity: str, seconds: int | float) -> None:
        """Count time that was measured elsewhere, outside of every `measure`."""
        self._seconds[_known(activity)] = self._seconds.get(activity, 0.0) + seconds

    def move(self, source: str, target: str, seconds: int | float) -> None:
        """Book time under another activity: on resuming, the steps whose results a crash took from `step` to `lost`."""
        moved = min(max(seconds, 0.0), self._seconds.get(_known(source), 0.0))
        self.add(source, -moved)
        self.add(target, moved)

    @property
    def wall_seconds(self) -> float:
        """Wall time of this run and those it resumes, without the pauses between them."""
        return self._wall_before + time.perf_counter() - self._began

    def seconds(self) -> dict[str, float]:
        """Seconds by activity, `idle` the rest of the wall time."""
        self._lap()
        known = {name: self._seconds.get(name, 0.0) for name in ACTIVITIES if name != "idle"}
        return known | {"idle": max(0.0, self.wall_seconds - sum(known.values()))}

    def shares(self) -> dict[str, float]:
        """Fractions of the wall time by activity; they add up to 1."""
        seconds = self.seconds()
        total = sum(seconds.values()) or 1.0
        return {name: value / total for name, value in seconds.items()}

    def save(self) -> None:
        """Write the sums to the file. Cheap enough for every few seconds."""
        if self.path is None:
            return
        seconds, shares = self.seconds(), self.shares()
        report = {
            "seconds": seconds,
            "shares": shares,
            "wall_seconds": self.wall_seconds,
            "starts": self.starts,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(report, indent=2).encode() + b"\n")

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now


def _known(activity: str) -> str:
    if activity not in ACTIVITIES or activity == "idle":
        raise ValueError(f"activity must be one of {', '.join(ACTIVITIES[:-1])}, got {activity!r}")
    return activity


def _read(path: Path | None) -> dict[str, Any]:
    """The report of the run before; an unreadable one counts as none, for it is only a statistic."""
    if path is None or not path.is_file():
        return {}
    try:
        report = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return report if isinstance(report, dict) and isinstance(report.get("seconds"), dict) else {}
