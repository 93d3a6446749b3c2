"""A file that is open for reading at any place, and knows how long it was when it was opened."""

import math
import os
import stat
from pathlib import Path

import numpy as np

from maxstack.config import RunError, UserError
from maxstack.models.files.source import aligned, dtype_of

# Linux reads at most 2 GiB less a page at a time.
_AT_A_TIME = 1 << 30


class OpenedFile:
    """Bytes of one regular file by offset; several threads may read at once.

    Raises UserError when there is no such file or it is none (a pipe would be waited on for ever).
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{path} cannot be opened: {error.strerror}") from error
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise UserError(
                f"{path} is not a file; give a .safetensors or .gguf file, or the folder of a model"
            )
        self.size: int = status.st_size

    def fill(self, offset: int, target: np.ndarray) -> None:
        """Read `target.size` bytes (uint8, contiguous) from an offset."""
        view = memoryview(target)
        while view:
            try:
                count = os.preadv(self._descriptor, [view[:_AT_A_TIME]], offset)
            except OSError as error:
                raise RunError(f"cannot read {self.path}: {error.strerror}") from error
            if count == 0:
                raise self.damaged(
                    f"it ends at byte {offset}, inside a tensor; it got shorter while it was open"
                )
            view, offset = view[count:], offset + count

    def text(self, offset: int, length: int) -> bytes:
        """Some bytes as such; fewer at the end of the file."""
        length = max(0, min(length, self.size - offset))
        buffer = np.empty(length, np.uint8)
        self.fill(offset, buffer)
        return buffer.tobytes()

    def array(self, offset: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """An array that lies in the file as it does in memory."""
        kind = dtype_of(dtype)
        buffer = aligned(math.prod(shape) * kind.itemsize)
        self.fill(offset, buffer)
        if kind == np.bool_:  # any other byte than 0 and 1 is undefined behaviour as a bool
            return (buffer != 0).reshape(shape)
        return buffer.view(kind).reshape(shape)

    def damaged(self, what: str) -> UserError:
        """The error for content that cannot be so."""
        return UserError(f"{self.path} is damaged: {what}. Fetch or export the file again")

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
