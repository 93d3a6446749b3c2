"""Files of one JSON object a line that survive kill -9 and go on where a resumed run does."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from maxstack.config import RunError, cannot_write, write_atomically

Row = dict[str, Any]


class MetricsFile:
    """Appends rows to a file, each with one system call: whatever ends the process, only the last row can be torn.

    Opening it drops a torn last line. With `resume_step` it drops rows whose `step` is greater: the resumed run will
    write those again. `dropped` holds them. The file is replaced as a whole, so a crash in between loses nothing.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None):
        self.path = Path(path)
        self.dropped: list[Row] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            self._reopen(resume_step)
        try:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(cannot_write(self.path, error)) from error

    def _reopen(self, resume_step: int | None) -> None:
        content = self.path.read_bytes()
        kept = []
        for line in content.splitlines(keepends=True):
            row = _parsed(line)
            if row is None:
                continue
            if resume_step is not None and isinstance(row.get("step"), int) and row["step"] > resume_step:
                self.dropped.append(row)
            else:
                kept.append(line)
        if (whole := b"".join(kept)) != content:
            write_atomically(self.path, whole)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row. Raises RunError, leaving no torn line behind, where the system refuses the write."""
        data = encode(row).encode() + b"\n"
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            if written < len(data):  # the disk filled up in the middle; the rest tells how
                os.write(self._file, data[written:])
        except OSError as error:
            os.ftruncate(self._file, size)
            raise RunError(cannot_write(self.path, error)) from error

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_rows(path: str | Path) -> Iterator[Row]:
    """The whole rows of such a file, numbers that JSON cannot hold put back; nothing for a file that is not there."""
    path = Path(path)
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        row = _parsed(line)
        if row is not None:
            yield _restored(row)


def encode(row: Mapping[str, Any]) -> str:
    """A row as valid JSON: NaN and infinities become null, and `non_finite` tells which ({"loss": "nan"})."""
    odd: dict[str, str] = {}
    plain = {key: _plain(value, str(key), odd) for key, value in row.items()}
    return json.dumps(plain | ({"non_finite": odd} if odd else {}), ensure_ascii=False, allow_nan=False)


def _parsed(line: bytes) -> Row | None:
    """The row of a line, None for a torn one (no newline at its end, cut JSON, zeros after a power cut)."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _plain(value: Any, name: str, odd: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}", odd) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}.{index}", odd) for index, item in enumerate(value)]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        value = value.item()  # a NumPy or JAX scalar
    if isinstance(value, float) and not math.isfinite(value):
        odd[name] = str(value)
        return None
    return str(value) if isinstance(value, Path) else value


def _restored(row: Row) -> Row:
    """The inverse of `encode`, for numbers at the top and in nested objects."""
    for name, text in row.pop("non_finite", {}).items():
        node, parts = row, name.split(".")
        while parts:
            # A key may itself contain dots: take the longest that is there.
            size = next(
                (
                    n
                    for n in range(len(parts), 0, -1)
                    if isinstance(node, dict) and ".".join(parts[:n]) in node
                ),
                0,
            )
            if not size:
                break
            key, parts = ".".join(parts[:size]), parts[size:]
            if parts:
                node = node[key]
            else:
                node[key] = float(text)
    return row
