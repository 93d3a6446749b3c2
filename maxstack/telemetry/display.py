"""Progress of a run in the terminal: redrawn in place on a terminal, plain lines elsewhere."""

import contextlib
import math
import os
import time
import unicodedata
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 48
SAMPLE_LINES = 8
REDRAWS_PER_SECOND = 2


class Display:
    """Shows training rows, held-out losses, samples and messages.

    `mode` is "live", "lines", "off" or "auto" (live on a terminal). Use it as a context manager, so that the terminal
    is left as it was found whatever ends the run.
    """

    def __init__(
        self, total_steps: int, *, mode: str = "auto", title: str = "", lines_every_s: int | float = 10.0,
        console: Console | None = None,
    ):  # fmt: skip
        self.total_steps, self.title = total_steps, title
        self.console = console or Console()
        self.mode = ("live" if self.console.is_terminal else "lines") if mode == "auto" else mode
        self._every, self._last_line = lines_every_s, -float("inf")
        self._row: dict[str, Any] = {}
        self._left: float | None = None
        self._losses = Trend()
        self._held_out: Mapping[str, Mapping[str, float]] = {}
        self._sample: tuple[int, str, str] | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.mode == "live":
            self._live = Live(
                get_renderable=self.render,
                console=self.console,
                refresh_per_second=REDRAWS_PER_SECOND,
                transient=False,
            )
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)
            self._live = None

    def step(self, row: Mapping[str, Any], seconds_left: int | float | None = None) -> None:
        """Show a training row of metrics.jsonl. Only remembers it where the display redraws itself."""
        self._row, self._left = dict(row), seconds_left
        loss = row.get("loss")
        if isinstance(loss, int | float):
            self._losses.add(float(loss))
        now = time.monotonic()
        if self.mode == "lines" and (
            now - self._last_line >= self._every or row.get("step") == self.total_steps
        ):
            self._last_line = now
            self._print(Text(line(row, self.total_steps, seconds_left)))

    def evaluation(self, step: int, held_out: Mapping[str, Mapping[str, float]]) -> None:
        """Show held-out losses by source ({"nll", "bits_per_byte"})."""
        self._held_out = held_out
        if self.mode == "lines" and held_out:
            self._print(Text(f"step {step}  {held_out_text(held_out)}"))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show a text that the model wrote."""
        self._sample = (step, printable(prompt), printable(text))
        if self.mode == "lines":
            self._print(Text.assemble(f"step {step}  sample: ", (printable(prompt), "bold"), printable(text)))

    def message(self, text: str) -> None:
        """Show a line above the display, where it stays."""
        self._print(Text(printable(text)))

    def _print(self, text: Text) -> None:
        if self.mode == "off":
            return
        try:
            self.console.print(text, soft_wrap=True, highlight=False)
        except (OSError, SystemExit):
            # Rich exits where the reader has left (`| head`); training goes on unseen.
            self.mode = "off"
            with contextlib.suppress(OSError, ValueError):
                stream = self.console.file.fileno()
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def render(self) -> RenderableType:
        """The display as it is now."""
        parts: list[RenderableType] = [self._progress(), self._numbers()]
        if self._held_out:
            parts.append(Text(held_out_text(self._held_out), style="cyan"))
        if self._sample:
            parts.append(self._sample_panel(*self._sample))
        return Panel(
            Group(*parts),
            title=Text(self.title) if self.title else None,
            title_align="left",
            border_style="dim",
        )

    def _progress(self) -> RenderableType:
        done = int(self._row.get("step", 0))
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        left = "starting" if not self._row else "" if self._left is None else f"{duration(self._left)} left"
        grid.add_row(
            Text(f"step {done}/{self.total_steps}", "bold"), ProgressBar(self.total_steps, done), Text(left)
        )
        return grid

    def _numbers(self) -> RenderableType:
        grid = Table.grid(padding=(0, 3))
        pairs = [(name, text) for name, text in figures(self._row) if text]
        for start in range(0, len(pairs), 4):
            cells = (Text.assemble((f"{n} ", "dim"), (t, "bold")) for n, t in pairs[start : start + 4])
            grid.add_row(*cells)
        return Group(grid, Text(sparkline(self._losses.values(), SPARK_WIDTH), style="green"))

    def _sample_panel(self, step: int, prompt: str, text: str) -> RenderableType:
        body = Text.assemble((prompt, "bold"), text, overflow="fold")
        width = max(self.console.width - 8, 20)
        lines = body.wrap(self.console, width)[:SAMPLE_LINES]
        return Panel(
            Text("\n").join(lines), title=f"sample at step {step}", title_align="left", border_style="dim"
        )


class Trend:
    """A curve of any length in at most `size` points: where it overflows, neighbours become their mean."""

    def __init__(self, size: int = 256):
        self._size, self._stride = size, 1
        self._points: list[float] = []
        self._open: list[float] = []

    def add(self, value: int | float) -> None:
        """Append a value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._open.append(value)
        if len(self._open) == self._stride:
            self._points.append(sum(self._open) / self._stride)
            self._open = []
        if len(self._points) == self._size:
            self._points = [(a + b) / 2 for a, b in zip(self._points[::2], self._points[1::2], strict=True)]
            self._stride *= 2

    def values(self) -> list[float]:
        """The points so far."""
        return list(self._points)


def figures(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and texts of what a row holds, in the order of the display; "" for what it lacks."""
    wait, seconds = row.get("data_wait_seconds"), row.get("step_seconds")
    share = (
        wait / seconds
        if isinstance(wait, int | float) and isinstance(seconds, int | float) and seconds
        else None
    )
    return [
        ("loss", _number(row.get("loss"), ".4f")),
        ("tokens/s", _number(row.get("tokens_per_second"), ",.0f")),
        ("step", _number(seconds, ".3f", " s")),
        ("learning rate", _number(row.get("learning_rate"), ".2e")),
        ("gradient norm", _number(row.get("gradient_norm"), ".3f")),
        ("data wait", _number(share, ".1%")),
        ("device memory", _bytes(row.get("device_memory_bytes"))),
        ("MFU", _number(row.get("mfu_causal"), ".1%")),
        ("skipped", _number(row.get("skipped_steps") or None, ".0f")),
    ]


def line(row: Mapping[str, Any], total_steps: int, seconds_left: int | float | None) -> str:
    """A training row as one line of plain text."""
    shown = "  ".join(f"{name} {text}" for name, text in figures(row) if text)
    left = "" if seconds_left is None else f"  {duration(seconds_left)} left"
    return f"step {row.get('step', 0)}/{total_steps}  {shown}{left}"


def held_out_text(held_out: Mapping[str, Mapping[str, float]]) -> str:
    """Held-out losses as one line."""
    parts = [
        f"{printable(source)} {_number(loss.get('nll'), '.4f')} nats/token, "
        f"{_number(loss.get('bits_per_byte'), '.4f')} bits/byte"
        for source, loss in held_out.items()
    ]
    return "held out: " + "; ".join(parts)


def duration(seconds: int | float) -> str:
    """ "1 h 02 min", "3 min 20 s", "7 s"."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def sparkline(values: Sequence[int | float], width: int) -> str:
    """A curve of at most `width` characters, each the mean of its share of the values."""
    if not values:
        return ""
    count = min(width, len(values))
    bins = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in bins]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(SPARKS[min(len(SPARKS) - 1, int((m - low) / span * len(SPARKS)))] for m in means)


def printable(text: str) -> str:
    """Text without control characters (a model can write escape codes): they show as their code points."""
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else f"<{ord(c):x}>"
        for c in text.replace("\t", "    ").replace("\r\n", "\n")
    )


def _number(value: Any, spec: str, unit: str = "") -> str:
    return f"{value:{spec}}{unit}" if isinstance(value, int | float) else ""


def _bytes(value: Any) -> str:
    return f"{value / 2**30:.2f} GiB" if isinstance(value, int | float) and value else ""
