"""Files that appear under their names when all of them are written, or not at all."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from maxstack.config import RunError, UserError, cannot_write

_AT_A_TIME = 1 << 20


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A hidden folder inside `folder`; what was written there when the block ends is moved out, in order of name.

    After an exception nothing is moved. Either way the hidden folder goes, and with it what killed writers left.
    Raises UserError when a file is in the way, RunError when the disk is full or the folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file where a folder is needed; choose another name")
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(folder)
        partial = Path(tempfile.mkdtemp(prefix=".weights.", suffix=".partial", dir=folder))
        lock = _lock(partial)
        try:
            yield partial
            _publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        raise RunError(cannot_write(Path(error.filename or folder), error)) from error
    finally:
        if fresh:
            with suppress(OSError):
                folder.rmdir()  # only if it is empty


def _publish(partial: Path, folder: Path) -> None:
    files = sorted(partial.iterdir())
    for path in files:
        _sync(path)
    for path in files:
        path.replace(folder / path.name)
    _sync(folder)


def _lock(folder: Path) -> int:
    """Held while its writer lives; the kernel lets it go with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _clear_abandoned(folder: Path) -> None:
    for path in folder.glob(".weights.*.partial"):
        with suppress(OSError):  # its writer is alive, or another process clears it
            lock = _lock(path)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pieces(array: np.ndarray, multiple: int = 1) -> Iterator[np.ndarray]:
    """The elements in order, flat and contiguous, about a MB at a time, each piece a multiple of so many elements.

    A transposed view is copied piece by piece, never as a whole. Only the last piece may be short of a multiple.
    """
    count = max(_AT_A_TIME // array.itemsize // multiple, 1) * multiple
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        for start in range(0, flat.size, count):
            yield flat[start : start + count]
        return
    row = array[0].size
    rows = max(count // row, 1) if row % multiple == 0 else len(array)
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows]).reshape(-1)
