"""A command on a terminal of its own, as a person at a keyboard has it."""

import codecs
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

# Makes the given terminal the process's own, so that Ctrl-C reaches it.
ADOPT = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|[\x01\x02]")
PATIENCE_S = 120
RETRY_S = 10


class Terminal:
    """`python -m maxstack …` behind a pseudo-terminal."""

    def __init__(self, *words: str | Path, state: Path, **environment: str):
        ours, theirs = pty.openpty()
        python = [sys.executable, "-m", "maxstack", *map(str, words)]
        kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "NO_COLOR")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", ADOPT, *python],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, close_fds=True,
            env={**kept, "TERM": "xterm", "XDG_STATE_HOME": str(state), **environment},
        )  # fmt: skip
        os.close(theirs)
        self._terminal, self.raw = ours, ""
        # A read may end within a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._terminal)

    @property
    def text(self) -> str:
        """All that was shown, without escapes."""
        return ESCAPES.sub("", self.raw).replace("\r\n", "\n")

    def until(self, pattern: str, *, patience_s: float = PATIENCE_S) -> str:
        """Waits for something to be shown that was not waited for before; returns what was shown up to its end."""
        limit = time.monotonic() + patience_s
        while not (found := re.compile(pattern).search(self.text, self._read)):
            if not self._more(limit - time.monotonic()):
                raise AssertionError(f"{pattern!r} was not shown, but {self.text[self._read :]!r}")
        shown, self._read = self.text[self._read : found.end()], found.end()
        return shown

    def ctrl_c_at_prompt(self, pattern: str) -> str:
        """Presses Ctrl-C until it is seen: CPython overlooks a signal between the prompt and its select()."""
        for _ in range(PATIENCE_S // RETRY_S):
            self.press("\x03")
            try:
                return self.until(pattern, patience_s=RETRY_S)
            except AssertionError:
                continue
        return self.until(pattern)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._terminal, keys.encode())

    def ended(self, keys: str = "") -> int:
        """Waits for the end, which `keys` may bring about; the exit code."""
        for _ in range(PATIENCE_S // RETRY_S):
            if keys:
                self.press(keys)
            limit = time.monotonic() + RETRY_S
            while self._more(limit - time.monotonic()):
                pass
            if time.monotonic() < limit:  # nothing more can come
                break
        return self._process.wait(timeout=PATIENCE_S)

    def terminated(self) -> int:
        """Ends it as a system that shuts down does, again if need be, as in `ctrl_c_at_prompt`; the exit code."""
        for _ in range(PATIENCE_S // RETRY_S):
            self._process.terminate()
            limit = time.monotonic() + RETRY_S
            while self._more(limit - time.monotonic()):
                pass
            if time.monotonic() < limit:
                break
        return self._process.wait(timeout=PATIENCE_S)

    def _more(self, seconds: float) -> bool:
        if not select.select([self._terminal], [], [], max(0, seconds))[0]:
            return False
        try:
            found = os.read(self._terminal, 65536)
        except OSError:  # the other end was closed
            return False
        self.raw += self._decoder.decode(found)
        return bool(found)
