"""Ctrl-C and SIGTERM: the first asks the loop to save and leave, a second Ctrl-C leaves at once."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import numpy as np

INTERRUPTED = 130


class StopRequest:
    """While entered, turns SIGINT and SIGTERM into a flag that the loop reads between steps."""

    def __init__(self) -> None:
        self.reason = ""
        """The signal's name once one has come."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.reason and number == signal.SIGINT:
            # Saves are committed by a rename, so leaving in the middle of one loses only that one.
            os.write(
                sys.stderr.fileno(),
                b"\nmaxstack: stopped at once; the checkpoints committed so far are kept\n",
            )
            os._exit(INTERRUPTED)
        if not self.reason:
            os.write(sys.stderr.fileno(), f"\nmaxstack: {name}: saving, then leaving\n".encode())
        self.reason = name

    def requested(self) -> bool:
        """Whether any process has been asked to stop: all of them leave after the same step."""
        if jax.process_count() == 1:
            return bool(self.reason)
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(bool(self.reason)))))
