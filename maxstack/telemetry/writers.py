"""Metrics to TensorBoard and Weights & Biases, beside metrics.jsonl."""

import importlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from maxstack.config import UserError
from maxstack.telemetry.config import TelemetryConfig


@runtime_checkable
class Writer(Protocol):
    """Takes the rows of metrics.jsonl."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_writers(
    config: TelemetryConfig,
    folder: str | Path,
    *,
    resume_step: int | None = None,
    run: Mapping[str, Any] | None = None,
) -> list[Writer]:
    """The writers that a run asked for; `run` are its settings. Raises UserError where a package is missing."""
    writers: list[Writer] = []
    if config.wandb:
        writers.append(WandbWriter(config.wandb_project, Path(folder), run or {}))
    if config.tensorboard:
        writers.append(TensorBoardWriter(Path(folder) / "tensorboard", resume_step=resume_step))
    return writers


class TensorBoardWriter:
    """Numbers of each row as scalars, named KIND/FIELD.

    Of training rows that come faster than TensorBoard can draw, one every `least_seconds` is written, and the last:
    its files are made in Python, at the price of a short step each. metrics.jsonl has them all.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None, least_seconds: float = 0.2):
        from tensorboardX import SummaryWriter

        # Tells TensorBoard to forget what a crashed run wrote past its checkpoint.
        purge = None if resume_step is None else resume_step + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)
        self._summary = importlib.import_module("tensorboardX.proto.summary_pb2").Summary
        self._least_seconds = least_seconds
        self._written_at = -math.inf
        self._left_out: Mapping[str, Any] | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row's numbers at its step."""
        now = time.monotonic()
        if row.get("kind", "train") == "train":
            if now - self._written_at < self._least_seconds:
                self._left_out = row
                return
            self._written_at, self._left_out = now, None
        self._add(row)

    def _add(self, row: Mapping[str, Any]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars(row)]
        # All numbers of a row in one record: its queue and checksum are what costs.
        self._writer.file_writer.add_summary(self._summary(value=values), row["step"])

    def close(self) -> None:
        """Write what is buffered."""
        if self._left_out is not None:
            self._add(self._left_out)
        self._writer.close()


class WandbWriter:
    """Numbers of each row to one wandb run, whose id lives in the run's folder so that a resumed run continues it."""

    def __init__(self, project: str, folder: Path, run: Mapping[str, Any]):
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise UserError(
                "telemetry.wandb is on but the wandb package is not installed: pip install 'maxstack[wandb]', "
                "or turn it off with --telemetry.no-wandb"
            ) from error
        kept = folder / "wandb_id"
        identity = kept.read_text().strip() if kept.exists() else None
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                dir=str(folder),
                config=dict(run),
                id=identity,
                resume="allow",
            )
        except wandb.Error as error:
            raise UserError(
                f"wandb did not start: {error}. Log in (wandb login), set WANDB_MODE=offline, or turn it off with "
                "--telemetry.no-wandb"
            ) from error
        kept.write_text(self._run.id)

    def write(self, row: Mapping[str, Any]) -> None:
        """Send a row's numbers at its step."""
        self._run.log(dict(scalars(row)), step=row["step"])

    def close(self) -> None:
        """End the wandb run."""
        self._run.finish()


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The finite numbers of a row as ("train/loss", 2.3); nested ones as "evaluation/held_out/books/nll"."""
    kind = str(row.get("kind", "train"))
    pending: list[tuple[str, Any]] = [
        (f"{kind}/{key}", value) for key, value in row.items() if key not in ("step", "kind")
    ]
    while pending:
        name, value = pending.pop(0)
        if isinstance(value, Mapping):
            pending = [(f"{name}/{key}", item) for key, item in value.items()] + pending
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, float(value)
