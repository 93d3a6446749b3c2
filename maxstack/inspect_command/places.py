"""What lies at a path."""

import dataclasses
from pathlib import Path
from typing import Literal

from maxstack.checkpoint import record
from maxstack.checkpoint.folder import complete_steps, half_written
from maxstack.config import UserError
from maxstack.data.store import META

Kind = Literal["run", "checkpoints", "checkpoint", "data", "data set", "shard", "run file", "model folder"]

KNOWN = (
    "a run folder, a checkpoint, a folder of checkpoints, a prepared data folder or a file in it, "
    "a folder with *.safetensors, or a run file (.py)"
)


@dataclasses.dataclass(frozen=True)
class Place:
    """A path and what it is."""

    kind: Kind
    path: Path


def place_of(path: Path) -> Place:
    """What lies at `path`. Raises UserError for nothing, or nothing known."""
    if not path.exists():
        near = sorted(other.name for other in path.parent.glob("*")) if path.parent.is_dir() else []
        hint = f"; in {path.parent} there is {', '.join(near[:8])}" if near else ""
        raise UserError(f"{path}: no such file or folder{hint}")
    kind = _folder_kind(path) if path.is_dir() else _file_kind(path)
    if kind is None:
        raise UserError(f"{path}: not something maxstack inspect knows. Give it {KNOWN}")
    return Place(kind, path)


def _file_kind(path: Path) -> Kind | None:
    if path.suffix == ".py":
        return "run file"
    if path.suffix == ".safetensors":
        return "model folder"
    return "shard" if (path.parent / META).is_file() and path.suffix == ".bin" else None


def _folder_kind(path: Path) -> Kind | None:
    if (path / record.FILE).is_file():
        return "checkpoint"
    if (path / "checkpoints").is_dir() or (path / "run.py").is_file():
        return "run"
    if complete_steps(path) or half_written(path):
        return "checkpoints"
    if (path / META).is_file():
        return "data"
    if any(path.glob("*.safetensors")):
        return "model folder"
    return "data set" if any((child / META).is_file() for child in path.iterdir()) else None
