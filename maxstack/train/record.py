"""Rows of metrics: what a step cost and gave, written to files and shown in the terminal."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from maxstack import telemetry
from maxstack.config import to_dict
from maxstack.models.account import Account
from maxstack.train.agreement import told_by_the_first
from maxstack.train.evaluate import HeldOutLoss
from maxstack.train.run import RunConfig

# Least time between two writes of goodput.json, and between two readings of memory: both cost as much as a short step.
SAVE_GOODPUT_EVERY_S = 5.0
READ_MEMORY_EVERY_S = 0.1
KINDS = ("evaluation", "final", "sample")
"""What the files of a run can have of a step beside its training."""


class Recorder:
    """Takes the results of steps, evaluations and samples; only process 0 writes files and shows a display."""

    def __init__(self, run: RunConfig, costs: Account, goodput: telemetry.Goodput, *, start: int):
        self.goodput, self._run, self._costs = goodput, run, costs
        self._resumed = start > 0
        self._timer = telemetry.StepTimer()
        self._peak = telemetry.peak_flops(jax.devices()[0].device_kind, run.model.dtype)
        self._memory, self._memory_read_at = memory_row(), time.monotonic()
        self._goodput_saved_at = time.monotonic()
        self._files = ExitStack()
        self._writers: list[Any] = []
        self._samples: telemetry.MetricsFile | None = None
        self._had: set[str] = set()
        self._display = telemetry.Display(run.steps, mode="off")
        if jax.process_index() == 0:
            self._open_files(Path(run.out), start)
        told = told_by_the_first([kind in self._had for kind in KINDS])
        self._had = {kind for kind, had in zip(KINDS, told, strict=True) if had}

    def _open_files(self, out: Path, start: int) -> None:
        run = self._run
        rows = self._files.enter_context(telemetry.MetricsFile(out / "metrics.jsonl", resume_step=start))
        self._samples = self._files.enter_context(
            telemetry.MetricsFile(out / "samples.jsonl", resume_step=start)
        )
        self._had = set(kinds_at(start, rows.path, self._samples.path)) if start else set()
        again = sum(row.get("step_seconds", 0.0) for row in rows.dropped)
        self.goodput.move("step", "lost", again)
        others = telemetry.open_writers(run.telemetry, out, resume_step=start or None, run=to_dict(run))
        for writer in others:
            self._files.callback(writer.close)
        self._writers = [rows, *others]
        self._files.callback(self.goodput.save)
        settings = run.telemetry
        self._display = telemetry.Display(
            run.steps, mode=settings.display, title=str(out), lines_every_s=settings.lines_every_s
        )

    def __enter__(self) -> Self:
        self._files.enter_context(self._display)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def step(self, step: int, results: Mapping[str, float], data_wait_seconds: float) -> dict[str, Any]:
        """Record a finished training step; returns its row."""
        took = self._timer.tick(results["tokens"])
        self.goodput.add("step", max(took.seconds - data_wait_seconds, 0.0))
        row: dict[str, Any] = {"kind": "train", "step": step, **results}
        row |= {
            "tokens_per_second": took.tokens_per_second, "step_seconds": took.seconds,
            "data_wait_seconds": data_wait_seconds, **self._use(took.tokens_per_second),
        }  # fmt: skip
        if self._resumed:
            row["resumed"], self._resumed = True, False
        self._write(row)
        self._display.step(row, self._timer.seconds_left(self._run.steps - step))
        if time.monotonic() - self._goodput_saved_at >= SAVE_GOODPUT_EVERY_S and jax.process_index() == 0:
            self.goodput.save()
            self._goodput_saved_at = time.monotonic()
        return row

    def _use(self, tokens_per_second: float) -> dict[str, Any]:
        """FLOPs a token, the share of the peak they make, and memory."""
        full, causal = self._costs.training_flops_full, self._costs.training_flops_causal
        devices = jax.device_count()
        row: dict[str, Any] = {"flops_per_token_full": full, "flops_per_token_causal": causal}
        for name, flops in (("mfu_full", full), ("mfu_causal", causal)):
            share = telemetry.mfu(flops, tokens_per_second, devices, self._peak)
            if share is not None:
                row[name] = share
        if time.monotonic() - self._memory_read_at >= READ_MEMORY_EVERY_S:
            self._memory, self._memory_read_at = memory_row(), time.monotonic()
        return row | self._memory

    def had(self, kind: str) -> bool:
        """Whether the files have an "evaluation", a "final" one or a "sample" of the step that the run resumes from."""
        return kind in self._had

    def evaluation(self, step: int, losses: Mapping[str, HeldOutLoss], *, final: bool = False) -> None:
        """Record held-out losses by source."""
        held_out = {name: loss._asdict() for name, loss in losses.items()}
        row: dict[str, Any] = {"kind": "evaluation", "step": step, "held_out": held_out}
        self._write(row | {"final": True} if final else row)
        self._display.evaluation(step, held_out)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record a text that the model wrote."""
        if self._samples is not None:
            self._samples.write({"step": step, "prompt": prompt, "text": text})
        self._display.sample(step, prompt, text)

    def message(self, text: str) -> None:
        """Show a line."""
        self._display.message(text)

    def pause(self) -> None:
        """What came since the last step was no part of a step."""
        self._timer.restart()

    def _write(self, row: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write(row)


def kinds_at(step: int, metrics: Path, samples: Path) -> Iterator[str]:
    """What else than training the files of a run have of a step."""
    for row in telemetry.read_rows(metrics):
        if row.get("step") == step and row.get("kind") == "evaluation":
            yield "final" if row.get("final") else "evaluation"
    if any(row.get("step") == step for row in telemetry.read_rows(samples)):
        yield "sample"


def memory_row() -> dict[str, int]:
    """Memory of this process and of its fullest device, as a row of metrics has it."""
    host, device = telemetry.host_memory(), telemetry.device_memory()
    return {
        "host_memory_bytes": host.current_bytes, "host_memory_peak_bytes": host.peak_bytes,
        "device_memory_bytes": device.current_bytes, "device_memory_peak_bytes": device.peak_bytes,
    }  # fmt: skip
