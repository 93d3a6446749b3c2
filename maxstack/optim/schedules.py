"""Learning rate as a pure function of the number of updates already applied."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from maxstack.config import UserError

Schedule = Callable[[jax.Array | int], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Shape of the learning rate over a run of `total` updates."""

    kind: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    """constant | linear | cosine | wsd (warm up, stay, decay) | inverse_sqrt; all after the warm-up."""
    warmup_steps: int | None = None
    """Length of the linear warm-up [updates]; unset: `warmup_fraction` of the run."""
    warmup_fraction: float = 0.02
    """Length of the warm-up as a fraction of the run [0..1], used when `warmup_steps` is unset."""
    decay_steps: int | None = None
    """Length of the decay [updates]; unset: the rest of the run, for wsd `decay_fraction` of the run."""
    decay_fraction: float = 0.2
    """Length of the decay of wsd as a fraction of the run [0..1], used when `decay_steps` is unset."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of the decay of wsd: linear | cosine | sqrt (1 - sqrt of progress; arXiv 2405.18392)."""
    final_fraction: float = 0.1
    """Learning rate at the end as a fraction of the peak [0..1]; inverse_sqrt never goes below it."""

    def __post_init__(self) -> None:
        for field in ("warmup_fraction", "decay_fraction", "final_fraction"):
            value = getattr(self, field)
            if not 0.0 <= value <= 1.0:
                raise UserError(f"schedule.{field} must be between 0 and 1, got {value}")
        for field in ("warmup_steps", "decay_steps"):
            value = getattr(self, field)
            if value is not None and value < 0:
                raise UserError(f"schedule.{field} must not be negative, got {value}")

    def spans(self, total_steps: int) -> tuple[int, int, int]:
        """(warm-up, stay, decay) in updates; they add up to at most `total_steps`."""
        if total_steps < 1:
            raise UserError(f"a schedule needs at least 1 step, got steps {total_steps}")
        warmup = self._warmup(total_steps)
        if warmup > total_steps:
            raise UserError(
                f"schedule.warmup_steps {warmup} is longer than the run of {total_steps} steps: "
                "shorten the warm-up or raise steps"
            )
        if self.kind == "inverse_sqrt" and warmup < 1:
            raise UserError(
                "schedule.kind inverse_sqrt needs a warm-up of at least 1 step: set schedule.warmup_steps"
            )
        if self.kind in ("constant", "inverse_sqrt"):
            return warmup, total_steps - warmup, 0
        decay = self._decay(total_steps, warmup)
        if warmup + decay > total_steps:
            raise UserError(
                f"schedule warm-up of {warmup} and decay of {decay} steps do not fit in the run of {total_steps} steps"
            )
        return warmup, total_steps - warmup - decay, decay

    def _warmup(self, total_steps: int) -> int:
        if self.warmup_steps is not None:
            return self.warmup_steps
        at_least = 1 if self.kind == "inverse_sqrt" else 0
        return max(at_least, round(self.warmup_fraction * total_steps))

    def _decay(self, total_steps: int, warmup: int) -> int:
        if self.decay_steps is not None:
            return self.decay_steps
        return round(self.decay_fraction * total_steps) if self.kind == "wsd" else total_steps - warmup


def learning_rate(config: ScheduleConfig, peak_lr: int | float, total_steps: int) -> Schedule:
    """The learning rate of the update that follows `step` applied updates, as a float32 scalar.

    Update 0 has peak / warmup, update warmup - 1 the peak; the decay starts from the peak and reaches its end at
    `total_steps`, one past the last update, so that neither the first nor the last update is spent on a rate of 0.
    """
    if not (math.isfinite(peak_lr) and peak_lr > 0):
        raise UserError(f"optim.peak_lr must be a positive number, got {peak_lr}")
    warmup, stay, decay = config.spans(total_steps)
    shape = "cosine" if config.kind == "cosine" else config.decay_shape if config.kind == "wsd" else "linear"

    def rate(step: jax.Array | int) -> jax.Array:
        done = jnp.asarray(step, jnp.float32)
        rising = jnp.minimum(1.0, (done + 1) / warmup) if warmup else jnp.float32(1.0)
        if config.kind == "inverse_sqrt":
            falling = jnp.maximum(config.final_fraction, jnp.sqrt(warmup / jnp.maximum(done + 1, warmup)))
        elif decay:
            progress = jnp.clip((done - warmup - stay) / decay, 0.0, 1.0)
            falling = config.final_fraction + (1 - config.final_fraction) * _remaining(shape, progress)
        else:
            falling = jnp.float32(1.0)
        return peak_lr * jnp.where(done < warmup, rising, falling)

    return rate


def _remaining(shape: str, progress: jax.Array) -> jax.Array:
    """1 at progress 0, 0 at progress 1."""
    if shape == "cosine":
        return 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return 1 - jnp.sqrt(progress) if shape == "sqrt" else 1 - progress
