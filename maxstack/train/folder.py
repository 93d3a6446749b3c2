"""The folder of a run: there, ours to write in, and no other process's at the same time."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from maxstack.config import UserError, result_folder

log = logging.getLogger(__name__)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it meanwhile. Raises UserError when one is in it already.

    The lock is the kernel's: a killed process holds none.
    """
    result_folder(folder, "--out")
    result_folder(folder / "checkpoints", "--out")
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process trains into {folder}: wait for it, stop it, or give this run another --out"
            ) from error
        except OSError as error:  # a network disk without locks
            log.warning(
                "%s cannot be locked (%s): see that no other run writes there", folder, error.strerror
            )
        yield
