"""The folder of checkpoints of one run: which there are, which are kept, what is cleared away.

00000200/  00000400/                 checkpoints, by step
00000600.orbax-checkpoint-tmp/       half-written: never read, removed by the next run that saves
00000100.deleting/                   being deleted: likewise
set_aside/00000600.0/                a later step than the one the run went back to; never deleted
"""

import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from maxstack.checkpoint import manifest, record
from maxstack.checkpoint.config import CheckpointConfig
from maxstack.checkpoint.errors import CheckpointError

log = logging.getLogger(__name__)

TEMPORARY = ".orbax-checkpoint-tmp"
_DELETING = ".deleting"
_SET_ASIDE = "set_aside"


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / f"{step:08d}"


def complete_steps(directory: Path) -> list[int]:
    """Steps with a committed checkpoint, in order; whether its files are intact is not looked at here."""
    if not directory.is_dir():
        return []
    folders = (path for path in directory.iterdir() if re.fullmatch(r"\d{8,}", path.name) and path.is_dir())
    return sorted(int(path.name) for path in folders if _committed(path))


def half_written(directory: Path) -> list[Path]:
    """Folders that a killed process left: not committed, or not fully deleted."""
    if not directory.is_dir():
        return []
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_dir()
        and (
            TEMPORARY in path.name
            or path.name.endswith(_DELETING)
            or (re.fullmatch(r"\d{8,}", path.name) and not _committed(path))
        )
    )


def locate(path: Path, step: int | None = None) -> Path:
    """The folder of one checkpoint, given it, the folder of checkpoints, or the run's folder.

    Raises CheckpointError that lists the steps there are.
    """
    if step is None and (path / record.FILE).exists():
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = complete_steps(directory)
    if not steps:
        found = f" (only half-written: {half_written(directory)[0].name})" if half_written(directory) else ""
        raise CheckpointError(f"there is no checkpoint in {directory}{found}")
    if step is not None and step not in steps:
        raise CheckpointError(
            f"there is no checkpoint of step {step} in {directory}; there are {steps}", step=step
        )
    return step_folder(directory, steps[-1] if step is None else step)


def clear_half_written(directory: Path) -> None:
    """Remove what a killed process left in the folder. Only the process that saves there may call this."""
    for path in half_written(directory):
        if path.name.endswith(_DELETING) or TEMPORARY in path.name:
            log.warning("removing %s: a save or a deletion there was interrupted", path)
            shutil.rmtree(path, ignore_errors=True)


def set_aside(directory: Path, step: int) -> None:
    """Move checkpoints of this step and later ones out of the way: the run went back and writes its own."""
    later = [
        path for path in directory.iterdir() if re.fullmatch(r"\d{8,}", path.name) and int(path.name) >= step
    ]
    for path in sorted(later):
        shelf = directory / _SET_ASIDE
        shelf.mkdir(exist_ok=True)
        number = sum(1 for other in shelf.iterdir() if other.name.startswith(f"{path.name}."))
        target = shelf / f"{path.name}.{number}"
        log.warning(
            "the run saves step %d anew; %s is set aside as %s, nothing deletes it", step, path.name, target
        )
        path.rename(target)


def kept(metrics: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> set[int]:
    """Which steps stay, given the metrics of each: the last ones, every so many, the best.

    A step whose metric is absent or not finite does not rank among the best.
    """
    steps = sorted(metrics)
    keep = set(steps[-config.keep_last :])
    if config.keep_every:
        keep |= {step for step in steps if step % config.keep_every == 0}
    return keep | set(ranked(metrics, config)[: config.keep_best])


def ranked(metrics: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> list[int]:
    """Steps from best to worst by the configured metric; of equals the earlier one first, so that it stays."""
    values = {step: values.get(config.best_metric) for step, values in metrics.items()}
    sign = 1 if config.best_mode == "min" else -1
    finite = [
        (sign * value, step) for step, value in values.items() if value is not None and math.isfinite(value)
    ]
    return [step for _, step in sorted(finite)]


def prune(directory: Path, config: CheckpointConfig) -> None:
    """Delete what the configuration does not keep. A checkpoint that cannot be described is left alone."""
    metrics = {}
    for step in complete_steps(directory):
        try:
            metrics[step] = record.read_record(step_folder(directory, step)).metrics
        except CheckpointError as error:
            log.warning("checkpoint %d is left alone: %s", step, error)
    for step in sorted(set(metrics) - kept(metrics, config)):
        _delete(step_folder(directory, step))


def sync(directory: Path) -> None:
    """Wait until the disk has the folder's entries, so that a committed checkpoint survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_first(steps: Sequence[int]) -> list[int]:
    """The order in which a good checkpoint is looked for."""
    return sorted(steps, reverse=True)


def _delete(path: Path) -> None:
    # Renamed first: killed in between, it does not look like a damaged checkpoint.
    doomed = path.with_name(path.name + _DELETING)
    try:
        path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        log.warning("the old checkpoint %s could not be deleted: %s", path, error.strerror or error)


def _committed(path: Path) -> bool:
    return (path / record.FILE).exists() or (path / manifest.FILE).exists()
