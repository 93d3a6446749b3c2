"""Reading a GGUF header from front to back, in memory that follows what is really there."""

import struct

import numpy as np

from maxstack.config import UserError
from maxstack.models.files.opened import OpenedFile

# The largest vocabularies in use make headers of about 20 MB with 1.5 million values.
MOST_BYTES = 1 << 27
MOST_VALUES = 1 << 23
MOST_TEXT = 1 << 24
_CHUNK = 1 << 20

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


class Cursor:
    """A place in the header. Every method raises UserError rather than read past the end or more than the caps."""

    def __init__(self, file: OpenedFile):
        self.file, self.position = file, 0
        self._buffer, self._values = b"", 0

    def take(self, form: struct.Struct) -> int | float:
        """One number."""
        start = self._advance(form.size)
        return form.unpack_from(self._buffer, start)[0]

    def u32(self) -> int:
        return int(self.take(U32))

    def u64(self) -> int:
        return int(self.take(U64))

    def text(self, what: str, most: int = MOST_TEXT) -> str:
        """A text with its length before it."""
        length = self.u64()
        if length > most:
            raise self.file.damaged(
                f"{what} claims {length:,} bytes of text; {most:,} is the most there can be"
            )
        start = self._advance(length)
        try:
            return self._buffer[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.file.damaged(f"{what} is no UTF-8 text ({error.reason})") from error

    def texts(self, what: str, count: int) -> list[str]:
        """So many texts; counted before this."""
        # A vocabulary has a million: this is `text` without its calls, where both parts are in the buffer.
        found, buffer, position = [], self._buffer, self.position
        for _ in range(count):
            start = position + 8
            end = start + int.from_bytes(buffer[position:start], "little")
            if end <= len(buffer) and start <= len(buffer):
                try:
                    found.append(buffer[start:end].decode())
                    position = end
                    continue
                except UnicodeDecodeError:
                    pass  # `text` says so
            self.position = position
            found.append(self.text(what))
            buffer, position = self._buffer, self.position
        self.position = position
        return found

    def numbers(self, dtype: np.dtype, count: int) -> np.ndarray:
        """So many numbers; counted before this."""
        start = self._advance(count * dtype.itemsize)
        return np.frombuffer(self._buffer, dtype, count, start)

    def count(self, what: str, count: int, least_bytes: int, most: int = MOST_VALUES) -> int:
        """Check a claimed number of things, each of which takes so many bytes, before there is a loop over it."""
        left = self.file.size - self.position
        if count * least_bytes > left:
            raise self.file.damaged(f"{what} claims {count:,} entries; {left:,} bytes are left for them")
        self._values += count
        if count > most or self._values > MOST_VALUES:
            raise UserError(
                f"{self.file.path}: its header has {count:,} entries in {what}; none that is in use comes near. "
                f"At most {most:,}, and {MOST_VALUES:,} in all, are read"
            )
        return count

    def _advance(self, length: int) -> int:
        """Step over so many bytes, which are in the buffer then; returns where they begin in it."""
        start, end = self.position, self.position + length
        if end > len(self._buffer):
            self._grow(end)
        self.position = end
        return start

    def _grow(self, end: int) -> None:
        if end > self.file.size:
            raise self.file.damaged(f"it ends at byte {self.file.size:,}, inside its header")
        if end > MOST_BYTES:
            raise UserError(
                f"{self.file.path}: its header has more than {MOST_BYTES:,} bytes; none that is in use comes near. "
                "It is not read"
            )
        have = len(self._buffer)
        self._buffer += self.file.text(have, max(end - have, have, _CHUNK))
