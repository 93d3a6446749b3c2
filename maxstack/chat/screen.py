"""What is written where: answers to standard output, everything else beside them; styled on a terminal only."""

import sys
from collections.abc import Iterable
from io import TextIOBase
from typing import IO, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maxstack.chat.conversation import NEARLY_FULL, Figures
from maxstack.chat.reasoning import Piece
from maxstack.chat.rendered import Run

# Characters that would steer the terminal, were a model to say them: C0 but tab and newline, DEL, C1.
STEERING = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
STYLES = {"answer": "", "reasoning": "dim italic"}


class Screen:
    """Two consoles: answers and asked-for text go to `out`, notes, figures and faults to `err`."""

    def __init__(
        self,
        *,
        figures: bool = True,
        reasoning: bool = False,
        out: TextIOBase | None = None,
        err: TextIOBase | None = None,
    ):
        """`figures` shows what each answer took; `reasoning` gives thoughts to a pipe too, not to a terminal only."""
        self._figures, self._reasoning = figures, reasoning
        self._out = cast(IO[str], out or sys.stdout)
        self.out = Console(file=self._out, highlight=False, soft_wrap=True)
        self.err = Console(file=cast(IO[str], err or sys.stderr), highlight=False, soft_wrap=True)
        self._kind, self._ended = "answer", True

    def piece(self, piece: Piece) -> None:
        """Part of an answer, at once."""
        if piece.kind == "reasoning" and not (self.out.is_terminal or self._reasoning):
            return
        if self._kind == "reasoning" and piece.kind == "answer":
            self._write("\n\n", "")
        self._kind, self._ended = piece.kind, piece.text.endswith("\n")
        self._write(piece.text, STYLES[piece.kind])

    def end(self) -> None:
        """The end of an answer."""
        if not (self.out.is_terminal and self._ended):
            self._write("\n", "")
        self._kind, self._ended = "answer", True

    def _write(self, text: str, style: str) -> None:
        if self.out.is_terminal:
            self.out.out(text.translate(STEERING), style=style or None, end="", highlight=False)
        else:  # a pipe gets what the model said, byte for byte
            self._out.write(text)
            self._out.flush()

    def figures(self, figures: Figures) -> None:
        """The line below an answer, and a warning when the room for more is short."""
        if self._figures:
            self.note(line(figures))
        if figures.used >= NEARLY_FULL * figures.context:
            self.warn(
                f"the context is {figures.used / figures.context:.0%} full ({figures.used:,} of {figures.context:,} "
                "tokens): /reset starts anew, /save keeps this conversation"
            )

    def note(self, text: str) -> None:
        """Something by the way."""
        self._beside(text, "dim")

    def warn(self, text: str) -> None:
        """Something to act on."""
        self._beside(text, "yellow")

    def fault(self, text: str) -> None:
        """What did not work."""
        self._beside(text, "red")

    def _beside(self, text: str, style: str) -> None:
        self.err.out(text.translate(STEERING), style=style, highlight=False)

    def table(self, rows: Iterable[tuple[str, ...]]) -> None:
        """Rows of words, the first of each in bold."""
        grid = Table.grid(padding=(0, 2))
        for i, row in enumerate(rows):
            if not i:
                for column in range(len(row)):
                    grid.add_column(style="bold" if not column else None, no_wrap=not column)
            grid.add_row(*(Text(cell.translate(STEERING)) for cell in row))
        self._console.print(grid, soft_wrap=False)

    def runs(self, runs: Iterable[Run]) -> None:
        """A conversation as the model reads it."""
        text = Text()
        for run in runs:
            shown = run.text.translate(STEERING)
            style = " ".join((["magenta"] if run.special else []) + (["underline"] if run.supervised else []))
            marked = f"⟦{shown}⟧" if run.supervised and not self._console.is_terminal else shown
            text.append(marked, style or None)
        self._console.print(text, soft_wrap=True)

    @property
    def _console(self) -> Console:
        return self.out if self.out.is_terminal else self.err


def line(figures: Figures) -> str:
    """Figures in words."""
    speed = f", {figures.per_second:.1f} tokens/s" if figures.per_second else ""
    reused = f" ({figures.reused_tokens:,} from the cache)" if figures.reused_tokens else ""
    ends = {
        "stop": "", "length": " · cut off at max_tokens", "full": " · cut off: the context is full",
        "stopped": " · stopped",
    }  # fmt: skip
    return (
        f"{figures.tokens:,} token{'s' * (figures.tokens != 1)}{speed} · first after {figures.first_s:.2f} s · prompt "
        f"{figures.prompt_tokens:,}{reused}{ends[figures.finish]}"
    )
