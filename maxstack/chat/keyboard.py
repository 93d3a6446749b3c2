"""Lines from a terminal, with editing and history, or from a pipe; what Ctrl-C means at each moment."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from io import TextIOBase
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

from maxstack.config import UserError

BLOCK = '"""'
REMEMBERED = 1000
"""Lines that the history file keeps."""


class CtrlC(KeyboardInterrupt):
    """Ctrl-C, and nothing else that ends a program, such as SIGTERM."""

    def __init__(self, line: str = ""):
        super().__init__()
        self.line = line
        """What had been typed."""


class Interrupts:
    """What Ctrl-C does. While an answer comes, it asks it to stop; before that and a second time, it raises CtrlC."""

    def __init__(self):
        self.asked, self._coming = False, False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """For as long as the program talks."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._signalled)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """For one answer."""
        self.asked = self._coming = False
        try:
            yield
        finally:
            self._coming = False

    def coming(self) -> None:
        """The answer has begun: from here on, it is stopped between two of its tokens."""
        self._coming = True

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._coming and not self.asked:
            self.asked = True
            return
        raise CtrlC(typed())


def typed() -> str:
    """What stands in the line that is being edited."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline else ""


@runtime_checkable
class Lines(Protocol):
    """Where lines come from."""

    def line(self, prompt: str) -> str:
        """One line. Raises EOFError when there are no more."""
        ...


class Keyboard:
    """Lines of a terminal. `history` is a file that outlives the program, or None."""

    def __init__(self, history: Path | None, words: Iterable[str] = ()):
        """`words` are what the tab key completes at the start of a line."""
        self._history, self._words, self._kept = history, tuple(words), 0

    def __enter__(self) -> "Keyboard":
        with contextlib.suppress(ImportError):  # not on every platform: lines without editing, then
            import readline

            readline.set_history_length(REMEMBERED)
            readline.set_completer_delims("\n")
            readline.set_completer(self._complete)
            editline = "libedit" in (readline.__doc__ or "")
            readline.parse_and_bind("bind ^I rl_complete" if editline else "tab: complete")
            if self._history is not None:
                with contextlib.suppress(OSError):
                    readline.read_history_file(self._history)
            self._kept = readline.get_current_history_length()
        return self

    def __exit__(self, *reason: Any) -> None:
        readline = sys.modules.get("readline")
        if readline is None:
            return
        readline.set_completer(None)
        new = readline.get_current_history_length() - self._kept
        if self._history is not None and new > 0:
            remember(readline, self._history, new)
        readline.clear_history()

    def line(self, prompt: str) -> str:
        """One line. Raises EOFError at Ctrl-D, CtrlC at Ctrl-C."""
        # Escapes do not count for the width of the line that is edited.
        return input(f"\x01\x1b[1;32m\x02{prompt}\x01\x1b[0m\x02" if "NO_COLOR" not in os.environ else prompt)

    def _complete(self, text: str, state: int) -> str | None:
        found = [word for word in self._words if word.startswith(text)] if text.startswith("/") else []
        return found[state] if state < len(found) else None


def remember(readline: Any, history: Path, new: int) -> None:
    """Add the newest lines to the history file, which only its owner may read. A disk that is full loses them."""
    with contextlib.suppress(OSError):
        history.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
        if hasattr(readline, "append_history_file"):
            readline.append_history_file(new, history)
        else:
            readline.write_history_file(history)


def history_file() -> Path:
    """Where lines are remembered: maxstack/chat_history below $XDG_STATE_HOME, which is ~/.local/state by default."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "maxstack" / "chat_history"


class Pipe:
    """Lines of a file or another program, without prompts."""

    def __init__(self, stream: TextIOBase):
        self._stream = stream

    def line(self, prompt: str) -> str:
        """One line. Raises EOFError at the end, UserError for what is no text."""
        try:
            line = self._stream.readline()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8: {error}") from error
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


def question(source: Lines) -> str:
    """One input, which may be several lines: each but the last ends in a backslash, or all stand between triple quotes.

    Raises EOFError when there is no more; what the end of a pipe cuts off is an input too.
    """
    line = source.line("> ")
    if line.lstrip().startswith(BLOCK):
        return block(source, line.lstrip().removeprefix(BLOCK))
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        try:
            line = source.line("… ")
        except EOFError:
            line = ""
    return "\n".join([*lines, line])


def block(source: Lines, line: str) -> str:
    """Lines up to the closing quotes, without these."""
    lines = []
    while not line.rstrip().endswith(BLOCK):
        lines.append(line)
        try:
            line = source.line("… ")
        except EOFError:
            return "\n".join(lines)
    return "\n".join([*lines, line.rstrip().removesuffix(BLOCK)]).strip("\n")
