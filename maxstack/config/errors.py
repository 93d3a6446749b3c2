"""The two ways in which a request ends badly; each is a message without a traceback and an exit code."""

from contextvars import ContextVar
from pathlib import Path


class UserError(ValueError):
    """The request was wrong: the message says what, where and how to fix it. The command line exits with 2."""


class RunError(RuntimeError):
    """It failed while running (disk full, out of memory, …): what, where, how to fix. The command line exits with 1."""


_fault_folder: ContextVar[Path | None] = ContextVar("fault_folder", default=None)


def log_faults_in(folder: str | Path) -> None:
    """From here on in this process, the command line writes the traceback of a fault to `error.log` in that folder."""
    _fault_folder.set(Path(folder))


def fault_folder() -> Path | None:
    """The folder that `log_faults_in` named, if it was called."""
    return _fault_folder.get()
