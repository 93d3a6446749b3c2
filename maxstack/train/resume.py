"""Whether a checkpoint can go on as another run, and what differs."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maxstack import checkpoint
from maxstack.config import UserError, to_dict
from maxstack.train.run import RunConfig

log = logging.getLogger(__name__)

# What a run may differ in from one start to the next without a word.
FREE_PARTS = (
    "model",
    "data",
    "out",
    "telemetry",
    "checkpoint",
    "evaluation",
    "samples",
    "mesh",
    "micro_batches",
)


def check_resumable(run: RunConfig, directory: Path, step: int) -> None:
    """Raise UserError when a checkpoint holds another model or another kind of state than the run asks for."""
    meta = checkpoint.read_meta(directory, step)
    differing = sorted(differences(meta["model"], to_dict(run.model)))
    differing = [line for line in differing if not line.startswith(("dtype", "remat", "max_length"))]
    if differing:
        raise UserError(
            f"{directory} step {step} holds another model than this run asks for: {'; '.join(differing[:6])}. "
            "Give the run another --out, or the old model settings"
        )
    old, new = meta["run"]["optim"], to_dict(run)["optim"]
    if old["name"] != new["name"]:
        raise UserError(
            f"{directory} step {step} holds the state of optim.name {old['name']!r}; this run asks for "
            f"{new['name']!r}: give it another --out, or the old name"
        )


def keeps_average(directory: Path, step: int) -> bool:
    """Whether a checkpoint holds an average of the weights."""
    return checkpoint.read_meta(directory, step)["run"]["optim"]["ema_decay"] > 0


def tell_changes(saved: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Log the settings that differ from the run that saved; they hold from here on."""
    changed = [line for line in differences(saved, run) if not line.startswith(FREE_PARTS)]
    if changed:
        log.warning("resuming with other settings, which hold from here on: %s", "; ".join(changed))


def differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """Where two plain trees differ, as "place: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{place}.{index}")
    elif old != new:
        yield f"{place}: {old!r} -> {new!r}"
