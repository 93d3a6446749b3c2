"""checkpoint.json: what a checkpoint is, readable without JAX, Orbax or the run file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from maxstack.checkpoint.errors import CheckpointError, NewerLayout

# Raised when a reader of the old layout would misread the new one.
LAYOUT = 1
FILE = "checkpoint.json"


class ArraySpec(NamedTuple):
    """Shape and dtype of a stored array; a random key is stored as its uint32 data."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything of a checkpoint but the arrays' contents."""

    layout: int = LAYOUT
    step: int
    time: str
    """When it was saved, UTC, ISO 8601."""
    versions: dict[str, str]
    metrics: dict[str, float]
    meta: dict[str, Any]
    """What the caller gave: run and model configuration, data position, …"""
    keys: dict[str, str]
    """Names that are random keys, with the generator's name."""
    arrays: dict[str, ArraySpec]

    def text(self) -> str:
        """As JSON. Raises TypeError naming what cannot be written."""
        try:
            return json.dumps(
                asdict(self) | {"arrays": {name: list(spec) for name, spec in self.arrays.items()}}
            )
        except TypeError as error:
            raise TypeError(f"the meta of a checkpoint must be plain JSON values: {error}") from error


def read_record(folder: Path) -> Record:
    """The record of one checkpoint folder. Raises CheckpointError: missing, damaged, or of a newer layout."""
    path = folder / FILE
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: {folder} is no checkpoint, or part of it is lost"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    refuse_newer(folder)
    try:
        arrays = {name: ArraySpec(tuple(shape), dtype) for name, (shape, dtype) in raw["arrays"].items()}
        return Record(
            layout=int(raw["layout"]),
            step=int(raw["step"]),
            time=raw["time"],
            versions=raw["versions"],
            metrics=raw["metrics"],
            meta=raw["meta"],
            keys=raw["keys"],
            arrays=arrays,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def refuse_newer(folder: Path) -> None:
    """Raise NewerLayout if only a later version can read the checkpoint; damage is not looked for."""
    try:
        raw = json.loads((folder / FILE).read_text())
        layout = raw["layout"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if isinstance(layout, int) and layout > LAYOUT:
        raise NewerLayout(
            f"{folder} has checkpoint layout {layout}, this maxstack reads up to {LAYOUT}; "
            f"it was written by {_versions(raw)}: install that version or a later one"
        )


def _versions(raw: Mapping[str, Any]) -> str:
    versions = raw.get("versions")
    if not isinstance(versions, dict) or not versions:
        return "an unknown version"
    return ", ".join(f"{name} {version}" for name, version in versions.items())
