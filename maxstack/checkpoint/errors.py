"""What goes wrong with a checkpoint, said so that the reader knows what to do."""

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

from maxstack.config import RunError

# What a failing disk raises through Orbax: tensorstore's statuses arrive as ValueError, JAX's as RuntimeError.
STORAGE_ERRORS = (OSError, ValueError, RuntimeError, KeyError)

_FULL = ("no space left", "disk quota", "resource_exhausted", "file too large", "enospc", "edquot", "efbig")
_DENIED = ("permission denied", "read-only file system", "operation not permitted", "permission_denied")


class CheckpointError(RunError):
    """A checkpoint cannot be written or read. `step` names it, `good_step` an older one that can be read."""

    def __init__(self, message: str, *, step: int | None = None, good_step: int | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.good_step = good_step


class NewerLayout(CheckpointError):
    """A later version wrote the checkpoint; it may well be whole."""


def save_failed(directory: Path, step: int, kept: Sequence[int], error: BaseException) -> CheckpointError:
    """The error for a save that did not succeed, by its cause; `kept` are the checkpoints that are still there."""
    text = str(error).lower()
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(word in text for word in _FULL):
        free = shutil.disk_usage(existing(directory)).free / 2**20
        cause = f"the disk is full or a limit is reached ({free:,.1f} MiB free there)"
        advice = "free some space or lower checkpoint.keep_last, then start the same run again"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS) or any(word in text for word in _DENIED):
        cause = "writing there is not permitted"
        advice = "give back the permission to write, or choose another folder with --out"
    else:
        cause = first_line(error)
        advice = "the traceback in the log says where"
    intact = (
        f"checkpoints {', '.join(map(str, kept))} are untouched" if kept else "there is no earlier checkpoint"
    )
    return CheckpointError(
        f"checkpoint {step} could not be saved in {directory}: {cause}; {intact}; {advice}", step=step
    )


def first_line(error: BaseException) -> str:
    """The type and the first line of an error, at most 300 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def existing(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
