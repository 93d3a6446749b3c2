"""A JAX profiler trace of a window of steps."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from maxstack.config import UserError


def parse_window(window: str) -> tuple[int, int] | None:
    """ "A:B" as (A, B), both traced; None for "". Raises UserError for anything else."""
    if not window:
        return None
    first, colon, last = window.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(
            f"telemetry.profile must be A:B with steps 1 <= A <= B, such as 10:12, got {window!r}"
        )
    return int(first), int(last)


class Profiler:
    """Traces the steps of a window; does nothing for the window ""."""

    def __init__(self, window: str, folder: str | Path):
        self._window = parse_window(window)
        self._folder = Path(folder)
        self._running = False

    def before(self, step: int) -> None:
        """Call before step `step` starts (the first is 1)."""
        if self._window and not self._running and self._window[0] <= step <= self._window[1]:
            import jax

            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, wait: Callable[[], object] | None = None) -> None:
        """Call when step `step` was dispatched. `wait` is called at the window's end only, to trace it whole."""
        if self._window and self._running and step >= self._window[1]:
            if wait is not None:
                wait()
            self.close()
            self._window = None

    def close(self) -> None:
        """End a trace that is still running."""
        if self._running:
            import jax

            self._running = False
            jax.profiler.stop_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
