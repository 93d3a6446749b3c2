"""A folder that is either there and whole, or not there.

`build_once` fills a hidden folder beside the target and renames it. Killed at any moment, it leaves at most the hidden
folder, which nobody reads and the next builder removes. Several processes that want the same target wait for one
builder: the lock is the kernel's (flock), so that a killed process holds none.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from maxstack.config import RunError

log = logging.getLogger(__name__)


def build_once(target: Path, build: Callable[[Path], None]) -> bool:
    """Make `target` by `build(folder)` unless it exists; True if this call built it.

    Raises RunError when the disk is full or the folder cannot be written.
    """
    if target.exists():
        return False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.lock"):
            if target.exists():
                return False
            for stale in target.parent.glob(f".{target.name}.*.partial"):
                shutil.rmtree(stale, ignore_errors=True)
            _build(target, build)
    except OSError as error:
        raise RunError(_explain(target, error)) from error
    return True


def _build(target: Path, build: Callable[[Path], None]) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        build(partial)
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        partial.chmod(0o755)  # mkdtemp makes it private; a shared cache is read by others
        os.rename(partial, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info(
                "waiting for another process that prepares %s", path.name.strip(".").removesuffix(".lock")
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(target: Path, error: OSError) -> str:
    named = Path(error.filename) if error.filename else target
    if not (named.is_relative_to(target.parent) or target.is_relative_to(named)):
        return f"cannot read {error.filename}: {error.strerror or error}"
    existing = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    return (
        f"cannot write {target}: {error.strerror or error} ({free / 2**20:.0f} MiB free there); "
        "free some space or set another folder with `data.cache` or $MAXSTACK_CACHE"
    )
