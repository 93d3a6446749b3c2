"""manifest.json: size and SHA-256 of every file of a checkpoint.

It is written into the folder before the rename that commits it, so a committed checkpoint has one. A folder without it
(its file deleted, or written by Orbax alone) can be read and is called unverified.
"""

import hashlib
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FILE = "manifest.json"
# Orbax writes these two after the manifest; neither is needed to read the arrays.
_AFTERWARDS = {"_CHECKPOINT_METADATA", "commit_success.txt"}
# Reading and hashing leave the interpreter lock; with chunks of this size it is taken some 1,000 times a GB.
_CHUNK = 2**20
_NICENESS = 10


def write_manifest(folder: Path) -> None:
    """Describe every file below the folder, synced to disk."""
    paths = sorted(
        path for path in folder.rglob("*") if path.is_file() and _covered(path.relative_to(folder))
    )
    # In the background of training: few threads, and those give way to the ones that compute.
    with ThreadPoolExecutor(max_workers=max(1, _readers() // 2), initializer=_give_way) as pool:
        digests = list(pool.map(_digest, paths))
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    write_synced(folder / FILE, json.dumps({"layout": 1, "files": files}, indent=0))


def problems(folder: Path, how: str) -> tuple[str, ...] | None:
    """What is wrong with the files, each entry starting with the file's path; None if there is no manifest.

    `how` is "hash", "size" or "none".
    """
    path = folder / FILE
    if not path.exists():
        return None
    if how == "none":
        return ()
    try:
        files = json.loads(path.read_text())["files"]
        pairs = [(folder / name, entry, how) for name, entry in files.items()]
        with ThreadPoolExecutor(max_workers=_readers()) as pool:
            found = list(pool.map(_problem, pairs))
    except OSError as error:
        return (f"{path} cannot be read: {error.strerror or error}",)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return (f"{path} is damaged: {error!r}",)
    return tuple(problem for problem in found if problem)


def write_synced(path: Path, text: str) -> None:
    """Write a small file and wait until the disk has it."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _problem(task: tuple[Path, dict[str, Any], str]) -> str:
    path, entry, how = task
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path} has {size} bytes instead of {entry['bytes']}"
        if how == "hash" and _digest(path) != entry["sha256"]:
            return f"{path} has changed since it was written (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    return ""


def _digest(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def _covered(path: Path) -> bool:
    return path.as_posix() != FILE and path.as_posix() not in _AFTERWARDS


def _give_way() -> None:
    # Elsewhere than on Linux a priority belongs to the whole process.
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _readers() -> int:
    # More threads than this gain nothing on a disk.
    return min(8, os.cpu_count() or 1)
