"""Ctrl-C and SIGTERM: the first asks the run to save and leave, a second Ctrl-C leaves at once."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
GRACE_S = 2.0
"""How long what holds nothing to save may take to leave in order (seconds)."""


class Stopped(BaseException):
    """The request to stop came when there was nothing to save yet."""


class StopRequest:
    """While entered, turns SIGINT and SIGTERM into a flag that the loop reads between steps.

    A handler in Python waits while the main thread is in compiled code, and XLA compiles for minutes. So a thread
    listens as well; it ends the process where the main thread cannot.
    """

    def __init__(self) -> None:
        self.reason = ""
        """The signal's name once one has come."""
        self._before: dict[int, Any] = {}
        self._at_once = False
        self._left = threading.Event()
        self.agreed = False
        """Whether all processes have learnt that one of them was asked to stop."""

    def __enter__(self) -> Self:
        listening, self._sending = socket.socketpair()
        self._sending.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._sending.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        threading.Thread(target=self._listen, args=(listening,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._left.set()
        self._sending.close()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, there is nothing to save: a request raises Stopped, one from before as well."""
        self._at_once = True
        try:
            if self.reason:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def requested(self) -> bool:
        """Whether any process has been asked to stop: all of them leave after the same step.

        With several processes that is so once the votes of a step have come back (agreement.py).
        """
        import jax

        return bool(self.reason) if jax.process_count() == 1 else self.agreed

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.reason = not self.reason, self.reason or signal.Signals(number).name
        if first and self._at_once:
            raise Stopped

    def _listen(self, listening: socket.socket) -> None:
        first = True
        with listening:
            while received := listening.recv(64):
                for number in received:
                    if number in SIGNALS:
                        self._came(signal.Signals(number), first)
                        first = False

    def _came(self, number: signal.Signals, first: bool) -> None:
        if first:
            _say(f"{number.name}: {'leaving' if self._at_once else 'saving, then leaving'}")
            if self._at_once and not self._left.wait(GRACE_S) and self._at_once:
                os._exit(0)
        elif number == signal.SIGINT:
            # Saves are committed by a rename, so leaving in the middle of one loses only that one.
            _say("stopped at once; the checkpoints committed so far are kept")
            os._exit(INTERRUPTED)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\nmaxstack: {text}\n".encode())
