"""Checkpoints: Orbax writes and reads arrays; names, manifest, retention, faults are ours. See docs/checkpoints.md."""

from maxstack.checkpoint.account import Account
from maxstack.checkpoint.checkpoints import Checkpoints
from maxstack.checkpoint.config import CheckpointConfig
from maxstack.checkpoint.errors import CheckpointError
from maxstack.checkpoint.folder import locate
from maxstack.checkpoint.names import flatten, like, named, unflatten
from maxstack.checkpoint.record import ArraySpec, Record
from maxstack.checkpoint.restore import check, describe, read_arrays, read_meta, restore_partial

__all__ = [
    "Account",
    "ArraySpec",
    "CheckpointConfig",
    "CheckpointError",
    "Checkpoints",
    "Record",
    "check",
    "describe",
    "flatten",
    "like",
    "locate",
    "named",
    "read_arrays",
    "read_meta",
    "restore_partial",
    "unflatten",
]
