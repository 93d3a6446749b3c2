"""What the user sets about checkpoints."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a checkpoint is saved, which are kept, how one is checked before it is read."""

    save_every: int = 1000
    """Steps between checkpoints; the last step is saved too. 0: only the last step."""
    keep_last: int = 3
    """How many of the newest checkpoints are kept; at least 1."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good. 0: none."""
    keep_best: int = 0
    """How many of the best checkpoints by `best_metric` are kept besides. 0: none."""
    best_metric: str = "loss"
    """The metric that `keep_best` ranks by: "loss" (of training), or "held_out.SOURCE" (of the held-out part of the
    source of that name). A checkpoint without it does not rank; of equal ones the earlier is better."""
    best_mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value of `best_metric` is best."""
    asynchronous: bool = True
    """Write in the background while training goes on; the step waits only until the state is held for writing."""
    verify: Literal["hash", "size", "none"] = "hash"
    """What is compared with the manifest before a checkpoint is read: SHA-256 of each file, its size, or nothing."""
    timeout_s: int = 1200
    """Seconds after which a save that waits for another process or for the disk is given up."""

    def __post_init__(self) -> None:
        for name in ("save_every", "keep_every", "keep_best"):
            if getattr(self, name) < 0:
                raise ValueError(f"checkpoint.{name} {getattr(self, name)} must not be negative")
        for name in ("keep_last", "timeout_s"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name} {getattr(self, name)} must be at least 1")
