"""Files and folders that are whole or not there, and faults of writing them that say where."""

import errno
import os
from pathlib import Path

from maxstack.config.errors import RunError, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def result_folder(path: Path, setting: str) -> Path:
    """Make the folder for results that `setting` (such as "--out") named, unless it is there.

    Raises UserError where no folder can be, and where this process may not write; RunError when the disk is full.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _FULL:
            raise RunError(cannot_write(path, error)) from error
        reason = "a file is in the way" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"{path} cannot be made a folder: {reason}; choose another with {setting}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} is not ours to write in; change its permissions, or choose another with {setting}"
        )
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file as a whole: readers and crashes see the old content or the new. RunError says why it failed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise RunError(cannot_write(path, error)) from error
    finally:
        partial.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> str:
    """What failed, where, and what to do about it."""
    if error.errno in _FULL:
        advice = "free some space, or choose another folder"
    elif isinstance(error, IsADirectoryError):
        advice = "move that folder out of the way"
    else:
        advice = "change its permissions, or choose another folder"
    return f"cannot write {path}: {error.strerror}; {advice}, and run the same command again"
