"""What a run records, where, and how it shows itself."""

import dataclasses
from typing import Literal

from maxstack.config import UserError
from maxstack.telemetry.profiler import parse_window


@dataclasses.dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """Metrics, terminal display, profiler."""

    tensorboard: bool = True
    """Write TensorBoard files to OUT/tensorboard beside metrics.jsonl."""
    wandb: bool = False
    """Send metrics to Weights & Biases; needs its package and account."""
    wandb_project: str = "maxstack"
    """Project there."""
    display: Literal["auto", "live", "lines", "off"] = "auto"
    """live: a display that redraws itself | lines: plain text | off | auto: live on a terminal, else lines."""
    lines_every_s: float = 10.0
    """Least time between two plain lines of progress (seconds)."""
    profile: str = ""
    """Steps A:B (first and last, from 1) to trace with the JAX profiler into OUT/profile; empty for none."""

    def __post_init__(self) -> None:
        parse_window(self.profile)
        if not self.lines_every_s >= 0:
            raise UserError(f"telemetry.lines_every_s must not be negative, got {self.lines_every_s}")
