"""One line a request, written by a thread of its own: a full disk costs lines, never a request."""

import contextlib
import datetime
import json
import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

Form = Literal["json", "text"]
WAITING = 10_000
"""Lines that may wait for the disk; more are dropped and counted."""
CLOSE_S = 2.0
KEPT = 5
"""Rotated files: NAME.1 is the newest of them."""


class RequestLog:
    """Lines to a file, or to a file descriptor. `write` neither waits nor raises."""

    def __init__(
        self, place: Path | int, form: Form = "json", *, rotate_bytes: int = 0,
        finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: record,
    ):  # fmt: skip
        """`rotate_bytes` is the size at which a file is put aside, 0 for never. `finish` completes a record, in the
        thread."""
        self._place, self._form, self._rotate_bytes, self._finish = place, form, rotate_bytes, finish
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING)
        self._file: int | None = None
        self._torn = self._failing = False
        self.written = self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="maxstack-log", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """Log a request."""
        try:
            self._lines.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what waits, for a moment at most."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (record := self._lines.get()) is not None:
            line = self._line(self._finish(record))
            try:
                self._put(line.encode("utf-8", "backslashreplace"))
            except OSError as error:
                self.dropped += 1
                self._let_go()
                if not self._failing:
                    log.warning(
                        "the request log %s cannot be written: %s; lines are dropped",
                        self._place,
                        error.strerror,
                    )
                self._failing = True
            else:
                self.written += 1
                if self._failing:
                    log.warning(
                        "the request log %s is written again; %d lines are missing", self._place, self.dropped
                    )
                self._failing = False
        self._let_go()

    def _line(self, record: dict[str, Any]) -> str:
        if self._form == "json":
            return json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=str)
        words = (f"{name}={_word(value)}" for name, value in record.items() if name not in ("time", "id"))
        return " ".join([str(record.get("time", "")), str(record.get("id", "")), *words])

    def _put(self, line: bytes) -> None:
        """Write a line whole; after one that was cut off, a new one is begun."""
        if isinstance(self._place, int):
            os.write(self._place, line + b"\n")
            return
        if self._file is None:
            self._file = os.open(self._place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        left = b"\n" * self._torn + line + b"\n"
        self._torn = True
        while left:
            left = left[os.write(self._file, left) :]
        self._torn = False
        if self._rotate_bytes and os.fstat(self._file).st_size >= self._rotate_bytes:
            self._rotate(self._place)

    def _rotate(self, file: Path) -> None:
        self._let_go()
        for number in range(KEPT - 1, 0, -1):
            older = file.with_name(f"{file.name}.{number}")
            if older.exists():
                older.replace(file.with_name(f"{file.name}.{number + 1}"))
        file.replace(file.with_name(f"{file.name}.1"))

    def _let_go(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


def timestamp(seconds: float) -> str:
    """A point in time, as logs have it."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")


def _word(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    return json.dumps(text, ensure_ascii=False) if not text or " " in text or "\n" in text else text
